"""Load datasets from files, folders and the hub, with errors that name the broken line."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset
from datasets.table import InMemoryTable

from tutelage.data.readers import extension, looks_like_path, missing, open_file, read_file, reason, require_readable
from tutelage.errors import UserError

__all__ = ["load_dataset"]


def load_dataset(
    name_or_path: str | Path, *, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load a dataset from the hub, a folder, or a .json, .jsonl, .csv or .parquet file (each also .gz).

    A file has one split, ``train``, and, unless streaming, parts of it: ``train[:90%]``. JSON and CSV files are read
    here and not by ``datasets``, which would turn text that looks like a date or a number into one, and cannot say
    which line is broken. They are held in memory; ``streaming`` reads them line by line.

    Args:
        name_or_path: an existing path, else the name of a dataset on the hub.
        config_name: the hub dataset's configuration.
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
    elif looks_like_path(source):
        raise missing(source)
    else:
        dataset = _load_with_library(source, config_name, split, streaming)
    if next(iter(dataset), None) is None:
        raise UserError("the dataset is empty.", remedy="It needs at least one row.", file=source)
    return dataset


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    require_readable(path)
    if streaming:
        if split != "train":
            raise UserError(f"a streamed file has the one split 'train', not '{split}'.", file=str(path))
        return IterableDataset.from_generator(read_file, gen_kwargs={"path": path})
    try:
        if extension(path) == ".parquet":
            with open_file(path) as file:
                dataset = Dataset(InMemoryTable(pyarrow.parquet.read_table(file)))
        else:
            dataset = _in_columns(read_file(path), str(path))
    except UserError:
        raise
    except (pa.ArrowException, OSError, EOFError, zlib.error, TypeError, ValueError, OverflowError) as error:
        raise UserError(f"cannot be read as a table: {reason(error)}", file=str(path)) from error
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
            f"there is no split '{split}': {reason(error)}",
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
        raise UserError(f"cannot be loaded: {reason(error)}", file=str(path)) from error
    if isinstance(saved, DatasetDict):
        if split not in saved:
            raise UserError(f"there is no split '{split}', only {', '.join(map(str, saved))}.", file=str(path))
        saved = saved[split]
    elif split != "train":
        raise UserError(f"the folder holds one dataset without splits; there is no split '{split}'.", file=str(path))
    return saved.to_iterable_dataset() if streaming else saved


def _load_with_library(name: str, config_name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    try:
        return datasets.load_dataset(name, config_name, split=split, streaming=streaming)
    except Exception as error:  # the library lets through whatever the network, the parsers and its scripts raise
        for file in sorted(Path(name).rglob("*")):
            if extension(file) == ".jsonl":
                list(read_file(file))  # names the broken line, if that is the reason
        where = "the folder" if Path(name).is_dir() else "there is no such file or folder, and from the hub it"
        raise UserError(
            f"{where} cannot be loaded: {reason(error)}",
            remedy="Check the name, the configuration and the split.",
            file=name,
        ) from error
