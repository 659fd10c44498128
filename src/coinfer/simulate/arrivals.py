"""When requests come, in seconds from the start: at a period, by chance, or as recorded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError, PlanError


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


def by_chance(duration_s: float, count: int, *, seed: int = 0) -> NDArray[np.float64]:
    """(count,) so many requests at any time of `duration_s`: what `poisson` gives where that many came.

    Raises:
        PlanError: a duration of 0 or below, or no request at all.
    """
    if not duration_s > 0 or count < 1:
        raise PlanError(f"arrivals need a duration above 0 and at least one request, got {duration_s} s, {count}")
    return np.sort(np.random.default_rng(seed).uniform(0, duration_s, count))


def recorded(times_s: Sequence[float]) -> NDArray[np.float64]:
    """(N,) the times that were recorded.

    Raises:
        PlanError: none, or times that are below 0 or fall.
    """
    times = np.asarray(times_s, np.float64)
    if times.ndim != 1 or not len(times) or not (times >= 0).all() or (np.diff(times) < 0).any():
        raise PlanError(f"recorded arrivals must be times of 0 s or more that do not fall, got {times_s!r:.60}")
    return times


def load_arrivals(path: Path) -> NDArray[np.float64]:
    """(N,) the times in a file: seconds, one a line; empty lines and what follows a # do not count.

    Raises:
        DataError: no such file, or a line that is no number.
        PlanError: as `recorded`.
    """
    try:
        lines = [line.partition("#")[0].strip() for line in path.read_text().splitlines()]
        return recorded([float(line) for line in lines if line])
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read arrivals, seconds a line: {error} ({path})") from error


def anywhere(times_s: NDArray[np.float64], devices: int, chance: np.random.Generator) -> NDArray[np.float64]:
    """(devices, N) the same times over and over, each device beginning somewhere in them."""
    length_s = times_s[-1] * len(times_s) / max(1, len(times_s) - 1)
    if length_s <= 0:
        return np.zeros((devices, len(times_s)))
    return np.sort((times_s + chance.uniform(0, length_s, (devices, 1))) % length_s, axis=1)
