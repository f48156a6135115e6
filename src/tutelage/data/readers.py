"""Read rows of JSON, CSV and Parquet files; nothing but the standard library is imported until it is needed."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from tutelage.errors import UserError

__all__ = [
    "READERS",
    "extension",
    "looks_like_path",
    "missing",
    "open_file",
    "read_file",
    "reason",
    "require_readable",
]


def looks_like_path(name: str) -> bool:
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return hub_name is None or extension(Path(name)) in READERS


def extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def require_readable(path: Path) -> None:
    """Raise ``UserError`` for a kind of file that is not known."""
    if extension(path) not in READERS:
        known = ", ".join(READERS)
        raise UserError(f"unknown file type; supported are {known}, each also with .gz.", file=str(path))


def missing(source: str) -> UserError:
    """The error of a path to nothing."""
    return UserError("this file or folder does not exist.", remedy="Check the path.", file=source)


def reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def read_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with open_file(path) as file:
            yield from READERS[extension(path)](file, str(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {reason(error)}", file=str(path)) from error


def open_file(path: Path) -> Any:
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _read_json_lines(lines: Iterable[bytes], source: str) -> Iterator[dict[str, Any]]:
    empty = None
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            empty = empty or number
            continue
        if empty:  # else the numbers of rows and lines would drift apart
            raise UserError(f"line {empty} is empty.", remedy="Delete it.", file=source, row=empty)
        try:
            row = json.loads(line)
        except UnicodeDecodeError as error:
            raise UserError(f"line {number} is not UTF-8 text: {error.reason}.", file=source, row=number) from error
        except json.JSONDecodeError as error:
            problem = f"line {number} is not valid JSON: {error.msg} at column {error.colno}."
            raise UserError(problem, remedy="Each line holds one JSON object.", file=source, row=number) from error
        yield _object(row, f"line {number}", number, source)


def _read_json(file: Any, source: str) -> Iterator[dict[str, Any]]:
    content = file.read()
    if not content.lstrip().startswith(b"["):
        yield from _read_json_lines(content.splitlines(), source)
        return
    try:
        rows = json.loads(content)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno} is not valid JSON: {error.msg} at column {error.colno}."
        raise UserError(problem, file=source) from error
    for number, row in enumerate(rows, start=1):
        yield _object(row, "the item", number, source)


def _object(value: Any, what: str, number: int, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        problem = f"{what} is valid JSON but not an object: it is a {type(value).__name__}."
        raise UserError(problem, remedy='A row looks like {"prompt": ...}.', file=source, row=number)
    return value


def _read_csv(file: Iterable[bytes], source: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is short for a conversation
    reader = csv.DictReader(
        (line.decode("utf-8-sig" if not i else "utf-8") for i, line in enumerate(file)), strict=True
    )
    number = 0
    try:
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                columns = len(reader.fieldnames or ())
                problem = f"the row that ends on line {reader.line_num} has not {columns} cells, as the header has."
                raise UserError(problem, file=source, row=number)
            yield row
    except csv.Error as error:
        problem = f"the row that ends on line {reader.line_num} is not valid CSV: {error}."
        raise UserError(problem, file=source, row=number + 1) from error


def _read_parquet(file: Any, source: str) -> Iterator[dict[str, Any]]:
    import pyarrow as pa
    import pyarrow.parquet
    from datasets import Dataset
    from datasets.table import InMemoryTable

    try:
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
            yield from map(dict, Dataset(InMemoryTable(pa.Table.from_batches([batch]))))
    except pa.ArrowException as error:
        raise UserError(f"cannot be read: {reason(error)}", file=source) from error


READERS: dict[str, Callable[[Any, str], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
