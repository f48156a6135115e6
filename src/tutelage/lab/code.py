"""Which code a result is of: a run's name does not tell, so that a change of the library throws no results away."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tutelage import errors

__all__ = ["UNKNOWN", "code_of", "code_version", "hash_sources", "numeric_sources"]

UNKNOWN = "unknown"
"""The code of results from before it was recorded."""

_ABOVE = {"__main__.py", "cli", "lab", "report"}  # what commands and pages say changes no number of a run
_OF_THE_LAB = ("base.py", "measures.py", "mixture.py", "running.py", "vocabulary.py", "worlds")


@cache
def code_version() -> str:
    """A short hash of the sources that a run's numbers come from, as they were at the first call of this process."""
    root = Path(errors.__file__).parent
    return hash_sources(root, numeric_sources(root))


def code_of(result: Mapping[str, Any]) -> str:
    """The version of the code that made a result."""
    return result.get("code", UNKNOWN)


def numeric_sources(root: Path) -> list[Path]:
    """The package's modules below the lab, and those of the lab that train and measure, in a fixed order.

    Args:
        root: the folder of the package.
    """
    below = [path for path in root.iterdir() if path.name not in _ABOVE]
    parts = [*below, *(root / "lab" / name for name in _OF_THE_LAB)]
    return sorted(
        path for part in parts for path in (part.rglob("*.py") if part.is_dir() else [part]) if path.suffix == ".py"
    )


def hash_sources(root: Path, paths: Iterable[Path]) -> str:
    """Twelve hexadecimal digits that change with a file's content or its place under ``root``."""
    found = hashlib.sha256()
    for path in paths:
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()}\0{len(content)}\0".encode() + content)
    return found.hexdigest()[:12]
