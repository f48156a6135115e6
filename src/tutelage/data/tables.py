"""Rows of JSON and CSV files as a table that gives every value back as it was written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pyarrow as pa
from datasets import Dataset, DatasetInfo, Features, Value
from datasets.features import Json
from datasets.table import InMemoryTable

__all__ = ["table_of"]

_CHUNK = 10_000
_INT64 = range(-(2**63), 2**63)


class _Exact(Json):
    """JSON that Python's own module writes and reads.

    The one of ``datasets`` takes text that looks like JSON for what it looks like, and knows no large integers.
    """

    def encode_example(self, example_data: Any) -> str | None:
        return None if example_data is None else json.dumps(example_data)

    def decode_example(self, example_data: Any, token_per_repo_id: Any = None) -> Any:
        return None if example_data is None else json.loads(example_data)


def table_of(rows: Iterable[Mapping[str, Any]]) -> Dataset:
    """A dataset of rows as Python reads them from JSON: text, numbers, lists, objects, of whatever types in a column.

    A column that a row has not is None in it. Columns of one simple type are stored as such, all others as JSON text.

    Raises:
        UnicodeEncodeError: the name of a column is no Unicode text.
    """
    names: dict[str, None] = {}
    chunks: list[list[Mapping[str, Any]]] = [[]]
    for row in rows:
        names.update(dict.fromkeys(row))
        if len(chunks[-1]) == _CHUNK:
            chunks.append([])
        chunks[-1].append(row)
    columns, features = {}, {}
    for name in names:
        stored = next((known for known in _SIMPLE if all(map(known[0], _values(chunks, name)))), None)
        if stored is None:
            texts = [pa.array([_text(row.get(name)) for row in chunk], pa.string()) for chunk in chunks]
            arrays = [pa.ExtensionArray.from_storage(pa.json_(), text) for text in texts]
            columns[name], features[name] = pa.chunked_array(arrays, pa.json_()), _Exact()
        else:
            kind = stored[1]
            arrays = [pa.array([row.get(name) for row in chunk], kind) for chunk in chunks]
            columns[name], features[name] = pa.chunked_array(arrays, kind), Value(stored[2])
    return Dataset(InMemoryTable(pa.table(columns)), info=DatasetInfo(features=Features(features)))


def _values(chunks: Iterable[Iterable[Mapping[str, Any]]], name: str) -> Iterator[Any]:
    return (value for chunk in chunks for row in chunk if (value := row.get(name)) is not None)


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value)


def _is_text(value: Any) -> bool:
    """Whether it is text, and not with half of a surrogate pair, which only an escape can write."""
    if type(value) is not str:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


_SIMPLE: tuple[tuple[Callable[[Any], bool], pa.DataType, str], ...] = (
    (_is_text, pa.string(), "string"),
    (lambda value: type(value) is bool, pa.bool_(), "bool"),
    (lambda value: type(value) is int and value in _INT64, pa.int64(), "int64"),
    (lambda value: type(value) is float, pa.float64(), "float64"),
)
"""Which values go into a column of a simple type, the type, and its name."""
