"""What the machine is told before it trains."""

import platform
import subprocess
import sys

import pytest

# The page faults of twenty rounds that ask for 48 MB, fill them, and free them.
FAULTS = """
import resource, torch
from coinfer.compress.hardware import keep_freed_memory

assert keep_freed_memory()
def step(): torch.empty(12_000_000).fill_(1.0)
for _ in range(10): step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have settings of their own")
def test_memory_that_is_freed_is_kept_for_the_next_step() -> None:
    plain = FAULTS.replace("assert keep_freed_memory()", "assert True")
    freed, kept = (
        int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
        for code in (plain, FAULTS)
    )
    pages = 20 * 48_000_000 // (2 << 20)
    assert kept < pages <= freed
