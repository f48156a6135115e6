"""Which files of an output folder a command wrote: those alone may be replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.errors import DamagedFileError
from tutelage.files import WRITING, read_json, read_sealed, write_json
from tutelage.training.manifest import MANIFEST

__all__ = ["MADE", "add_made", "finish_made", "is_made", "is_unfinished", "made_files"]

MADE = "made.json"
"""File in an output folder that names the files which were written there, as they are about to be."""

_HALF = MADE + ".tmp"  # what a kill may leave of a record that was being written
_OWN = (_HALF, MADE, "lock.json", "run.json", "template-time.json")
_OF_STAGES = (
    MANIFEST,
    WRITING,
    "*.tmp",
    "samples.jsonl*",
    "replayed-*.jsonl",
    "rewards.jsonl",
    "reward.json",
    "reward.safetensors",
    "reward-*",
    "validation.jsonl",
    "candidate.json",
    "best.json",
    "best.safetensors",
    "policy.safetensors",
    "initial.jsonl",
    "out_of_fold-*.jsonl",
    "fold-*.json",
    "fold-*.safetensors",
    "folds.json",
)


def add_made(folder: Path, names: Iterable[str], *, folders: Iterable[str] = (), unfinished: bool = False) -> None:
    """Note files that are about to be written; call it before.

    Args:
        folders: names of folders in it that the same command writes, each with a record of its own. A folder in which
            another command wrote is not its.
        unfinished: the command that writes them is of no use unless it ends, and may then be run again.
    """
    found = _read(folder)
    _write(
        folder,
        {*found["files"], *names},
        {*found["folders"], *folders},
        **({"unfinished": True} if unfinished else {}),
    )


def finish_made(folder: Path) -> None:
    """The command that wrote the files has ended."""
    found = _read(folder)
    _write(folder, found["files"], found["folders"])


def _write(folder: Path, files: Iterable[str], folders: Iterable[str], **facts: Any) -> None:
    parts = {"folders": sorted(folders)} if folders else {}
    record = {"files": sorted(files), **parts, **facts}
    if _json(folder / MADE) != record:
        write_json(folder / MADE, record)


def is_made(folder: Path, name: str) -> bool:
    """Whether a file was noted with ``add_made``."""
    return name in _read(folder)["files"]


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds nothing but what a killed command wrote that may be run again."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    if not (folder / MADE).exists():  # killed while it began
        return all(path in (folder / _HALF, folder / "lock.json") for path in files)
    if not _json(folder / MADE).get("unfinished"):
        return False
    made = set(made_files(folder))
    return all(path in made for path in files)


def made_files(folder: Path) -> list[Path]:
    """The files in a folder and below it that commands of this library wrote."""
    found: dict[Path, None] = {}
    for home in _homes(folder):
        found |= dict.fromkeys(path for path in _made_in(home) if _is_below(path, home))
    return [path for path in found if path.is_file() or path.is_symlink()]


def _homes(folder: Path) -> Iterator[Path]:
    """The folder, and those in it that the same command wrote; none where no command did."""
    if not _is_of_a_command(folder):
        return
    yield folder
    for home in [*sorted(folder.glob("controls/*")), *(folder / name for name in _read(folder)["folders"])]:
        if home.is_dir() and _is_below(home, folder):
            yield from _homes(home)


def _is_of_a_command(folder: Path) -> bool:
    """Whether a command of this library wrote here: there is its record, or a run's own, with its seal."""
    if "files" in _json(folder / MADE):
        return True
    try:
        return bool(read_sealed(folder / "run.json"))
    except (DamagedFileError, OSError):
        return False


def _is_below(path: Path, home: Path) -> bool:
    return home in path.parents and ".." not in path.parts


def _made_in(home: Path) -> Iterator[Path]:
    yield from (home / name for name in _read(home)["files"])
    for manifest in home.glob(f"checkpoint-*/{MANIFEST}"):
        yield from (manifest.parent / name for name in _names(_json(manifest).get("files")))
        yield manifest
    for inside in ("stages", "folds", "retention-start"):
        for pattern in (*_OF_STAGES, *(("results.json",) if inside == "retention-start" else ())):
            for path in (home / inside).rglob(pattern):
                yield from path.rglob("*") if path.is_dir() else [path]
    for path in (home / "stages").rglob("member-*"):
        yield from path.rglob("*")
    yield from (home / WRITING).rglob("*")
    for pattern in ("adapter-*", "policy-*"):  # of a killed run that sampled on vLLM
        for path in (home / "vllm").glob(pattern):
            yield from path.rglob("*")
    yield from (home / name for name in _OWN)  # last: a killed removal is known as one


def _read(folder: Path) -> dict[str, list[str]]:
    """The names in a folder's record; none where there is none, or it is not one."""
    found = _json(folder / MADE)
    return {kind: _names(found.get(kind)) for kind in ("files", "folders")}


def _names(found: Any) -> list[str]:
    return [name for name in found if isinstance(name, str)] if isinstance(found, (list, dict)) else []


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
