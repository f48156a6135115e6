"""Weights on disk, read and written a part of a tensor at a time: a model of any size takes little memory."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from tutelage.errors import UserError
from tutelage.files import read_json, storing
from tutelage.models.adapters import ADAPTER_FILE
from tutelage.models.paths import first_line

__all__ = ["INDEX", "StoredTensor", "StoredWeights", "is_adapter", "weight_files", "write_tensors"]

INDEX = "model.safetensors.index.json"
"""File that says which shard holds which tensor."""

_WHOLE = "model.safetensors"
_PICKLES = ("pytorch_model*.bin", "adapter_model.bin", "*.pt", "*.pth", "consolidated*.bin")

# Names of safetensors' types, see its documentation of the format.
_TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in _TYPES.items()}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file.

    Attributes:
        file: name of the file.
        dtype, shape: as they are stored.
    """

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """What its numbers take."""
        return math.prod(self.shape) * self.dtype.itemsize


class StoredWeights:
    """The safetensors of a model or of an adapter; a tensor is read when it is asked for.

    Attributes:
        folder: where they are.
        files: their names, in order.
        tensors: what they hold, by name.
        metadata: of each file, by its name.
        sharded: whether an index names the files.

    Args:
        folder: of a model or of an adapter.
        field: the setting that names it, for errors.

    Raises:
        UserError: there are none, or pickled ones; a file is damaged, or is not as the index says.
    """

    def __init__(self, folder: Path, *, field: str = "model_name_or_path"):
        self.folder, self.field = folder, field
        self.files = weight_files(folder, field=field)
        placed = _index(folder, field)
        self.sharded = placed is not None
        self.tensors: dict[str, StoredTensor] = {}
        self.metadata: dict[str, dict[str, str]] = {}
        self._open: dict[str, Any] = {}
        for file in self.files:
            self._read_header(file)
        if placed is not None:
            self._require_placed(placed)

    def read(self, name: str) -> Tensor:
        """The tensor of a name that is in ``tensors``, as it is stored, on the CPU."""
        return self._open[self.tensors[name].file].get_tensor(name)

    def parts(self, name: str) -> Iterator[Tensor]:
        """A tensor by rows, some millions of numbers at a time; tensors of one shape come in the same parts."""
        tensor = self.tensors[name]
        if not tensor.shape or math.prod(tensor.shape) <= _AT_ONCE:
            yield self.read(name)
            return
        rows = max(1, _AT_ONCE // max(1, math.prod(tensor.shape[1:])))
        opened = self._open[tensor.file].get_slice(name)
        for begin in range(0, tensor.shape[0], rows):
            yield opened[begin : begin + rows]

    def error(self, problem: str, remedy: str, *, file: str | None = None) -> UserError:
        """An error about these weights."""
        return UserError(
            problem, remedy=remedy, file=str(self.folder / file if file else self.folder), field=self.field
        )

    def _read_header(self, file: str) -> None:
        try:
            self._open[file] = opened = safe_open(self.folder / file, framework="pt")
            self.metadata[file] = dict(opened.metadata() or {})
            for name in opened.keys():  # noqa: SIM118
                part = opened.get_slice(name)
                kind = part.get_dtype()
                if kind not in _TYPES:
                    raise self.error(
                        f"{name} is of the type {kind}, which is not supported.",
                        "Give weights in 16 or 32 bits.",
                        file=file,
                    )
                self.tensors[name] = StoredTensor(file, _TYPES[kind], tuple(part.get_shape()))
        except UserError:
            raise
        except Exception as error:  # safetensors' own, or the system's
            raise self.error(f"cannot be read: {first_line(error)}.", "Copy the folder anew.", file=file) from error

    def _require_placed(self, placed: Mapping[str, str]) -> None:
        for name, file in placed.items():
            if name not in self.tensors or self.tensors[name].file != file:
                raise self.error(f"{name} is not in {file}, where {INDEX} has it.", "Copy the folder anew.")
        if others := self.tensors.keys() - placed.keys():
            raise self.error(f"{min(others)} is not in {INDEX}.", "Copy the folder anew.")


def weight_files(folder: Path, *, field: str = "model_name_or_path") -> list[str]:
    """The names of a model's or an adapter's safetensors, in order. No tensor is read.

    Raises:
        UserError: as ``StoredWeights``.
    """
    placed = _index(folder, field)
    if placed is not None:
        return sorted(set(placed.values()))
    file = ADAPTER_FILE if is_adapter(folder) else _WHOLE
    if (folder / file).is_file():
        return [file]
    pickles = sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            "the weights are pickled, and reading them would run what they hold.",
            remedy="Load the model and save it again: save_pretrained writes safetensors.",
            file=str(folder / pickles[0]),
            field=field,
        )
    raise UserError(
        f"holds no {file}.",
        remedy="Give a model or an adapter that is stored as safetensors.",
        file=str(folder),
        field=field,
    )


def _index(folder: Path, field: str) -> dict[str, str] | None:
    """By tensor, the file that has it; None where there is no index."""
    path = folder / INDEX
    if is_adapter(folder) or not path.is_file():
        return None
    try:
        placed = read_json(path)["weight_map"]
        files = set(placed.values())
        if not files or any(Path(file).name != file for file in files):
            raise ValueError("files outside the folder")
        return placed
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "is no index of shards.", remedy="Copy the folder anew.", file=str(path), field=field
        ) from error


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter rather than a model."""
    return (folder / "adapter_config.json").is_file()


def write_tensors(
    path: Path,
    layout: Mapping[str, StoredTensor],
    parts: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with one part of a tensor in memory at a time.

    Args:
        path: of the file, which must not be there.
        layout: type and shape of each tensor by its name; ``file`` is not read.
        parts: gives the tensor of a name in that type, whole or by rows. It is asked once for each.
        metadata: of the file.

    Raises:
        UserError: the disk does not take it.
    """
    # As safetensors itself orders them: each then starts at a multiple of its element's size.
    names = sorted(layout, key=lambda name: (-layout[name].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        begin, end = end, end + layout[name].bytes
        shape, kind = list(layout[name].shape), _NAMES[layout[name].dtype]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with storing(path), path.open("xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            begin = file.tell()
            for part in parts(name):
                assert part.dtype is layout[name].dtype, name
                for chunk in _bytes(part):
                    file.write(chunk)
            assert file.tell() - begin == layout[name].bytes, name
        file.flush()
        os.fsync(file.fileno())


def _bytes(value: Tensor) -> Iterator[memoryview]:
    flat = value.detach().cpu().contiguous().reshape(-1)
    parts: Sequence[Tensor] = flat.view(torch.uint8).split(_CHUNK) if flat.numel() else ()
    return (part.numpy().data for part in parts)


_CHUNK = 2**26  # bytes that are written at once
_AT_ONCE = 2**23  # numbers of a tensor that are read at once
