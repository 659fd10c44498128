"""Thousands of equal devices on one edge, in array operations: a step a request of a device, all devices at once.

    device:  done = max(arrival, done before) + its stages              (Lindley, 1952)
    uplink:  the same, with the time that its own trace gives the bytes
    edge:    every request of every device in order of arrival, first come first served by W workers
    downlink, delays, exchange: behind the edge

Nothing flows back: no windows, no drops, no deadlines; what arrives is served, however late.  `events` has these, a
request at a time, and gives the same latencies where neither is used (a test holds the two together).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..profile import Conditions
from ..stages import Course, cost, stages
from .transfer import Transfer

Floats = NDArray[np.float64]


class FleetResult(NamedTuple):
    """What came of the requests of D devices, K each.

    `latency_s` (D, K); `course` (D, K) which course each took; `crossed` (D, K) whether it came to the edge, and
    `edge_wait_s` (D, K) how long it then waited for a worker; `edge_busy_share` of the workers' time from the first
    arrival to the last answer.
    """

    latency_s: Floats
    course: NDArray[np.int64]
    crossed: NDArray[np.bool_]
    edge_wait_s: Floats
    edge_busy_share: float
    duration_s: float

    @property
    def throughput_hz(self) -> float:
        """Answers a second, of all devices together."""
        return self.latency_s.size / self.duration_s


def simulate_fleet(
    courses: Sequence[Course],
    arrivals_s: Floats,
    conditions: Conditions,
    *,
    workers: int = 1,
    max_batch: int = 1,
    offsets_s: Floats | None = None,
    seed: int = 0,
) -> FleetResult:
    """Latencies of every request of every device.

    Args:
        courses: of the plan that all devices run (`stages.courses_of`).
        arrivals_s: (D, K), rising along each device's row.
        conditions: of each device; a link with a trace follows it.
        workers: batches that the edge computes at a time.
        max_batch: what waits is computed together, up to so many; a batch takes `Work.batch_fixed_s`, and each request
            of it the rest of its own time.
        offsets_s: (D,) how far into the trace each device's link begins; none: all at its start.
        seed: of the courses that requests take.

    Raises:
        PlanError: no course or worker, or arrivals that are no such array.
    """
    if not courses or workers < 1:
        raise PlanError(f"a fleet needs a plan and a worker, got {len(courses)} courses, {workers} workers")
    if arrivals_s.ndim != 2 or not arrivals_s.size or (np.diff(arrivals_s, axis=1) < 0).any():
        raise PlanError(f"a fleet's arrivals must be (devices, requests), rising, got shape {arrivals_s.shape}")
    devices, count = arrivals_s.shape
    shares = np.array([course.share for course in courses])
    taken = np.random.default_rng(seed).choice(len(courses), arrivals_s.shape, p=shares / shares.sum())
    amounts = _Amounts(courses, conditions)
    up = Transfer(conditions.link, is_uplink=True, offset_s=0.0 if offsets_s is None else offsets_s)
    at_edge = np.full(arrivals_s.shape, np.inf)
    computed_s, sent_s = np.zeros(devices), np.zeros(devices)
    here_s = np.empty(arrivals_s.shape)
    for k in range(count):
        course = taken[:, k]
        computed_s = np.maximum(arrivals_s[:, k], computed_s) + amounts.device_s[course]
        here_s[:, k] = computed_s
        crosses = amounts.crosses[course]
        ended_s = up.end_s(np.maximum(computed_s, sent_s), amounts.up_bytes[course])
        sent_s = np.where(crosses, ended_s, sent_s)
        at_edge[:, k] = np.where(crosses, sent_s + conditions.link.delay_s, np.inf)
    if max_batch > 1:
        done_s, waited_s, busy_s = _serve_batches(
            at_edge, amounts.edge_s[taken], amounts.fixed_s[taken], workers, max_batch
        )
    else:
        done_s, waited_s, busy_s = _serve(at_edge, amounts.edge_s[taken], workers)
    down_bps = conditions.link.down_rate_bps or conditions.link.rate_bps
    answered_s = here_s.copy()
    back_s = np.zeros(devices)
    for k in range(count):
        course, crosses = taken[:, k], amounts.crosses[taken[:, k]]
        back_s = np.where(
            crosses, np.maximum(done_s[:, k], back_s) + 8 * amounts.down_bytes[course] / down_bps, back_s
        )
        answered_s[:, k] = np.where(
            crosses, back_s + conditions.link.delay_s + conditions.exchange_s, here_s[:, k]
        )
    duration_s = float(answered_s.max() - arrivals_s.min())
    share = busy_s / (workers * duration_s) if duration_s > 0 else 0.0
    return FleetResult(answered_s - arrivals_s, taken, amounts.crosses[taken], waited_s, share, duration_s)


class _Amounts:
    """Of each course: seconds on either machine, bytes each way, whether it crosses."""

    def __init__(self, courses: Sequence[Course], conditions: Conditions) -> None:
        rows = [stages(course.work) for course in courses]

        def busy(resource: str) -> Floats:
            return np.array(
                [sum(float(cost(s, conditions).busy_s) for s in row if s.resource == resource) for row in rows]
            )

        def num_bytes(resource: str) -> Floats:
            return np.array([sum(float(s.num_bytes) for s in row if s.resource == resource) for row in rows])

        self.crosses = np.array([float(np.asarray(course.work.remote_share)) > 0 for course in courses])
        self.device_s = np.array(
            [
                sum(float(s.share * cost(s, conditions).busy_s) for s in row if s.resource == "device")
                for row in rows
            ]
        )
        self.edge_s = np.where(self.crosses, busy("edge"), 0.0)
        fixed_s = np.array([float(np.asarray(course.work.batch_fixed_s)) for course in courses]) * conditions.edge_load
        self.fixed_s = np.minimum(np.where(np.isnan(fixed_s), 0.0, fixed_s), self.edge_s)
        self.up_bytes, self.down_bytes = num_bytes("uplink"), num_bytes("downlink")


def _serve(arrival_s: Floats, service_s: Floats, workers: int) -> tuple[Floats, Floats, float]:
    """When each request is done, how long it waited, and how long workers were busy; infinite arrivals are none."""
    flat, took_s = arrival_s.ravel(), service_s.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.isfinite(flat[order])]
    at_s, need_s = flat[order], took_s[order]
    start_s = _one_worker(at_s, need_s) if workers == 1 else _many_workers(at_s, need_s, workers)
    done_s, waited_s = np.full(flat.shape, np.inf), np.zeros(flat.shape)
    done_s[order], waited_s[order] = start_s + need_s, start_s - at_s
    return done_s.reshape(arrival_s.shape), waited_s.reshape(arrival_s.shape), float(need_s.sum())


def _serve_batches(
    arrival_s: Floats, service_s: Floats, fixed_s: Floats, workers: int, max_batch: int
) -> tuple[Floats, Floats, float]:
    """The same where a free worker takes all that wait, up to `max_batch`: one fixed part for a batch."""
    import heapq

    flat = arrival_s.ravel()
    order = np.argsort(flat, kind="stable")
    order = order[np.isfinite(flat[order])]
    at_s, fixed = flat[order].tolist(), fixed_s.ravel()[order].tolist()
    sums = np.concatenate([[0.0], np.cumsum(service_s.ravel()[order] - fixed_s.ravel()[order])]).tolist()
    free_s, busy_s = [-math.inf] * workers, 0.0
    starts, ends = np.empty(len(at_s)), np.empty(len(at_s))
    first = 0
    while first < len(at_s):
        start = max(at_s[first], free_s[0])
        last = first + 1
        while last < len(at_s) and last - first < max_batch and at_s[last] <= start:
            last += 1
        took = max(fixed[first:last]) + sums[last] - sums[first]
        heapq.heapreplace(free_s, start + took)
        starts[first:last], ends[first:last] = start, start + took
        busy_s += took
        first = last
    done_s, waited_s = np.full(flat.shape, np.inf), np.zeros(flat.shape)
    done_s[order], waited_s[order] = ends, starts - np.array(at_s)
    return done_s.reshape(arrival_s.shape), waited_s.reshape(arrival_s.shape), busy_s


def _one_worker(at_s: Floats, need_s: Floats) -> Floats:
    """start_i = max over j <= i of (at_j + the need of j to i - 1)."""
    before_s = np.cumsum(need_s) - need_s
    return before_s + np.maximum.accumulate(at_s - before_s) if len(at_s) else at_s


def _many_workers(at_s: Floats, need_s: Floats, workers: int) -> Floats:
    import heapq

    free_s, start_s = [-math.inf] * workers, np.empty_like(at_s)
    for k, (at, need) in enumerate(zip(at_s.tolist(), need_s.tolist(), strict=True)):
        start = max(at, free_s[0])
        heapq.heapreplace(free_s, start + need)
        start_s[k] = start
    return start_s
