"""Waiting precisely: the one place where the lab sleeps.

A plain sleep on Linux ends 50 to 100 us late, because the kernel may merge timers within a thread's
"timer slack" of 50 us.  A slack of 1 ns brings that down to about 10 us; what remains is spun away where it
matters.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
import time

_PR_SET_TIMERSLACK = 29
SPIN_S = 60e-6
# A signal that the kernel handed to another thread ends no sleep: its handler runs between two.
LONGEST_S = 0.25
# A core that has slept computes up to 1.4 times slower for its first 3 ms.
AWAKE_S = 3e-3
_BUSYWORK = bytes(16384)


def now_s() -> float:
    """Seconds of this process's monotonic clock."""
    return time.perf_counter()


def cpu_s() -> float:
    """Seconds that this thread has computed."""
    return time.thread_time()


def sharpen_sleep() -> bool:
    """Ask the kernel to end this thread's sleeps on time; true where it does (Linux)."""
    if not sys.platform.startswith("linux"):
        return False
    return int(ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)) == 0


def wait_until(deadline_s: float, *, spin_s: float = SPIN_S) -> None:
    """Return at `deadline_s` of `now_s`, never before: sleep, then spin for the last `spin_s`."""
    while (rest_s := deadline_s - now_s()) > spin_s:
        time.sleep(min(rest_s - spin_s, LONGEST_S))
    while now_s() < deadline_s:
        pass


def wait_awake(deadline_s: float) -> None:
    """As `wait_until`, the core computing for the last 3 ms: it is then as fast as a core that never slept.

    Other threads run meanwhile: the work that is done holds no lock of Python's.
    """
    wait_until(deadline_s - AWAKE_S)
    while now_s() < deadline_s - SPIN_S:
        hashlib.sha256(_BUSYWORK).digest()
    wait_until(deadline_s)
