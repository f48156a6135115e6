"""What glibc does with freed memory: on a CPU the speed of a side depends on it.

A freed tensor of megabytes goes back to the kernel at glibc's defaults, and the next one costs page faults. With
a vocabulary of 262,144 our steps then take twice as long; TRL's do even where only pieces of over 32 MiB go back. No side's own
settings change that. The comparisons give each side the setting that is fastest for it; ``--peer_allocator installed`` shows the
peers at glibc's defaults.
"""

from __future__ import annotations

import ctypes

from tutelage.models.memory import keep_freed_memory

__all__ = ["ALLOCATORS", "allocator_in_use", "switch_allocator", "use_allocator"]

ALLOCATORS = ("kept", "unmapped", "switched", "installed")
"""``kept``: what our sampler and trainers ask for, freed memory below 32 MiB stays. ``unmapped``: all of it stays, without a bound,
which is best for training on large logits; ``generate`` grew under it. ``switched``: a side that samples and trains in turn has
``kept`` for the one and ``unmapped`` for the other. ``installed``: glibc's defaults."""

_M_MMAP_MAX = -4  # of glibc's malloc.h
_MMAP_MAX = 65_536  # glibc's default
_in_use = "installed"


def use_allocator(name: str) -> None:
    """Have this process use one of ``ALLOCATORS`` from here on."""
    global _in_use
    _in_use = name
    if name != "installed":
        keep_freed_memory()
        _keep_large_pieces(name == "unmapped")


def switch_allocator(*, training: bool) -> None:
    """Where this process uses ``switched``: it goes on to train, or to sample."""
    if _in_use == "switched":
        _keep_large_pieces(training)


def allocator_in_use() -> str:
    """Which of ``ALLOCATORS`` this process was told to use."""
    return _in_use


def _keep_large_pieces(keep: bool) -> None:
    ctypes.CDLL(None).mallopt(_M_MMAP_MAX, 0 if keep else _MMAP_MAX)
