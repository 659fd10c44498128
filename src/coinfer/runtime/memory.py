"""Memory of processes that never end."""

from __future__ import annotations

import ctypes
import sys

# As glibc begins with, but for good.
_LARGE_BYTES = 131072
_M_MMAP_THRESHOLD = -3


def keep_heap_whole() -> None:
    """Have the C library give large blocks back to the system when they are freed; for a process's beginning.

    glibc takes blocks of ever larger sizes from its heap once such a block was freed, and what is small lies between
    them for good: an edge whose TLS connections come and go (256 KiB of buffers each) grew by 3.7 % in 8,000 of them.
    Other C libraries are left as they are.
    """
    if sys.platform != "linux":
        return
    try:
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
    except (OSError, AttributeError):
        # No such function here: musl, for one.
        return
