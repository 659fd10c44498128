"""Large blocks of a process that never ends are the system's again when they are freed."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest

COUNT = """
import ctypes, sys
from coinfer.runtime.memory import keep_heap_whole
if "kept" in sys.argv:
    keep_heap_whole()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
# glibc begins to take blocks of this size from its heap when the first one is freed.
libc.free(libc.malloc(1 << 20))
class Info(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in "arena ordblks smblks hblks hblkhd a b c d e".split()]
libc.mallinfo2.restype = Info
before = libc.mallinfo2().hblks
libc.malloc(1 << 20)
print(libc.mallinfo2().hblks - before)
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="another C library")
@pytest.mark.parametrize(("options", "num_mapped"), [((), "0"), (("kept",), "1")])
def test_a_large_block_has_pages_of_its_own_after_another_was_freed(options: tuple[str, ...], num_mapped: str) -> None:
    done = subprocess.run([sys.executable, "-c", COUNT, *options], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == num_mapped
