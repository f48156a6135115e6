"""Writing files so that a reader sees all of one or nothing, and knowing later that they are still what was written."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from tutelage.errors import DamagedFileError, UserError

__all__ = [
    "WRITING",
    "append_json_lines",
    "difference",
    "json_text",
    "plain",
    "read_json",
    "read_sealed",
    "replacing",
    "replacing_alone",
    "size_and_hash",
    "storing",
    "sync",
    "why_not_stored",
    "write_json",
    "write_json_lines",
    "write_sealed",
    "write_text",
    "writing_folder",
]

WRITING = ".writing"
"""Folder for files that are not whole yet."""
_SEAL = "sha256"
_NOT_STORED = (
    *("PytorchStreamWriter", "iostream error", "file write failed", "I/O error", "unexpected pos"),
    *("No space left on device", "Read-only file system", "Disk quota exceeded"),
)
"""What torch, safetensors and tokenizers say where the disk did not take their bytes; they raise no ``OSError``."""
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)


@contextmanager
def storing(path: Path) -> Iterator[None]:
    """Within, a disk that takes no more (full, read-only, gone) is the user's to mend.

    Raises:
        UserError: names ``path`` and says why it could not be written.
    """
    try:
        yield
    except OSError as error:
        raise _not_stored(path, error.strerror or str(error)) from error
    except UserError:
        raise
    except Exception as error:  # safetensors' error is a plain Exception
        if not any(sign in str(error) for sign in _NOT_STORED):
            raise
        raise _not_stored(path, str(error).splitlines()[0]) from error


def why_not_stored(error: Exception) -> str | None:
    """Why the disk did not take what a library wrote; None where an error says something else."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return error.strerror or str(error)
    line = (str(error).splitlines() or [""])[0]
    return line if any(sign in line for sign in _NOT_STORED) else None


def _not_stored(path: Path, reason: str) -> UserError:
    return UserError(
        f"cannot be written: {reason}.",
        remedy="Make room, or mend the folder, and run the command again; a training run goes on with --resume.",
        file=str(path),
    )


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``, and renames it when its writer is done; nothing is left of a failed one.

    Raises:
        UserError: as ``storing``.
    """
    temporary = path.with_name(path.name + ".tmp")
    with storing(path):
        try:
            yield temporary
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


@contextmanager
def writing_folder(home: Path) -> Iterator[Path]:
    """An empty folder inside ``home``, for files that get their names when they are whole; it is removed at the end.

    Raises:
        UserError: the disk does not take what is written within.
    """
    folder = home / WRITING
    with storing(home):
        shutil.rmtree(folder, ignore_errors=True)  # of a killed run
        folder.mkdir()  # no parents: an output folder that is gone is not made again
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_alone(path: Path) -> Iterator[Path]:
    """As ``replacing``, for a library that writes beside the name that it is given: the temporary one has a folder to itself.

    safetensors does so, under names that nobody knows afterwards, and a kill leaves them there. Here the next writer of the
    folder removes them.
    """
    with writing_folder(path.parent) as folder, storing(path):
        yield folder / path.name
        os.replace(folder / path.name, path)


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename: a reader sees the old file or the new one, never half of it."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, content: Any) -> None:
    """As ``write_text``, one JSON value that people can read.

    JSON has no NaN and no infinity, and other readers refuse a file with one: such a number is written as null.
    """
    write_text(path, json_text(content, indent=2) + "\n")


def json_text(content: Any, indent: int | None = None) -> str:
    """A value as JSON that every reader takes, see ``write_json``."""
    try:
        return json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False)
    except ValueError:
        return json.dumps(plain(content), indent=indent, ensure_ascii=False, allow_nan=False)


def plain(value: Any) -> Any:
    """Any value as JSON types; None for a number that is not finite."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, str | bool | int | None):
        return value
    if hasattr(value, "item"):  # a number of NumPy or torch
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, bool | int) else str(value)


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json_lines(path: Path, lines: Iterable[Any]) -> None:
    """One JSON value per line, as ``write_json`` writes it, to a temporary name that is then renamed."""
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        append_json_lines(file, lines)


def append_json_lines(file: IO[str], lines: Iterable[Any]) -> None:
    """Further lines at the end of an open file, on their way to the disk when this returns."""
    file.writelines(json_text(line) + "\n" for line in lines)
    file.flush()


# --- is it still what was written? --------------------------------------------------------------------------------------


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """As ``write_json``, with a hash of the content in it, by which ``read_sealed`` knows that nobody altered it."""
    write_json(path, {**content, _SEAL: _seal(content)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The content of a file that ``write_sealed`` wrote.

    Raises:
        FileNotFoundError: there is none.
        DamagedFileError: it is not as it was written.
    """
    try:
        content = read_json(path)
        seal = content.pop(_SEAL)
    except FileNotFoundError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DamagedFileError("is torn or was altered.", file=str(path)) from None
    if seal != _seal(content):
        raise DamagedFileError("was altered: it does not match the hash in it.", file=str(path))
    return content


def _seal(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(plain(content), sort_keys=True).encode()).hexdigest()


def size_and_hash(path: Path) -> dict[str, Any]:
    """A file's ``bytes`` and ``sha256``; a second per 1.5 GB on a processor with SHA instructions."""
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": found}


def difference(path: Path, noted: Mapping[str, Any]) -> str | None:
    """How a file differs from what ``size_and_hash`` noted, in words; None if it does not."""
    if not path.is_file():
        return "is missing"
    size = path.stat().st_size
    if size != noted["bytes"]:
        return f"has {size:,} bytes where {noted['bytes']:,} were written"
    return (
        None
        if size_and_hash(path) == noted
        else "was altered: its content does not match the hash of what was written"
    )


def sync(folder: Path) -> None:
    """Have a folder and all that is in it on the disk when this returns, so that it outlasts a loss of power."""
    for place in (*folder.rglob("*"), folder):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
