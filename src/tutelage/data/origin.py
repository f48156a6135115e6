"""Where the rows of a dataset come from: the file and the row in it, for messages to people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tutelage.data.readers import read_file
from tutelage.errors import UserError

__all__ = ["Origin", "located", "numbered", "selected"]


@dataclass(frozen=True)
class Origin:
    """The files that a dataset was read from, one after the other.

    Attributes:
        files: in the order of their rows.
        lengths: rows of each file; None where they have not been counted, as in a stream.
        places: for each row of the dataset its place among all rows of the files, from 0; None where it is the same.
    """

    files: Sequence[Path]
    lengths: Sequence[int] | None = None
    places: Sequence[int] | None = None

    def place(self, index: int) -> tuple[str, int]:
        """The file of a row, and its number there, counted from 1."""
        index = index if self.places is None else self.places[index]
        for path, length in zip(self.files, self.lengths or self._counted(index), strict=False):
            if index < length:
                return str(path), index + 1
            index -= length
        return str(self.files[-1]), index + 1

    def _counted(self, index: int) -> Iterator[int]:
        """The lengths of the files, as far as they are needed."""
        for path in self.files[:-1]:
            yield (length := sum(1 for _ in read_file(path)))
            index -= length
            if index < 0:
                return


def located(error: UserError, dataset: Any, index: int) -> UserError:
    """The error with the file and the row of the dataset's row ``index`` (from 0), where the dataset knows them."""
    origin = getattr(dataset, "origin", None)
    if origin is None:
        return error
    file, row = origin.place(index)
    return UserError(error.problem, remedy=error.remedy, file=file, row=row, field=error.field)


def selected(dataset: Any, places: Sequence[int]) -> Any:
    """Some rows of a map-style dataset, which still know where they come from."""
    found, origin = dataset.select(places), getattr(dataset, "origin", None)
    if origin is not None:
        known = origin.places
        found.origin = replace(origin, places=[place if known is None else known[place] for place in places])
    return found


def numbered(dataset: Any, source: str) -> Iterator[tuple[int, Any]]:
    """The rows of a dataset with their indices, from 0.

    Raises:
        UserError: a row cannot be read; what reads it has raised whatever its parsers raise.
    """
    rows, index = iter(dataset), 0
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except UserError:
            raise
        except Exception as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            problem = f"the row cannot be read: {reason}"
            raise located(UserError(problem, file=source, row=index + 1), dataset, index) from error
        yield index, row
        index += 1
