"""Load data sets from files, folders and the hub, with errors that name the broken line."""

from __future__ import annotations

import csv
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.table import InMemoryTable

from tutelage.errors import UserError

__all__ = ["load_dataset"]


def load_dataset(
    name_or_path: str | Path, *, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load a data set from the hub, a folder, or a .json, .jsonl, .csv or .parquet file (each also .gz).

    A file has one split, ``train``, and, unless streaming, parts of it: ``train[:90%]``. JSON and CSV files are read
    here and not by ``datasets``, which would turn text that looks like a date or a number into one, and cannot say
    which line is broken. They are held in memory; ``streaming`` reads them line by line.

    Args:
        name_or_path: an existing path, else the name of a data set on the hub.
        config_name: the hub data set's configuration.
        split: as in ``datasets.load_dataset``.
        streaming: read while iterating instead of up front.

    Raises:
        UserError: nothing is there, it cannot be read, it is empty, or it has no such split. With ``streaming``, a
            broken line raises when it is reached.
    """
    path = Path(name_or_path).expanduser()
    source = str(name_or_path)
    if path.is_file():
        dataset = _load_file(path, split, streaming)
    elif path.is_dir():
        dataset = _load_folder(path, config_name, split, streaming)
    elif _looks_like_path(source):
        raise UserError("this file or folder does not exist.", remedy="Check the path.", file=source)
    else:
        dataset = _load_with_library(source, config_name, split, streaming)
    if next(iter(dataset), None) is None:
        raise UserError("the data set is empty.", remedy="It needs at least one row.", file=source)
    return dataset


def _looks_like_path(name: str) -> bool:
    hub_name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name)
    return hub_name is None or _extension(Path(name)) in _READERS


def _extension(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    if _extension(path) not in _READERS:
        known = ", ".join(_READERS)
        raise UserError(f"unknown kind of file; known are {known}, each also with .gz.", file=str(path))
    if streaming:
        if split != "train":
            raise UserError(f"a streamed file has the one split 'train', not '{split}'.", file=str(path))
        return IterableDataset.from_generator(_read_file, gen_kwargs={"path": path})
    try:
        if _extension(path) == ".parquet":
            with _open(path) as file:
                dataset = Dataset(InMemoryTable(pyarrow.parquet.read_table(file)))
        else:
            dataset = _in_columns(_read_file(path), str(path))
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, zlib.error, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"cannot be read as a table: {_reason(error)}", file=str(path)) from error
    return _take_split(dataset, split, str(path))


def _in_columns(rows: Iterable[Mapping[str, Any]], source: str) -> Dataset:
    rows = list(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        _require_one_type(name, [row.get(name) for row in rows], source)
    return Dataset.from_dict({name: [row.get(name) for row in rows] for name in names}, on_mixed_types="use_json")


def _require_one_type(name: str, values: list[Any], source: str) -> None:
    """Text and numbers in one column would be turned into one another by the table that holds them."""
    numbers = [place for place, value in enumerate(values, start=1) if isinstance(value, (bool, int, float))]
    if numbers and any(isinstance(value, str) for value in values):
        raise UserError(
            f"must be text as in other rows, not {type(values[numbers[0] - 1]).__name__}.",
            remedy="Write it in quotes.",
            file=source,
            row=numbers[0],
            field=name,
        )


def _take_split(dataset: Dataset, split: str, source: str) -> Dataset:
    if split == "train":
        return dataset
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({"train": len(dataset)})
    except ValueError as error:
        raise UserError(
            f"there is no split '{split}': {_reason(error)}",
            remedy="A file has the split 'train' and parts of it, such as 'train[:90%]'.",
            file=source,
        ) from error
    return dataset.select([index for part in parts for index in range(part.from_, part.to)])


def _load_folder(path: Path, config_name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    if not any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_with_library(str(path), config_name, split, streaming)
    try:
        saved = datasets.load_from_disk(str(path))
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot be loaded: {_reason(error)}", file=str(path)) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"there is no split '{split}', only {', '.join(map(str, saved))}.", file=str(path))
        saved = saved[split]
    elif split != "train":
        raise UserError(f"the folder holds one data set without splits; there is no split '{split}'.", file=str(path))
    return saved.to_iterable_dataset() if streaming else saved


def _load_with_library(name: str, config_name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # the library lets through whatever the network, the parsers and its scripts raise
        for file in sorted(Path(name).rglob("*")):
            if _extension(file) == ".jsonl":
                list(_read_file(file))  # names the broken line, if that is the reason
        where = "the folder" if Path(name).is_dir() else "there is no such file or folder, and from the hub it"
        raise UserError(
            f"{where} cannot be loaded: {_reason(error)}",
            remedy="Check the name, the configuration and the split.",
            file=name,
        ) from error


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    message = str(error).strip() or "no reason given"
    return f"{type(error).__name__}: {message.splitlines()[0]}"


def _read_file(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with _open(path) as file:
            yield from _READERS[_extension(path)](file, str(path))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, pa.ArrowException) as error:
        raise UserError(f"cannot be read: {_reason(error)}", file=str(path)) from error


def _open(path: Path) -> Any:
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
    for batch in pyarrow.parquet.ParquetFile(file).iter_batches(batch_size=1000):
        yield from map(dict, Dataset(InMemoryTable(pa.Table.from_batches([batch]))))


_READERS: dict[str, Callable[[Any, str], Iterator[dict[str, Any]]]] = {
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".csv": _read_csv,
    ".parquet": _read_parquet,
}
