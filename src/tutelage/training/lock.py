"""One run at a time in a folder."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from tutelage.errors import UserError
from tutelage.files import storing

__all__ = ["LOCK", "is_locked", "locked"]

LOCK = "lock.json"
"""File in a run's folder that says who writes there; it is there as long as the run is on."""

_held: dict[Path, int] = {}  # of this process, which may ask for a folder that it has


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within, no other process of this library writes into a folder, which must be there.

    The system gives the lock back when a process dies, however it dies; what its file says is for people, and for another
    host that sees the folder.

    Raises:
        UserError: another run is on there, or may be.
    """
    place = folder.resolve()
    if _held.get(place):
        yield
        return
    with storing(folder / LOCK):
        file = _take(folder / LOCK)
    _held[place] = 1
    try:
        yield
    finally:
        del _held[place]
        with suppress(OSError):  # the folder may be gone
            (folder / LOCK).unlink()
        file.close()


def is_locked(folder: Path) -> bool | None:
    """Whether a process of this library writes into a folder now; None where another host says so, which cannot be seen.

    Asks without taking the lock, so that nobody who takes it meanwhile is refused.
    """
    if _held.get(folder.resolve()):
        return True
    try:
        with (folder / LOCK).open(encoding="utf-8") as file:
            left = _read(file)
    except OSError:
        return False
    if left and left.get("host") != socket.gethostname():
        return None
    return bool(left) and _is_alive(left)


def _take(path: Path) -> IO[str]:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            held_by = _read(file)
            file.close()
            raise UserError(
                f"another run writes into this folder: {_said(held_by)}.",
                remedy="Wait until it is over or stop it, or name another --output_dir.",
                file=str(path.parent),
                field="output_dir",
            ) from None
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            break
        file.close()  # its last holder removed it between our two calls
    _refuse_what_may_be_on(path, _read(file))
    file.truncate(0)
    json.dump(_own(), file, indent=2)
    file.flush()
    return file


def _refuse_what_may_be_on(path: Path, left: dict[str, Any]) -> None:
    """A file that was left is of a run that was killed, or of one that another host, or a removed file, locks."""
    if not left or (left.get("host") == socket.gethostname() and not _is_alive(left)):
        return
    elsewhere = left.get("host") != socket.gethostname()
    raise UserError(
        f"another run may still write into this folder: {_said(left)}"
        + (", which cannot be seen from here." if elsewhere else "."),
        remedy=f"If it is over, remove {path} and run again.",
        file=str(path.parent),
        field="output_dir",
    )


def _read(file: IO[str]) -> dict[str, Any]:
    file.seek(0)
    try:
        found = json.loads(file.read())
    except ValueError:  # empty, or of a process that was killed when it began
        return {}
    return found if isinstance(found, dict) else {}


def _own() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_begun": _begun(os.getpid()),
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": Path(sys.argv[0]).name,
    }


def _said(holder: dict[str, Any]) -> str:
    if not holder:
        return "its lock is taken"
    return f"process {holder.get('process')} on {holder.get('host')}, since {holder.get('since')}"


def _is_alive(left: dict[str, Any]) -> bool:
    """Whether the process that left the file is on; another one may have its number by now."""
    process = left.get("process")
    if not isinstance(process, int) or process == os.getpid():
        return False
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        pass
    return _begun(process) == left.get("process_begun")


def _begun(process: int) -> str | None:
    """When a process began, in the system's own count; None where the system does not tell."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None
