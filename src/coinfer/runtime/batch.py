"""Where the edge computes requests: worker threads over one queue, which may take several of a plan at once.

    conversations --submit--> turns --take--> [worker: decode each, tail of all, frame each] --futures--> conversations

A worker that is free takes the request whose turn it is (`turns`) and, with it, what else waits of the same plan, up to
`max_batch`: batches form by themselves where requests come faster than they are computed, and a lone request waits for
nobody.  With `batch_wait_s` it also waits for more, until the first has waited that long.

A request that would wait longer than `max_wait_s`, or whose device has too many bytes waiting, is refused when it
comes: a device that learns so at once computes it itself, and the ones that are let in keep their bound.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import accumulate, pairwise
from math import inf
from typing import Any, NamedTuple

import numpy as np

from ..engine.segments import Segments
from ..engine.sides import SideResult, Values, run_batch
from ..errors import BusyError, CodecError, EngineError, PlanError
from ..protocol import Durations, Request
from ..protocol.messages import one_line
from ..timeline import Span
from .door import whose
from .pace import Pace
from .turns import Asker, Job, Turns

_LOG = logging.getLogger("coinfer.edge")
# How much the latest batch counts in what a request takes.
_NEWEST = 0.2
# How far one that took longer than foreseen, or less long, moves what is allowed for: nearly all take less than that.
_LATER, _SOONER = 0.2, 0.004
# How many times as long as foreseen is allowed for, before anything is known of it and at most.
_LEAST_LATER, _MOST_LATER = 1.25, 4.0
# The share of the bound that waiting here may take: a request is read before and its answer written afterwards.
_HERE = 0.9
# What was foreseen to be computed sooner says nothing about waiting.
_LEAST_FORESEEN_S = 0.02


class Computed(NamedTuple):
    """What a worker made of a request: what its asker gave of it, and how long its making took.

    `durations_s` are waiting, decoding and tail on this machine's clock; empty for a failure.  `batch` is how many were
    computed together.
    """

    request: Request
    message: Any
    durations_s: tuple[float, ...]
    batch: int = 1

    def spans(self) -> list[Span]:
        """Wait, decode and tail, on a clock that starts at the arrival of the request."""
        ends = accumulate(self.durations_s, initial=0.0)
        return [
            Span(request=self.request.request, stage=stage, start_s=begin_s, end_s=end_s, clock="edge")
            for stage, (begin_s, end_s) in zip(("wait", "decode", "tail"), pairwise(ends), strict=False)
        ]


class _Decoded(NamedTuple):
    """A job whose payload could be read: its values, and how long that took."""

    job: Job
    values: Values
    took_s: float


class Workers:
    """Threads that compute requests.

    Args:
        segments: the edge's sessions and codecs.
        pace: how fast this machine works.
        workers: threads.
        max_batch: requests of one plan that are computed together at most.
        batch_wait_s: how long a request may wait for others to be computed with.
        max_wait_s: a request that would wait longer is refused.
        device_bytes: so many bytes of one device may wait.
        clock: tells seconds; another one than the machine's is for tests in made-up time.

    Raises:
        PlanError: a number below 1, or a wait below 0.
    """

    def __init__(
        self,
        segments: Segments,
        pace: Pace,
        *,
        workers: int = 1,
        max_batch: int = 1,
        batch_wait_s: float = 0.0,
        max_wait_s: float = inf,
        device_bytes: float = inf,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if min(workers, max_batch) < 1 or not 0 <= batch_wait_s < 10:
            given = f"{workers}, {max_batch}, {batch_wait_s}"
            raise PlanError(f"an edge needs a worker, batches of 1 or more and waits of 0 to 10 s, got {given}")
        if not (max_wait_s > 0 and device_bytes > 0):
            given = f"{max_wait_s} s, {device_bytes} B"
            raise PlanError(f"an edge lets requests wait for more than 0 s and 0 B, got {given}")
        self._segments, self._pace, self._clock = segments, pace, clock
        self._max_batch, self._wait_s = max_batch, batch_wait_s
        self._max_wait_s, self._device_bytes, self._num_workers = max_wait_s, device_bytes, workers
        self._waiting = Turns()
        # Seconds that a worker takes of each request of a plan, as of late.
        self._each_s: dict[int, float] = {}
        # How many times as long as foreseen requests take: others come meanwhile whose turn is before theirs, and
        # whoever reads and writes needs this machine's core, too.
        self._later = _LEAST_LATER
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"coinfer-edge-{k}", daemon=True) for k in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(
        self,
        connection: Asker,
        request: Request,
        arrived_s: float,
        *,
        device: str = "",
        values: Values | None = None,
    ) -> Future[Computed]:
        """Have a request computed; its future may be cancelled as long as nobody has begun.

        Raises:
            BusyError: it would wait too long, or too much of its device waits already; nothing is kept of it.
        """
        job = Job(connection, request, arrived_s, Future(), device, values)
        with self._changed:
            foreseen_s = self._check_room(job)
            self._waiting.put(job._replace(foreseen_s=foreseen_s))
            self._changed.notify_all()
        return job.future

    @property
    def num_waiting(self) -> int:
        """Requests that nobody has begun."""
        return len(self._waiting)

    def _check_room(self, job: Job) -> float:
        """Seconds after which a request should be computed."""
        each_s = self._each_s.get(job.plan, 0.0)
        wait_s = self._waiting.ahead_of(job.device) * self._mean_s() / self._num_workers
        # Who waits for nobody is let in however long the latest took: else nothing would ever be known to take less.
        if wait_s > 0 and self._later * (wait_s + each_s) > _HERE * self._max_wait_s:
            # When half of what is before it is done, there is room for as many again.
            raise BusyError(f"{len(self._waiting)} requests wait for this edge", retry_after_s=self._later * wait_s / 2)
        if (held := self._waiting.bytes_of(job.device)) + job.num_bytes > self._device_bytes:
            limit = f"{held + job.num_bytes} B of one device would wait, at most {self._device_bytes:g} B may"
            raise BusyError(limit, retry_after_s=max(0.01, wait_s / 2))
        return wait_s + each_s

    def _mean_s(self) -> float:
        """Seconds that a worker takes of one of those that wait, in the mean; 0 where none does."""
        if not self._waiting:
            return 0.0
        known = self._each_s
        # A plan of which nothing is known yet takes what the others do.
        usual_s = sum(known.values()) / len(known) if known else 0.0
        sum_s = sum(count * known.get(plan, usual_s) for plan, count in self._waiting.counts().items())
        return sum_s / len(self._waiting)

    def close(self) -> None:
        """End the threads, each behind the batch it is at; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            for job in self._waiting.clear():
                job.future.cancel()
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while (batch := self._take()) is not None:
            begun = [job for job in batch if job.future.set_running_or_notify_cancel()]
            if not begun:
                continue
            try:
                for job, computed in zip(begun, self.compute(begun), strict=True):
                    job.future.set_result(computed)
            except BaseException as error:
                for job in begun:
                    if not job.future.done():
                        job.future.set_exception(error)

    def _take(self) -> list[Job] | None:
        """The next batch, in turns; None once the edge is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            first = self._waiting.first()
            while self._wait_s and (left_s := first.arrived_s + self._wait_s - self._clock()) > 0:
                if self._waiting.count(first.plan) >= self._max_batch:
                    break
                self._changed.wait(left_s)
                if self._is_closed or not self._waiting:
                    return [] if not self._is_closed else None
                # Another worker may have taken it.
                first = self._waiting.first()
            return self._waiting.take(self._max_batch)

    def compute(self, jobs: Sequence[Job]) -> list[Computed]:
        """Decode, run the tail, and frame the replies of requests of one plan, or the failures."""
        plan = jobs[0].request.plan
        begin_s = self._clock()
        found: dict[int, Computed] = {}
        decoded: list[_Decoded] = []
        for job in jobs:
            since_s = self._clock()
            try:
                values = job.values
                if values is None:
                    values = self._pace.run("fp32", partial(self._segments.codec(plan).decode, job.request.payload))
                decoded.append(_Decoded(job, values, self._clock() - since_s))
            except CodecError as error:
                found[id(job)] = _failed(job, error)
        if decoded:
            joined = decoded[0].values
            if len(decoded) > 1:
                joined = [np.concatenate(parts) for parts in zip(*(one.values for one in decoded), strict=True)]
            since_s = self._clock()
            try:
                results = run_batch(plan, "edge", self._segments, joined, run=self._pace.run)
                done_s = self._clock()
                for one, result in zip(decoded, results, strict=True):
                    found[id(one.job)] = _replied(one, result, done_s, done_s - since_s, len(decoded))
            except EngineError as error:
                found |= {id(one.job): _failed(one.job, error) for one in decoded}
        self._learn(jobs, begin_s, self._clock())
        return [found[id(job)] for job in jobs]

    def _learn(self, jobs: Sequence[Job], begin_s: float, end_s: float) -> None:
        """What a batch says about how long those to come will take."""
        plan, each_s = jobs[0].plan, (end_s - begin_s) / len(jobs)
        with self._changed:
            before_s = self._each_s.get(plan, each_s)
            self._each_s[plan] = before_s + _NEWEST * (each_s - before_s)
            for job in jobs:
                if job.foreseen_s > _LEAST_FORESEEN_S:
                    later = min((end_s - job.arrived_s) / job.foreseen_s, _MOST_LATER)
                    self._later += (_LATER if later > self._later else _SOONER) * (later - self._later)
            self._later = max(_LEAST_LATER, self._later)


def _failed(job: Job, error: Exception) -> Computed:
    known = {**whose(job.device), "request": job.request.request, "plan": job.plan}
    _LOG.warning("request %d failed: %s", job.request.request, one_line(str(error)), extra=known)
    return Computed(job.request, job.connection.failure(job.request.request, str(error)), ())


def _replied(one: _Decoded, result: SideResult, done_s: float, tail_s: float, batch: int) -> Computed:
    """A reply; what is neither its own decoding nor the tail was waiting."""
    job = one.job
    wait_s = max(0.0, done_s - job.arrived_s - one.took_s - tail_s)
    durations_s = (wait_s, one.took_s, tail_s)
    durations = Durations(*(round(1e6 * seconds) for seconds in durations_s))
    message = job.connection.reply(job.request.request, durations, result.values, exit=result.exit)
    return Computed(job.request, message, durations_s, batch)
