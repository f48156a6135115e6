"""What the process asks of the C library's allocator."""

from __future__ import annotations

import ctypes

__all__ = ["keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 32 * 2**20  # bytes; glibc takes no larger threshold


def keep_freed_memory() -> bool:
    """Have glibc keep what one tensor freed for the next, instead of handing it to the kernel and asking for it again.

    Decoding and training on a CPU take and free megabytes some hundred times a step; with glibc's defaults a third to a half of
    their time is page faults. No result changes; the process holds what it freed until it ends. Pieces of over 32 MiB are still mapped one by one:
    among small ones they would leave holes that the next of them does not fit in, and the heap would grow without end.

    Returns:
        whether the C library took it: True with glibc, False elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
