"""How two given models are extrapolated: as whole models, or by an adapter's own weights."""

from __future__ import annotations

from pathlib import Path

import torch

from tutelage.errors import UserError
from tutelage.models.extrapolation.adapters import JoinedAdapters, ScaledAdapter
from tutelage.models.extrapolation.source import local_folder
from tutelage.models.extrapolation.whole import WholeModels
from tutelage.models.loading import require_base
from tutelage.models.stored import StoredWeights, is_adapter

__all__ = ["Extrapolation", "find_extrapolation"]

Extrapolation = WholeModels | ScaledAdapter | JoinedAdapters


def find_extrapolation(
    start: str, aligned: str, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> Extrapolation:
    """What extrapolates two models, having checked that they are two states of one.

    Args:
        start, aligned: θ₀ and θ₁: hub names, or folders of models, of adapters or of runs. An adapter goes with its base, or with an
            adapter on the same base.
        dtype: precision of what is written; by default the stored one.
        trust_remote_code: allow code that comes with the models, to build a config and an empty model.

    Raises:
        UserError: a model cannot be found or read, or the two do not belong together.
    """
    folders = {"start": local_folder(start, field="start"), "aligned": local_folder(aligned, field="aligned")}
    adapters = {field: is_adapter(folder) for field, folder in folders.items()}
    if not any(adapters.values()):
        return WholeModels(folders["start"], folders["aligned"], dtype=dtype, trust_remote_code=trust_remote_code)
    if not adapters["aligned"]:
        raise UserError(
            "is an adapter, and the aligned model is a whole one.",
            remedy="Merge it into its base (merge_and_unload, save_pretrained) and give the whole model.",
            file=start,
            field="start",
        )
    aligned_base = _base(folders["aligned"], "aligned", trust_remote_code)
    if adapters["start"]:
        start_base = _base(folders["start"], "start", trust_remote_code)
        _require_same_model(start_base, aligned_base, start, "is an adapter of another base than the aligned one's")
        return JoinedAdapters(folders["start"], folders["aligned"], dtype=dtype)
    _require_same_model(
        folders["start"], aligned_base, start, "is not the model that the aligned adapter was trained on"
    )
    return ScaledAdapter(folders["start"], folders["aligned"], dtype=dtype)


def _base(folder: Path, field: str, trust_remote_code: bool) -> Path:
    config = require_base(str(folder), field=field, trust_remote_code=trust_remote_code)
    return local_folder(str(config.base_model_name_or_path), field=field, revision=config.revision)


def _require_same_model(one: Path, other: Path, name: str, problem: str) -> None:
    """Raise ``UserError`` where two folders hold different weights; those of one folder are not read."""
    if one.resolve() == other.resolve():
        return
    found, expected = (StoredWeights(folder, field="start") for folder in (one, other))
    if found.tensors.keys() == expected.tensors.keys() and all(
        found.tensors[each].dtype == expected.tensors[each].dtype
        and torch.equal(found.read(each), expected.read(each))
        for each in found.tensors
    ):
        return
    raise UserError(
        f"{problem}, {other}.",
        remedy="Give that model, an adapter on it, or both models whole (merge_and_unload, save_pretrained).",
        file=name,
        field="start",
    )
