"""Load datasets from files, folders and the hub, with errors that name the broken line."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import datasets
import pyarrow as pa
import pyarrow.parquet
from datasets import Dataset, DatasetDict, IterableDataset, concatenate_datasets
from datasets.data_files import DataFilesDict, get_data_patterns
from datasets.table import InMemoryTable

from tutelage.data.origin import Origin, numbered
from tutelage.data.readers import (
    READERS,
    extension,
    looks_like_path,
    missing,
    open_file,
    read_file,
    reason,
    require_readable,
)
from tutelage.data.tables import table_of
from tutelage.errors import UserError

__all__ = ["load_dataset"]


def load_dataset(
    name_or_path: str | Path, *, config_name: str | None = None, split: str = "train", streaming: bool = False
) -> Dataset | IterableDataset:
    """Load a dataset from the hub, a folder, or a .json, .jsonl, .csv or .parquet file (each also .gz).

    A file has one split, ``train``; a folder has those that ``datasets`` finds in its names; unless streaming, there
    are parts of them: ``train[:90%]``. JSON and CSV files, alone or in a folder, are read here and not by
    ``datasets``, which would turn text that looks like a number into one, and cannot say which line is broken. They
    are held in memory; ``streaming`` reads them line by line. What is read from them has an attribute ``origin``, with
    which errors name the file and the row in it.

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
    if next(numbered(dataset, source), None) is None:
        raise UserError("the dataset is empty.", remedy="It needs at least one row.", file=source)
    return dataset


def _load_file(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
    require_readable(path)
    if streaming:
        return _stream({"train": [path]}, split, str(path))
    if extension(path) != ".parquet":
        return _in_memory({"train": [path]}, split, str(path))
    try:
        with open_file(path) as file:
            dataset = Dataset(InMemoryTable(pyarrow.parquet.read_table(file)))
    except (pa.ArrowException, OSError, EOFError, zlib.error, TypeError, ValueError) as error:
        raise UserError(f"cannot be read as a table: {reason(error)}", file=str(path)) from error
    return _take_split({"train": dataset}, {"train": [path]}, {"train": [len(dataset)]}, split, str(path))


def _stream(files: Mapping[str, Sequence[Path]], split: str, source: str) -> IterableDataset:
    """The rows of a split's files, read line by line."""
    if split not in files:
        raise UserError(f"a stream has whole splits only, here {', '.join(files)}, and no '{split}'.", file=source)
    # A tuple: a list would be taken for shards, and rows be numbered in each.
    stream = IterableDataset.from_generator(_rows, gen_kwargs={"paths": tuple(files[split])})
    return cast(IterableDataset, _with_origin(stream, Origin(files[split])))


def _in_memory(files: Mapping[str, Sequence[Path]], split: str, source: str) -> Dataset:
    """The rows of a split's files, or of parts of splits."""
    wanted = {part.split("[")[0].strip() for part in split.split("+")}
    tables: dict[str, Dataset] = {}
    lengths: dict[str, list[int]] = {}
    for name in wanted & set(files):
        lengths[name] = [0] * len(files[name])
        try:
            tables[name] = table_of(_counted(files[name], lengths[name]))
        except UserError:
            raise
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise UserError(f"cannot be read as a table: {reason(error)}", file=source) from error
    return _take_split(tables, files, lengths, split, source)


def _rows(paths: Iterable[Path]) -> Iterator[dict[str, Any]]:
    for path in paths:
        yield from read_file(path)


def _counted(paths: Sequence[Path], lengths: list[int]) -> Iterator[dict[str, Any]]:
    for place, path in enumerate(paths):
        for row in read_file(path):
            lengths[place] += 1
            yield row


def _with_origin(dataset: Any, origin: Origin) -> Any:
    dataset.origin = origin
    return dataset


def _take_split(
    tables: Mapping[str, Dataset],
    files: Mapping[str, Sequence[Path]],
    lengths: Mapping[str, Sequence[int]],
    split: str,
    source: str,
) -> Dataset:
    """A split, or parts of splits, with the files and numbers that its rows had."""
    if split in tables:
        return _with_origin(tables[split], Origin(files[split], lengths[split]))
    try:
        parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(tables[name]) for name in tables})
    except (ValueError, KeyError) as error:
        raise UserError(
            f"there is no split '{split}': {reason(error)}",
            remedy=f"There are {', '.join(map(str, files))}, and parts of them, such as 'train[:90%]'.",
            file=source,
        ) from error
    starts, before = {}, 0
    for name in tables:
        starts[name], before = before, before + len(tables[name])
    places = [starts[part.splitname] + index for part in parts for index in range(part.from_, part.to)]
    whole = concatenate_datasets(list(tables.values()))
    origin = Origin(
        [path for name in tables for path in files[name]], [n for name in tables for n in lengths[name]], places
    )
    return _with_origin(whole.select(places), origin)


def _load_folder(path: Path, config_name: str | None, split: str, streaming: bool) -> Dataset | IterableDataset:
    if any((path / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _load_saved(path, split, streaming)
    files = _files_of_splits(path, config_name)
    kinds = {extension(file) for paths in files.values() for file in paths}
    if not kinds or ".parquet" in kinds:
        return _load_with_library(str(path), config_name, split, streaming)
    return _stream(files, split, str(path)) if streaming else _in_memory(files, split, str(path))


def _files_of_splits(path: Path, config_name: str | None) -> dict[str, list[Path]]:
    """The JSON, CSV and Parquet files of a folder by split, as ``datasets`` tells them apart by their names.

    Raises:
        UserError: Parquet and other files are mixed.
    """
    try:
        if config_name is not None or (path / "README.md").is_file():
            found = datasets.load_dataset_builder(str(path), config_name).config.data_files
        else:
            found = DataFilesDict.from_patterns(get_data_patterns(str(path)), base_path=str(path))
    except Exception:  # reading the folder with the library says what is wrong
        return {}
    files = {
        str(split): [Path(file) for file in paths if extension(Path(file)) in READERS]
        for split, paths in (found or {}).items()
    }
    files = {split: paths for split, paths in files.items() if paths}
    kinds = {extension(file) for paths in files.values() for file in paths}
    if ".parquet" in kinds and len(kinds) > 1:
        raise UserError(
            f"the folder holds files of several types: {', '.join(sorted(kinds))}.",
            remedy="Keep Parquet files in a folder of their own.",
            file=str(path),
        )
    return files


def _load_saved(path: Path, split: str, streaming: bool) -> Dataset | IterableDataset:
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
        where = "the folder" if Path(name).is_dir() else "there is no such file or folder, and from the hub it"
        raise UserError(
            f"{where} cannot be loaded: {reason(error)}",
            remedy="Check the name, the configuration and the split.",
            file=name,
        ) from error
