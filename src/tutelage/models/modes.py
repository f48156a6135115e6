"""How a model computes: its precision, dropout, adapters under autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from inspect import ismethod
from types import MethodType
from typing import Any, cast

import torch
from accelerate.utils.operations import ConvertOutputsToFp32
from peft.helpers import disable_input_dtype_casting
from torch import nn
from transformers import PreTrainedModel

from tutelage.models.loading import base_causal_lm
from tutelage.models.precision import MEMORY_SHARE, available_memory

__all__ = [
    "adapters_under_autocast",
    "evaluation_mode",
    "exact_float32",
    "in_float32",
    "own_forward",
    "precision",
    "without_dropout",
]


def precision(base: PreTrainedModel) -> torch.dtype:
    """The precision the model computes in: autocast's if it is on, else that of the weights."""
    device = base.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else base.dtype


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Context with dropout off; the model's mode is restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def exact_float32() -> Iterator[None]:
    """Within, products of float32 numbers are computed in float32, where the user allows TF32 or bfloat16 for them.

    TF32 keeps 10 of 23 bits: two ways to compute the same log-prob then differ by some 1e-3 nats.
    """
    backends = cast(Any, torch.backends)
    if not hasattr(backends, "fp32_precision"):  # torch before 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    switches = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
    before = [switch.fp32_precision for switch in switches]
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = "none"  # so that a value that came from the general setting goes on following it
            if switch.fp32_precision != value:
                switch.fp32_precision = value


def own_forward(model: nn.Module) -> Callable[..., Any]:
    """The model's forward without the autocast that accelerate puts around it, and with whatever else stands there."""
    outer = model.forward
    outputs_to_float32 = getattr(outer, "__wrapped__", None)
    if not isinstance(outputs_to_float32, ConvertOutputsToFp32):
        return outer
    with_autocast = cast(Any, outputs_to_float32).__wrapped__
    inner = with_autocast.__wrapped__
    return MethodType(inner, model) if ismethod(outer) else inner


@contextmanager
def in_float32(base: PreTrainedModel) -> Iterator[None]:
    """Within, a model of 16-bit weights or under autocast computes in float32: a wrong mask cannot hide behind rounding,
    and rounding does not pass for one.

    The same weights come back afterwards. Nothing changes for quantized weights, for kinds of attention that know no
    float32, and where there is no memory for it. Call ``own_forward``: accelerate puts a forward with autocast on
    the model.
    """
    tensors = [t for t in (*base.parameters(), *base.buffers()) if t.dtype in (torch.bfloat16, torch.float16)]
    able = base.config._attn_implementation in ("sdpa", "eager", None) and not getattr(base, "is_quantized", False)
    if not able or 4 * sum(t.numel() for t in tensors) > MEMORY_SHARE * available_memory(base.device):
        yield
        return
    saved = [(tensor, tensor.data) for tensor in tensors]
    try:
        for tensor, data in saved:
            tensor.data = data.float()
        with torch.autocast(base.device.type, enabled=False):
            yield
    finally:
        for tensor, data in saved:
            tensor.data = data


@contextmanager
def adapters_under_autocast(
    model: nn.Module, autocast: Callable[[], AbstractContextManager[object]] = nullcontext
) -> Iterator[None]:
    """Context in which adapters do not cast their input if autocast chooses the precision.

    Otherwise peft casts it to the adapter's float32 and autocast casts it back: two needless copies of every
    activation. A backward pass belongs inside too, where it computes activations anew.

    Args:
        autocast: of what will run in it, if that is not on yet.
    """
    with autocast():
        active = torch.is_autocast_enabled(base_causal_lm(model).device.type)
    with disable_input_dtype_casting(model, active=active):
        yield


@contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Context without dropout although the model stays in training mode, which activation checkpointing needs."""
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
