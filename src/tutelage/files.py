"""Atomic writing of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

__all__ = ["append_json_lines", "read_json", "write_json", "write_json_lines", "write_text"]


def write_text(path: Path, text: str) -> None:
    """Write to a temporary name and rename: a reader sees the old file or the new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, content: Any) -> None:
    """As ``write_text``, one JSON value that people can read."""
    write_text(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """What a JSON file holds."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_json_lines(path: Path, lines: Iterable[Any]) -> None:
    """One JSON value per line, to a temporary name that is then renamed."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        append_json_lines(file, lines)
    os.replace(temporary, path)


def append_json_lines(file: IO[str], lines: Iterable[Any]) -> None:
    """Further lines at the end of an open file, on their way to the disk when this returns."""
    file.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    file.flush()
