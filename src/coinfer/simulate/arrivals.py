"""When requests come, in seconds from the start: at a period, by chance, or as recorded."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError


def periodic(period_s: float, count: int, *, start_s: float = 0.0) -> NDArray[np.float64]:
    """(count,) one request every `period_s`.

    Raises:
        PlanError: a period or start below 0, or no request at all.

    >>> periodic(0.5, 3).tolist()
    [0.0, 0.5, 1.0]
    """
    if not period_s >= 0 or not start_s >= 0 or count < 1:
        given = f"period {period_s}, start {start_s}, {count} requests"
        raise PlanError(f"arrivals need a period and a start of 0 s or more and at least one request, got {given}")
    return start_s + period_s * np.arange(count, dtype=np.float64)


def poisson(rate_hz: float, count: int, *, seed: int = 0) -> NDArray[np.float64]:
    """(count,) requests that come independently of each other, `rate_hz` a second in the mean.

    Raises:
        PlanError: a rate of 0 or below, or no request at all.
    """
    if not rate_hz > 0 or count < 1:
        raise PlanError(f"arrivals need a rate above 0 and at least one request, got {rate_hz} a second, {count}")
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_hz, count))


def recorded(times_s: Sequence[float]) -> NDArray[np.float64]:
    """(N,) the times that were recorded.

    Raises:
        PlanError: none, or times that are below 0 or fall.
    """
    times = np.asarray(times_s, np.float64)
    if times.ndim != 1 or not len(times) or not (times >= 0).all() or (np.diff(times) < 0).any():
        raise PlanError(f"recorded arrivals must be times of 0 s or more that do not fall, got {times_s!r:.60}")
    return times
