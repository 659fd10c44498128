"""How fast a core is at this moment: two small loops of known work, timed beside what is emulated.

The cores of a shared machine change speed with what runs beside them, integer work by up to 2 times and floating
point by up to 1.5 within a minute, each for itself.  An emulated device should not: so what it computed is counted in
the time that its core takes at a reference speed.  Measured on a virtual machine (2 of an EPYC's threads, medians of
15 calls over a minute, 95th over 5th percentile, as they are and by the yardstick of their kind):

    ResNet-20 int8 2.0 and 1.14     ResNet-56 fp32 1.30 and 1.15     scene-resnet fp32 1.38 and 1.10
    WebP 1.51 and 1.19     PNG 1.45 and 1.14     range coder 1.9 and 1.5

Where the loop of integers takes twice as long, int8 segments take 1.5 to 1.65 times as long (ResNet-56, slopes of their
logarithms over 1,000 calls each: 0.51 to 0.58): with `INT8_SHARE` of the loop's logarithm the largest over the smallest
median of 40 calls fell from 1.18 and 1.27 to 1.13 and 1.15.  No better: the same call right before (1.15 to 1.17), a
small quantised convolution (1.20 to 1.23).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Literal

import numpy as np

from ..plan import Value
from .clock import cpu_s, now_s

Work = Literal["fp32", "int8"]
# Small enough for one thread and the first-level cache.
_SIDE, _PRODUCTS = 60, 8
_ADDITIONS = 1500
INT8_SHARE = 0.7


class LoopTimes(Value, frozen=True, kw_only=True):
    """Seconds that each loop takes: the reference that speeds are relative to."""

    fp32_s: float
    int8_s: float


class Yardstick:
    """Speeds of the core that the calling thread runs on, relative to `reference`."""

    def __init__(self, reference: LoopTimes) -> None:
        self.reference = reference
        self._left, self._right = np.random.default_rng(0).random((2, _SIDE, _SIDE), dtype=np.float32)
        self._product = np.empty_like(self._left)

    def speed(self, work: Work) -> float:
        """Reference over now: 0.5 is half as fast as the reference.  Takes some 30 us."""
        if work == "int8":
            return float((self.reference.int8_s / self.loop_s(work)) ** INT8_SHARE)
        return self.reference.fp32_s / self.loop_s(work)

    def loop_s(self, work: Work) -> float:
        """Seconds that a loop takes now."""
        return _timed(_add if work == "int8" else self._multiply)

    def _multiply(self) -> None:
        for _ in range(_PRODUCTS):
            np.dot(self._left, self._right, out=self._product)


def measure_loops(seconds: float = 2.0) -> LoopTimes:
    """The medians of both loops over `seconds`, on the core that the calling thread runs on."""
    yardstick = Yardstick(LoopTimes(fp32_s=1.0, int8_s=1.0))
    loops: dict[Work, list[float]] = {"fp32": [], "int8": []}
    end_s = now_s() + seconds
    while now_s() < end_s or not loops["int8"]:
        for work, seen in loops.items():
            seen.append(yardstick.loop_s(work))
    return LoopTimes(fp32_s=statistics.median(loops["fp32"]), int8_s=statistics.median(loops["int8"]))


def _add() -> int:
    total = 0
    for number in range(_ADDITIONS):
        total += number
    return total


def _timed(call: Callable[[], object]) -> float:
    start_s = cpu_s()
    call()
    return max(cpu_s() - start_s, 1e-9)
