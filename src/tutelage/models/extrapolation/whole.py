"""Extrapolating whole models: tensor by tensor, shard by shard."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tutelage.errors import UserError
from tutelage.files import read_json, write_json
from tutelage.models.extrapolation.arithmetic import Tally, extrapolated
from tutelage.models.extrapolation.source import (
    FLOATS,
    copy_for_loaders,
    read_config,
    require_finite,
    require_same_config,
    tied_names,
)
from tutelage.models.stored import INDEX, StoredTensor, StoredWeights, write_tensors

__all__ = ["WholeModels"]


class WholeModels:
    """Two models that are stored whole.

    Attributes:
        route: how they are extrapolated, for people.
        files: names of the weight files that were read, of the start and of the aligned model.

    Args:
        start, aligned: their folders.
        dtype: what to store in; by default each tensor as the aligned model stores it, and at α = −1 as the start does.

    Raises:
        UserError: they are not two states of one model: it names what differs.
    """

    route = "every weight of the whole models"

    def __init__(
        self, start: Path, aligned: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
    ):
        theirs = read_config(start, field="start", trust_remote_code=trust_remote_code)
        ours = read_config(aligned, field="aligned", trust_remote_code=trust_remote_code)
        ties = tied_names(ours, trust_remote_code=trust_remote_code)
        require_same_ties(tied_names(theirs, trust_remote_code=trust_remote_code), ties, start)
        require_same_config(ours, theirs, start)
        self._start, self._aligned = StoredWeights(start, field="start"), StoredWeights(aligned, field="aligned")
        self._dtype = dtype
        self._names = matched(self._start, self._aligned, ties)

    @property
    def files(self) -> tuple[list[Path], list[Path]]:
        start, aligned = ([each.folder / file for file in each.files] for each in (self._start, self._aligned))
        return start, aligned

    def write(self, folder: Path, alpha: float) -> Tally:
        """Write the model at α into a folder: weights in as many files as the aligned model's, and what loaders need.

        Raises:
            UserError: a weight is not finite, or would not be; an integer buffer differs; the two are the same model; the disk
                does not take it.
        """
        tally, size = Tally(), 0
        for file in self._aligned.files:
            layout = {
                name: StoredTensor(file, self._stored_in(name, alpha), tensor.shape)
                for name, tensor in self._aligned.tensors.items()
                if tensor.file == file
            }
            size += sum(tensor.bytes for tensor in layout.values())
            parts = partial(self._parts, alpha=alpha, tally=tally)
            write_tensors(folder / file, layout, parts, self._aligned.metadata[file])
        if self._aligned.sharded:
            index = read_json(self._aligned.folder / INDEX)
            index["metadata"] = {**(index.get("metadata") or {}), "total_size": size}
            write_json(folder / INDEX, index)
        if not tally.differs:
            raise self._start.error(
                "its weights are those of the aligned model: there is no way to go on along.",
                "Give two different models.",
            )
        copy_for_loaders(self._aligned.folder, folder, dtype=self._config_dtype(alpha))
        return tally

    def _stored_in(self, name: str, alpha: float) -> torch.dtype:
        own = self._aligned.tensors[name].dtype
        if own not in FLOATS:
            return own
        return self._dtype or (self._start.tensors[self._names[name]].dtype if alpha == -1 else own)

    def _config_dtype(self, alpha: float) -> str | None:
        """What the config has to say of the precision, if not what the aligned model's does."""
        stored = {self._stored_in(name, alpha) for name in self._names} & set(FLOATS)
        as_aligned = all(self._stored_in(name, alpha) is self._aligned.tensors[name].dtype for name in self._names)
        # Of several, a loader takes the narrow one for all: the first that is not float32.
        return None if as_aligned else str(min(stored, key=lambda dtype: dtype.itemsize)).removeprefix("torch.")

    def _parts(self, name: str, *, alpha: float, tally: Tally) -> Iterator[Tensor]:
        dtype = self._stored_in(name, alpha)
        for aligned, start in zip(self._aligned.parts(name), self._start.parts(self._names[name]), strict=True):
            if aligned.dtype not in FLOATS:
                if not torch.equal(aligned, start):
                    raise self._start.error(
                        f"{name}, which holds no weights but {aligned.dtype}, differs from the aligned model's.",
                        "Give the model that the training of the aligned one started from.",
                    )
                yield aligned
                continue
            require_finite(aligned, name, self._aligned)
            require_finite(start, name, self._start)
            found = extrapolated(aligned, start, alpha, dtype)
            if not torch.isfinite(found).all():
                raise self._aligned.error(
                    f"{name} leaves the range of {dtype} at alpha = {alpha:g}.",
                    "Take a smaller alpha, or --dtype float32.",
                )
            tally.add(aligned, start, alpha, found)
            yield found


def require_same_ties(start: Sequence[tuple[str, ...]], aligned: Sequence[tuple[str, ...]], folder: Path) -> None:
    """Raise ``UserError`` for weights that are one tensor in only one of the two models.

    Args:
        start, aligned: see ``tied_names``.
        folder: of the start.
    """
    for where, other, ties, others in (
        ("start", "aligned model", start, aligned),
        ("aligned model", "start", aligned, start),
    ):
        for group in ties:
            if group not in others:
                raise UserError(
                    f"{' and '.join(group)} are one tensor in the {where} and several in the {other} (tie_word_embeddings).",
                    remedy="Give two models that are tied alike.",
                    file=str(folder / "config.json"),
                    field="start",
                )


def matched(start: StoredWeights, aligned: StoredWeights, ties: Sequence[tuple[str, ...]]) -> dict[str, str]:
    """The names of the aligned model's tensors, and those of the same weights in the start.

    A weight that has several names may be stored under one in one model and under another, or under both, in the other.

    Raises:
        UserError: a tensor is in only one of the two, or of another shape or kind; tied weights are stored with different values.
    """
    group_of = {name: group for group in ties for name in group}
    for weights in (start, aligned):
        for group in ties:
            _require_one(weights, [name for name in group if name in weights.tensors])
    found = {}
    for name in aligned.tensors:
        names = [name, *group_of.get(name, ())]
        found[name] = next((each for each in names if each in start.tensors), "")
    _require_none(aligned, start, [name for name, theirs in found.items() if not theirs], "start")
    seen = {each for theirs in found.values() for each in (theirs, *group_of.get(theirs, ()))}
    _require_none(start, aligned, start.tensors.keys() - seen, "aligned model")
    for name, theirs in found.items():
        require_alike(name, aligned.tensors[name], start.tensors[theirs], start)
    return found


def _require_one(weights: StoredWeights, names: Sequence[str]) -> None:
    for name in names[1:]:
        if not torch.equal(weights.read(names[0]), weights.read(name)):
            raise weights.error(
                f"{names[0]} and {name} are one tensor by the config, and are stored with different values.",
                "Load the model and save it again.",
            )


def _require_none(one: StoredWeights, other: StoredWeights, missing: Collection[str], where: str) -> None:
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise other.error(
            f"{min(missing)}{more} of {one.folder} is not in the {where}.",
            "Give two states of one model: the start and what was trained from it.",
        )


def require_alike(name: str, aligned: StoredTensor, start: StoredTensor, weights: StoredWeights) -> None:
    """Raise ``UserError`` where the two are not one tensor in two states.

    Args:
        weights: of the start.
    """
    remedy = "Give the model that the training of the aligned one started from."
    if aligned.shape != start.shape:
        raise weights.error(
            f"{name} has the shape {list(start.shape)}, and {list(aligned.shape)} in the aligned model.", remedy
        )
    both = {aligned.dtype, start.dtype}
    if not both <= set(FLOATS) and (len(both) > 1 or aligned.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)):
        kinds = " and ".join(sorted(str(dtype).removeprefix("torch.") for dtype in both))
        raise weights.error(
            f"{name} is stored as {kinds}, which cannot be extrapolated.", "Give weights in 16 or 32 bits."
        )
