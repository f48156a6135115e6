"""Named values as columns of a matrix."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from scipy import sparse

from tutelage.groups import Group

__all__ = ["Feature", "Vocabulary"]

Feature = tuple[str | int, ...]
"""A feature's name: its kind, then positions or token ids, such as ``("bigram", 17, 23)``."""


class Vocabulary:
    """Which names have a column, in order.

    Args:
        names: in order.
    """

    def __init__(self, names: Iterable[Sequence[str | int]] = ()):
        self.names: tuple[Feature, ...] = tuple(tuple(name) for name in names)
        self._columns = {name: column for column, name in enumerate(self.names)}

    @staticmethod
    def of(groups: Sequence[Group], rows: Sequence[Mapping[Feature, float]], *, limit: int, least: int) -> Vocabulary:
        """The names that the most groups show.

        Args:
            groups: whose completions ``rows`` describe, in order.
            limit: names at most.
            least: groups that must show a name; all where there are fewer.
        """
        shown: Counter[Feature] = Counter()
        start = 0
        for group in groups:
            end = start + len(group.completions)
            shown.update({name for row in rows[start:end] for name in row})
            start = end
        least = min(least, len(groups))
        ranked = sorted((-count, _sortable(name), name) for name, count in shown.items() if count >= least)
        return Vocabulary(name for *_, name in ranked[:limit])

    def matrix(self, rows: Sequence[Mapping[Feature, float]]) -> sparse.csr_array:
        """[C, F] the values, 0 where a row does not name one; names without a column are left out."""
        columns, values, ends = [], [], [0]
        column_of = self._columns.get
        for row in rows:
            for name, value in row.items():
                if (column := column_of(name)) is not None:
                    columns.append(column)
                    values.append(value)
            ends.append(len(columns))
        return sparse.csr_array(
            (np.array(values, dtype=np.float64), np.array(columns, dtype=np.int32), np.array(ends, dtype=np.int32)),
            shape=(len(rows), len(self.names)),
        )

    def __len__(self) -> int:
        """F."""
        return len(self.names)


def _sortable(name: Feature) -> tuple[str, tuple[int, ...]]:
    return str(name[0]), tuple(int(part) for part in name[1:])
