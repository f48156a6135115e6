"""What PyTorch's profiler counts: kernels or operators of a token step, and what takes most of the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

__all__ = ["Entry", "launches", "launches_per_step", "operators", "operators_per_step", "profiled", "top"]

_SHORT, _LONG = 4, 12  # tokens; what the prompts take is in both, and their difference is steps alone
_LAUNCHES = ("cudaLaunchKernel", "cudaLaunchKernelExC", "cuLaunchKernel", "cuLaunchKernelEx", "cudaGraphLaunch")


class Entry(NamedTuple):
    """A kernel or an operator.

    Attributes:
        milliseconds: that the device spent in it; on a CPU those of the operator itself, without what it calls.
        share: of all such.
        count: calls.
    """

    name: str
    milliseconds: float
    share: float
    count: int


def profiled(run: Callable[[], object]) -> Any:
    """Events of a run by name; what is on a GPU has come to its end in it."""
    on_cuda = torch.cuda.is_available()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        run()
        if on_cuda:
            torch.cuda.synchronize()
    return found.key_averages()


def operators(events: Any) -> int:
    """Calls of ATen's operators, those that one makes of others included."""
    return sum(event.count for event in events if event.key.startswith("aten::"))


def launches(events: Any) -> int:
    """Kernels, or graphs of them, that the processor has launched; 0 without a GPU."""
    return sum(event.count for event in events if event.key in _LAUNCHES)


def operators_per_step(side: Callable[[int], object]) -> float:
    """Operators of one more token, by ``side`` from the length of completions; nothing may stop them early."""
    return _per_step(side, operators)


def launches_per_step(side: Callable[[int], object]) -> float:
    """The same of launches."""
    return _per_step(side, launches)


def top(events: Any, count: int = 10) -> list[Entry]:
    """What took most of the time: kernels of a GPU where there were any, else operators of the CPU."""
    kernels = [e for e in events if e.device_type == DeviceType.CUDA and not e.is_user_annotation]

    def time(event: Any) -> float:
        return event.self_device_time_total if kernels else event.self_cpu_time_total

    chosen = kernels or list(events)
    total = sum(map(time, chosen)) or 1.0
    chosen.sort(key=time, reverse=True)
    return [Entry(e.key, time(e) / 1000, time(e) / total, e.count) for e in chosen[:count]]


def _per_step(side: Callable[[int], object], count: Callable[[Any], int]) -> float:
    side(_LONG)  # what is found out once for such lengths is none of a step's
    short, long = (count(profiled(lambda length=length: side(length))) for length in (_SHORT, _LONG))
    return (long - short) / (_LONG - _SHORT)
