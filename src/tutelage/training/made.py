"""Which files of an output folder a command wrote: those alone may be replaced."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.files import read_json, write_json
from tutelage.training.manifest import MANIFEST

__all__ = ["MADE", "add_made", "finish_made", "is_unfinished", "made_files"]

MADE = "made.json"
"""File in an output folder that names the files which were written there, as they are about to be."""

_OWN = (MADE, "lock.json", "run.json", "template-time.json")
_OF_STAGES = (
    MANIFEST,
    "*.tmp",
    "samples.jsonl*",
    "replayed-*.jsonl",
    "rewards.jsonl",
    "reward.json",
    "reward.safetensors",
    "reward-*",
    "validation.jsonl",
    "candidate.json",
    "policy.safetensors",
    "initial.jsonl",
    "out_of_fold-*.jsonl",
    "fold-*.json",
    "fold-*.safetensors",
    "folds.json",
)


def add_made(folder: Path, names: Iterable[str], *, unfinished: bool = False) -> None:
    """Note files that are about to be written; call it before.

    Args:
        unfinished: the command that writes them is of no use unless it ends, and may then be run again.
    """
    found = _read(folder)
    files = sorted({*found.get("files", []), *names})
    write_json(folder / MADE, {"files": files, **({"unfinished": True} if unfinished else {})})


def finish_made(folder: Path) -> None:
    """The command that wrote the files has ended."""
    write_json(folder / MADE, {"files": _read(folder).get("files", [])})


def is_unfinished(folder: Path) -> bool:
    """Whether the folder holds nothing but what a killed command wrote that may be run again."""
    if not _read(folder).get("unfinished"):
        return False
    made = set(made_files(folder))
    return all(path in made for path in folder.rglob("*") if path.is_file())


def made_files(folder: Path) -> list[Path]:
    """The files in a folder and below it that commands of this library wrote."""
    found: dict[Path, None] = {}
    for home in [folder, *(path.parent for path in folder.rglob(MADE) if path.parent != folder)]:
        found |= dict.fromkeys(_made_in(home))
    return [path for path in found if path.is_file() or path.is_symlink()]


def _made_in(home: Path) -> Iterator[Path]:
    for name in _read(home).get("files", []):
        path = home / name
        if home in path.parents and ".." not in path.parts:
            yield path
    for manifest in home.glob(f"checkpoint-*/{MANIFEST}"):
        yield from (manifest.parent / name for name in _json(manifest).get("files", {}))
        yield manifest
    for inside in ("stages", "folds", "retention-start"):
        for pattern in (*_OF_STAGES, *(("results.json",) if inside == "retention-start" else ())):
            for path in (home / inside).rglob(pattern):
                yield from path.rglob("*") if path.is_dir() else [path]
    for path in (home / "stages").rglob("member-*"):
        yield from path.rglob("*")
    yield from (home / ".writing").rglob("*")
    yield from (home / name for name in _OWN)  # last: a killed removal is known as one


def _read(folder: Path) -> dict[str, Any]:
    return _json(folder / MADE)


def _json(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, json.JSONDecodeError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
