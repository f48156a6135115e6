"""Adapters on disk: names by which transformers and peft both find their weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from tutelage.files import replacing_alone

__all__ = ["ADAPTER_FILE", "make_readable_by_both", "named_by_peft", "named_for_both_loaders"]

ADAPTER_FILE = "adapter_model.safetensors"
_MAGNITUDE = "lora_magnitude_vector"  # of DoRA


def named_for_both_loaders(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of an adapter, those of DoRA named as modules name theirs.

    transformers passes over the name that peft gives them, and then computes with the magnitudes of the base; peft reads either.
    """
    return {f"{name}.weight" if name.endswith(_MAGNITUDE) else name: value for name, value in state.items()}


def named_by_peft(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of ``named_for_both_loaders``."""
    end = f"{_MAGNITUDE}.weight"
    return {name.removesuffix(".weight") if name.endswith(end) else name: value for name, value in state.items()}


def make_readable_by_both(folder: Path) -> None:
    """Rename what has to be renamed in an adapter that peft wrote; nothing where there is none."""
    path = folder / ADAPTER_FILE
    if not path.exists():
        return
    state = load_file(path)
    named = named_for_both_loaders(state)
    if named.keys() != state.keys():
        with replacing_alone(path) as temporary:
            save_file(named, temporary, metadata={"format": "pt"})
