"""Demonstrations ranked by a number per row, and which of them are kept."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tutelage.errors import UserError

__all__ = ["Ranked", "number_dropped", "rank_rows"]


@dataclass(frozen=True, slots=True)
class Ranked:
    """A row in the ranking.

    Attributes:
        row: its number in the data, from 0.
        rank: from 1, the worst.
        value: what it is ranked by; higher is better.
        kept: whether it stays.
    """

    row: int
    rank: int
    value: float
    kept: bool


def number_dropped(rows: int, *, drop: float | None = None, keep: int | None = None) -> int:
    """How many of the worst rows are dropped: a share of them, rounded down, or all but so many.

    Raises:
        UserError: nothing would remain, there are fewer rows than are to be kept, or not one of the two is given.

    >>> number_dropped(10, drop=0.3), number_dropped(10, keep=4)
    (3, 6)
    """
    if (drop is None) == (keep is None):
        raise UserError("say how many rows are dropped: a share, or how many are kept.", field="drop / keep")
    if keep is not None:
        if not 1 <= keep <= rows:
            raise UserError(f"must be between 1 and the number of rows, {rows}, not {keep}.", field="keep")
        return rows - keep
    assert drop is not None
    if not 0 <= drop < 1:
        raise UserError(f"must be at least 0 and below 1, not {drop:g}.", field="drop")
    return math.floor(drop * rows + 1e-9)  # 0.3 · 10 is a little less than 3 in floating point


def rank_rows(rows: Sequence[int], values: Sequence[float], *, dropped: int) -> list[Ranked]:
    """The rows from the worst to the best; of equal values the first row comes first.

    Args:
        rows: the rows' numbers.
        values: one for each.
        dropped: so many of the worst are not kept.

    Raises:
        UserError: a value is NaN or infinite.

    >>> [(each.row, each.kept) for each in rank_rows([0, 1, 2], [0.5, -1.0, 0.5], dropped=2)]
    [(1, False), (0, False), (2, True)]
    """
    for row, value in zip(rows, values, strict=True):
        if not math.isfinite(value):
            raise UserError(
                f"its value is {value}, so it has no rank.", row=row + 1, remedy="Look at the row and at the model."
            )
    ordered = sorted(zip(values, rows, strict=True))
    return [Ranked(row, rank, value, rank > dropped) for rank, (value, row) in enumerate(ordered, start=1)]
