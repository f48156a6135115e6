"""Texts that others wrote, made safe to show: no control byte of theirs reaches a terminal."""

from __future__ import annotations

import sys
from typing import TextIO

__all__ = ["visible", "write"]


def visible(text: object, *, lines: bool = True) -> str:
    """The text with everything that a terminal would obey, or hide, spelled out.

    Escape sequences, carriage returns, marks that turn the direction of writing, and bytes that are no UTF-8 in a file's name.

    Args:
        lines: keep line ends and tabs; a name has none.

    >>> visible("a\\x1b[31mb\\u202ec\\n"), visible("a\\nb", lines=False)
    ('a\\\\x1b[31mb\\\\u202ec\\n', 'a\\\\nb')
    """
    kept = "\n\t" if lines else ""
    return "".join(
        char if char.isprintable() or char in kept else char.encode("unicode_escape").decode() for char in str(text)
    )


def write(text: str, file: TextIO | None = None) -> None:
    """Write a line without a console: help, and errors."""
    file = file or sys.stdout
    encoding = getattr(file, "encoding", None) or "utf-8"
    print(visible(text).encode(encoding, "backslashreplace").decode(encoding), file=file)
