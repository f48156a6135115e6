"""Which precision a machine computes in: measured on products of the model's own shape, not assumed.

bfloat16 halves memory, and where a processor has instructions for it, it is faster than float32. Where it has none, it
is emulated and several times slower. CUDA cards say which they are; a CPU is asked by timing a few small products.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import find_adapter_config_file

from tutelage.launch import is_distributed
from tutelage.models.paths import run_part

__all__ = [
    "ModelSize",
    "Precision",
    "available_memory",
    "choose_precision",
    "fits_in_float32",
    "given_precision",
    "measure_products",
    "model_size",
]

FASTER = 1.2
"""float32 is taken where bfloat16 takes more than this many times as long: noise stays below it, and emulation lies at
3 to 20."""

MEMORY_SHARE = 0.5
"""Weights may take this share of the memory that is free; activations, gradients and the optimizer need the rest."""

_TOKENS = 16
_CALLS, _ENOUGH = 8, 0.05  # so many calls of a product, or seconds of it
_LARGEST = 1024  # rows and columns of a measured product: beyond it the ratio stays, and emulation takes seconds


@dataclass(frozen=True, slots=True)
class ModelSize:
    """What a model's products look like.

    Attributes:
        hidden, intermediate, vocabulary: widths of its layers, of their feed-forward part, and of its head.
        parameters: number of weights; None if unknown.
        stored: precision they are stored in; None if unknown.
    """

    hidden: int
    intermediate: int
    vocabulary: int
    parameters: int | None = None
    stored: torch.dtype | None = None


TYPICAL = ModelSize(hidden=1024, intermediate=4096, vocabulary=32768)
"""What is measured where the model is not known yet."""


@dataclass(frozen=True, slots=True)
class Precision:
    """What is computed in, and why.

    Attributes:
        dtype: of matrix products. Any but float32 is autocast's.
        weights: what frozen weights are loaded in; ``"auto"`` is the stored precision.
        reason: for people, with the measured times where it was measured.
    """

    dtype: torch.dtype
    weights: torch.dtype | Literal["auto"]
    reason: str

    def __str__(self) -> str:
        return f"{_name(self.dtype)} ({self.reason})"

    def autocast(self, device: torch.device | str) -> torch.autocast:
        """A context in which products are computed in this precision, as in training."""
        return torch.autocast(torch.device(device).type, self.dtype, enabled=self.dtype is not torch.float32)


def choose_precision(
    size: ModelSize | None = None, *, device: torch.device | str | None = None, frozen: bool = False
) -> Precision:
    """The precision that this machine computes a model's products fastest in.

    On CUDA it is bfloat16 where the card has it in hardware, else float32 (``--fp16`` is the user's word, because its
    loss scaling changes training). Elsewhere a few products are timed, once per process: bfloat16 is taken unless it
    takes more than ``FASTER`` times as long as float32. Several processes would each time for themselves, and compute in float32.

    Args:
        size: of the model; by default a typical one.
        device: by default the accelerator, else the CPU.
        frozen: the weights are frozen and could stay in their stored precision. Computing in float32 then needs them
            in float32; where they would take more than ``MEMORY_SHARE`` of the free memory, bfloat16 stays.
    """
    device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    if device.type == "cuda":
        card = torch.cuda.get_device_name(device)
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return Precision(torch.bfloat16, "auto", f"{card} has it in hardware")
        reason = f"{card} has no bfloat16 in hardware"
    elif is_distributed():
        # Each process would time for itself, and they must agree.
        return Precision(torch.float32, torch.float32, "several processes; --bf16 asks for bfloat16")
    else:
        times = measure_products(size or TYPICAL, device)
        wide, half = times[torch.float32], times[torch.bfloat16]
        if half <= FASTER * wide:
            return Precision(torch.bfloat16, "auto", f"a product takes {_ms(half)}, in float32 {_ms(wide)}")
        reason = f"a product takes {_ms(wide)}, in bfloat16 {_ms(half)}"
    if frozen and size is not None and not fits_in_float32(size, device):
        needed, free = 4 * (size.parameters or 0), available_memory(device)
        slow = f"float32 is faster, but its weights need {_gb(needed)} and {_gb(free)} are free"
        return Precision(torch.bfloat16, "auto", f"{slow}; {reason}")
    return Precision(torch.float32, torch.float32, reason)


def given_precision(
    dtype: torch.dtype | Literal["auto"], setting: str, stored: torch.dtype | None = None
) -> Precision:
    """The precision that the user asked for.

    Args:
        dtype: what was asked for; ``"auto"`` is the stored precision.
        setting: the name of the setting, for ``reason``.
        stored: the stored precision, where it is known.
    """
    computed = (stored or torch.bfloat16) if dtype == "auto" else dtype
    return Precision(computed, dtype, f"as {setting} says")


@lru_cache
def measure_products(size: ModelSize, device: torch.device) -> dict[torch.dtype, float]:
    """Seconds that a few products of a model's shape take in float32 and in bfloat16; milliseconds, once per process.

    They are the forward products and those of the gradient by the input, for a few tokens, of a feed-forward layer and
    of a slice of the head, on one thread; large ones are measured in part, which leaves the ratio as it is.
    """
    hidden, intermediate, head = (min(n, _LARGEST) for n in (size.hidden, size.intermediate, size.vocabulary))
    times = {torch.float32: 0.0, torch.bfloat16: 0.0}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # threads that wait for one another on a busy machine would be most of what is measured
    try:
        for inner, outer in ((hidden, intermediate), (intermediate, hidden), (hidden, head)):
            for dtype in times:
                options = {"dtype": dtype, "device": device}
                x, y = torch.ones(_TOKENS, inner, **options), torch.ones(_TOKENS, outer, **options)
                weight = torch.ones(outer, inner, **options)
                times[dtype] += _fastest(lambda x=x, weight=weight: x @ weight.T, device)
                times[dtype] += _fastest(lambda y=y, weight=weight: y @ weight, device)
    finally:
        torch.set_num_threads(threads)
    return times


def _fastest(run: Callable[[], object], device: torch.device) -> float:
    """Seconds of the fastest of some calls: what else the machine does can only slow them down."""
    seconds: list[float] = []
    while len(seconds) < _CALLS and sum(seconds) < _ENOUGH:
        begun = time.perf_counter()
        run()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        seconds.append(time.perf_counter() - begun)
    return min(seconds)


def model_size(name_or_path: str, *, revision: str = "main", trust_remote_code: bool = False) -> ModelSize | None:
    """Sizes of a model, from its config alone; of an adapter's base. None where that does not tell.

    No weights are read: the model is built on the meta device.
    """
    name = run_part(name_or_path, "policy")
    try:
        if adapter := find_adapter_config_file(name, revision=revision):
            name = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"]
            revision = "main"
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # whatever is wrong with it, loading the model says it with a remedy
        return None
    text = config.get_text_config()
    hidden = getattr(text, "hidden_size", TYPICAL.hidden)
    return ModelSize(
        hidden=hidden,
        intermediate=getattr(text, "intermediate_size", None) or 4 * hidden,
        vocabulary=getattr(text, "vocab_size", TYPICAL.vocabulary),
        parameters=model.num_parameters(),
        stored=config.dtype if isinstance(config.dtype, torch.dtype) else None,
    )


def fits_in_float32(size: ModelSize, device: torch.device | str | None = None) -> bool:
    """Whether the model's weights in float32 take no more than ``MEMORY_SHARE`` of the free memory; True if unknown."""
    device = torch.device(device or torch.accelerator.current_accelerator() or "cpu")
    return 4 * (size.parameters or 0) <= MEMORY_SHARE * available_memory(device)


def available_memory(device: torch.device | str = "cpu") -> int:
    """Bytes that may still be taken on a device; on the CPU within the limit of a container, if there is one."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = psutil.virtual_memory().available
    limit, used = _cgroup("memory.max"), _cgroup("memory.current")
    return free if limit is None or used is None else min(free, max(0, limit - used))


def _cgroup(name: str) -> int | None:
    """A number of the control group that a container runs in; None without one, or without a limit."""
    try:
        return int(Path(os.sep, "sys", "fs", "cgroup", name).read_text(encoding="ascii"))
    except (OSError, ValueError):
        return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _ms(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms"


def _gb(size: float) -> str:
    return f"{size / 1e9:.1f} GB"
