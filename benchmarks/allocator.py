"""What glibc does with freed memory: how fast a side on a CPU is hangs on it.

A freed tensor of megabytes goes back to the kernel at glibc's defaults, and the next one is paid for in page faults. Our steps on a
vocabulary of 262,144 take twice as long so, and TRL's twice as long even where only pieces of over 32 MiB go back. No side's own
settings reach that; the comparisons give each side what it is fastest with, and ``--peer_allocator installed`` shows the peers
as they are without.
"""

from __future__ import annotations

import ctypes

from tutelage.memory import keep_freed_memory

__all__ = ["ALLOCATORS", "use_allocator"]

ALLOCATORS = ("kept", "unmapped", "installed")
"""``kept``: what our sampler and trainers ask for, freed memory below 32 MiB stays. ``unmapped``: all of it stays, without a bound,
which is best for training on large logits; ``generate`` grew under it. ``installed``: glibc's defaults."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
_MMAP_MAX = 65_536  # glibc's default
_stays = False


def use_allocator(name: str) -> None:
    """Have this process use one of ``ALLOCATORS`` from here on; one that began with ``installed`` stays with it."""
    global _stays
    _stays = _stays or name == "installed"
    if _stays:
        return
    keep_freed_memory()
    ctypes.CDLL(None).mallopt(_M_MMAP_MAX, 0 if name == "unmapped" else _MMAP_MAX)
