"""Settings of the C library's memory allocator, and errors of all allocators."""

from __future__ import annotations

import ctypes
import re

__all__ = ["is_out_of_memory", "keep_freed_memory"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_LARGEST = 32 * 2**20  # bytes; glibc takes no larger threshold


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: of Python, of an accelerator, or of torch on a CPU, which has no class for it."""
    known = isinstance(error, MemoryError) or type(error).__name__ in (
        "OutOfMemoryError",
        "AcceleratorOutOfMemoryError",
    )
    return known or (isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error))))


_NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory", re.IGNORECASE)


def keep_freed_memory() -> bool:
    """Make glibc keep freed memory for the next tensor, instead of returning it to the kernel and requesting it again.

    Decoding and training on a CPU allocate and free megabytes about a hundred times per step; with glibc's defaults a
    third to a half of the time is page faults. No result changes. The process keeps freed memory until it exits.
    Blocks over 32 MiB are still mapped individually: on the heap they would leave holes that the next one does not fit
    in, and the heap would grow without bound.

    Returns:
        whether the C library accepted the setting: True with glibc, False elsewhere.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
