"""Read rows of JSON, CSV and Parquet files; nothing but the standard library is imported until it is needed."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
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
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            empty = empty or number
            continue
        if empty:  # else the numbers of rows and lines would drift apart
            raise UserError(f"line {empty} is empty.", remedy="Delete it.", file=source, row=empty)
        text = _text(line, source, line=number, row=number).rstrip("\r\n")
        row = _decoded(_DECODER.decode, text, number, number, source)
        yield _object(row, f"line {number}", number, source)


def _read_json(file: Any, source: str) -> Iterator[dict[str, Any]]:
    content = file.read().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from _read_json_lines(io.BytesIO(content), source)
        return
    yield from _items(_text(content, source), source)


def _items(text: str, source: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON list, one after the other, so that an error knows which one it is in."""
    number, line, counted = 0, 1, 0
    place = _past_space(text, text.index("[") + 1)
    while number or text[place : place + 1] != "]":
        number += 1
        line, counted = line + text.count("\n", counted, place), place
        row, end = _decoded(_DECODER.raw_decode, text, line, number, source, place)
        yield _object(row, "the item", number, source)
        place = _past_space(text, end)
        if text[place : place + 1] == "]":
            break
        if text[place : place + 1] != ",":
            line += text.count("\n", counted, place)
            problem = f"line {line}: the item is followed neither by ',' nor by ']'."
            raise UserError(problem, remedy="The file holds one list of objects.", file=source, row=number)
        place = _past_space(text, place + 1)
    if text[place + 1 :].strip():
        raise UserError("something follows the list.", remedy="The file holds one list of objects.", file=source)


_SPACE = re.compile(r"[ \t\n\r]*")


def _past_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _no_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {double!r} stands twice in one object")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_no_doubles)


def _decoded(decode: Callable[..., Any], text: str, line: int, number: int, source: str, *place: int) -> Any:
    """What ``decode`` makes of a JSON text; ``line`` is the one that the value begins on."""
    try:
        return decode(text, *place)
    except json.JSONDecodeError as error:
        line += text.count("\n", place[0] if place else 0, error.pos)
        problem = f"line {line} is not valid JSON: {error.msg} at column {error.colno}."
    except RecursionError:
        problem = f"line {line} nests lists or objects too deeply."
    except ValueError as error:  # a name twice, or a number of thousands of digits
        problem = f"line {line} cannot be read: {str(error).split(';')[0]}."
    raise UserError(problem, remedy="A row is one JSON object.", file=source, row=number)


def _text(content: bytes, source: str, *, line: int | None = None, row: int | None = None) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = line or content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"line {line} is not UTF-8 text: {error.reason}.", remedy="Save the file as UTF-8.", file=source, row=row
        ) from error


def _object(value: Any, what: str, number: int, source: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        problem = f"{what} is valid JSON but not an object: it is a {type(value).__name__}."
        raise UserError(problem, remedy='A row looks like {"prompt": ...}.', file=source, row=number)
    return value


def _read_csv(file: Iterable[bytes], source: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default of 128 KiB is short for a conversation
    lines = (
        _text(line if number > 1 else line.removeprefix(codecs.BOM_UTF8), source, line=number)
        for number, line in enumerate(file, start=1)
    )
    reader = csv.DictReader(lines, strict=True)
    number = 0
    try:
        names = list(reader.fieldnames or ())
        if double := next((name for name in names if names.count(name) > 1), None):
            raise UserError(f"the header has the column '{double}' twice.", remedy="Rename one.", file=source)
        for number, row in enumerate(reader, start=1):
            if None in row or None in row.values():
                problem = f"the row that ends on line {reader.line_num} has not {len(names)} cells, as the header has."
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
