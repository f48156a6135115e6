"""What a run costs in memory, and the settings that a reader needs to run it again."""

from __future__ import annotations

import gc
import math
import os
import resource
import sys
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

__all__ = ["peak_memory_bytes", "reset_peak_memory", "run_settings", "shown_settings"]

_TRAINING_FIELDS = (
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "optim",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "max_grad_norm",
)


def peak_memory_bytes() -> int | None:
    """Most memory the process has held: of the accelerator where there is one, else resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status", encoding="ascii") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM:"))
    except OSError:  # no Linux
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def reset_peak_memory() -> None:
    """Start measuring anew, where the system can: on an accelerator and on Linux."""
    gc.collect()  # an earlier trainer and its model hold each other
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        with open("/proc/self/clear_refs", "w", encoding="ascii") as file:
            file.write("5")


def shown_settings(kind: type[TrainingArguments]) -> list[str]:
    """The settings that a reader is shown: the algorithm's own fields, then the optimizer's."""
    own = [n for cls in kind.__mro__ if cls.__module__.startswith("tutelage.") for n in cls.__annotations__]
    known = {entry.name for entry in fields(kind)}  # no class variable
    return [name for name in dict.fromkeys([*own, *_TRAINING_FIELDS]) if name in known]


def run_settings(args: TrainingArguments, model: nn.Module) -> dict[str, Any]:
    """What a reader needs to run it again: the algorithm's own fields, the optimizer's and the adapter's."""
    names = shown_settings(type(args))
    settings = {name: _plain(getattr(args, name)) for name in names}
    for adapter in getattr(model, "peft_config", {}).values():
        settings |= {"adapter": str(adapter.peft_type.value), "lora_r": getattr(adapter, "r", None)}
        settings["lora_alpha"] = getattr(adapter, "lora_alpha", None)
    return settings


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return value[0] if len(value) == 1 else list(value)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    return value if isinstance(value, (str, int, float, bool, type(None))) else getattr(value, "value", str(value))
