"""How a model computes: its precision, dropout, adapters under autocast."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import PreTrainedModel

from tutelage.models.loading import base_causal_lm

__all__ = [
    "adapters_under_autocast",
    "evaluation_mode",
    "precision",
    "without_dropout",
]


def precision(base: PreTrainedModel) -> torch.dtype:
    """What the model computes in: autocast's precision where that is on, else its weights'."""
    device = base.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Dropout off within, the model's mode restored after."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def adapters_under_autocast(model: nn.Module) -> Iterator[None]:
    """Within, adapters take their input as it comes where autocast chooses the precision.

    peft casts it to the adapter's float32, and autocast back: two copies of every activation for the same numbers.
    """
    active = torch.is_autocast_enabled(base_causal_lm(model).device.type)
    with disable_input_dtype_casting(model, active=active):
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Within, the model drops nothing even in training mode, which activation checkpointing needs."""
    saved = [
        (module, name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, float) and (name == "p" if isinstance(module, nn.Dropout) else "dropout" in name)
    ]
    for module, name, _ in saved:
        setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
