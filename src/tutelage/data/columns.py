"""A look at the first rows of a file, before anything heavy is imported: are there rows, and are they demonstrations?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from tutelage.data.demonstrations import Columns, Turns, holds_prompts_alone, read_prompts, read_rows
from tutelage.data.readers import extension, looks_like_path, missing, read_file, require_readable
from tutelage.errors import UserError

__all__ = ["NUM_ROWS", "Peek", "check_demonstrations", "check_prompts", "peek"]

NUM_ROWS = 1000


@dataclass(frozen=True)
class Peek:
    """The first rows of a file, with the columns that occur in them."""

    rows: Sequence[Mapping[str, Any]]

    @property
    def column_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        return iter(self.rows)


def peek(source: str, limit: int | None = None) -> Peek | None:
    """The first rows of a JSON or CSV file; None for what needs a library to be read: Parquet, folders, the hub.

    Args:
        limit: how many rows, at most ``NUM_ROWS``.

    Raises:
        UserError: nothing is there, it cannot be read, or it is empty.
    """
    path = Path(source).expanduser()
    if not path.exists():
        if looks_like_path(source):
            raise missing(source)
        return None
    if not path.is_file():
        return None
    require_readable(path)
    if extension(path) == ".parquet":
        return None
    rows = list(islice(read_file(path), min(NUM_ROWS, NUM_ROWS if limit is None else limit)))
    if not rows and limit != 0:
        raise UserError("the dataset is empty.", remedy="It needs at least one row.", file=source)
    return Peek(rows)


def check_demonstrations(
    source: str,
    *,
    split: str = "train",
    turns: Turns = "last",
    limit: int | None = None,
    columns: Columns | None = None,
) -> None:
    """Refuse a file whose first rows are no demonstrations, with the error that reading all of it would give.

    Args:
        split: of a part of the file the rows are not looked at, since it may leave out the first.
        turns, limit, columns: as for reading.

    Raises:
        UserError: as ``peek`` and ``read_rows``.
    """
    found = peek(source, limit)
    if found is not None and split == "train":
        for _ in read_rows(found, turns=turns, source=source, columns=columns):
            pass


def check_prompts(source: str, *, split: str = "train", turns: Turns = "last", columns: Columns | None = None) -> None:
    """Refuse a file whose first rows hold no prompts, with the error that reading all of it would give.

    Args:
        split, turns, columns: as for ``check_demonstrations``.

    Raises:
        UserError: as ``peek``, ``read_prompts`` and ``read_rows``.
    """
    found = peek(source)
    if found is None or split != "train":
        return
    for _ in (
        read_prompts(found, source=source, columns=columns)
        if holds_prompts_alone(found, columns)
        else read_rows(found, turns=turns, source=source, columns=columns)
    ):
        pass
