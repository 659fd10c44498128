"""Where the edge computes requests: worker threads over one queue, which may take several of a plan at once.

    conversations --submit--> queue --take--> [worker: decode each, tail of all, frame each] --futures--> conversations

A worker that is free takes the first request that waits and, with it, what else waits of the same plan, up to
`max_batch`: batches form by themselves where requests come faster than they are computed, and a lone request waits for
nobody.  With `batch_wait_s` it also waits for more, until the first has waited that long.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from ..engine.segments import Segments
from ..engine.sides import SideResult, Values, run_batch
from ..errors import CodecError, EngineError, PlanError
from ..protocol import Durations, EdgeConnection, Request
from ..protocol.messages import one_line
from ..timeline import Span
from .pace import Pace

_LOG = logging.getLogger("coinfer.edge")


class Computed(NamedTuple):
    """What a worker made of a request: a message to send, and how long its making took.

    `durations_s` are waiting, decoding and tail on this machine's clock; empty for a failure.  `batch` is how many were
    computed together.
    """

    request: Request
    message: bytes
    durations_s: tuple[float, ...]
    batch: int = 1

    def spans(self) -> list[Span]:
        """Wait, decode and tail, on a clock that starts at the arrival of the request."""
        ends = np.cumsum([0.0, *self.durations_s]).tolist()
        return [
            Span(request=self.request.request, stage=stage, start_s=begin_s, end_s=end_s, clock="edge")
            for stage, (begin_s, end_s) in zip(("wait", "decode", "tail"), pairwise(ends), strict=False)
        ]


class Job(NamedTuple):
    """A request that waits to be computed, on whose connection its reply goes."""

    connection: EdgeConnection
    request: Request
    arrived_s: float
    future: Future[Computed]


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
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if min(workers, max_batch) < 1 or not 0 <= batch_wait_s < 10:
            given = f"{workers}, {max_batch}, {batch_wait_s}"
            raise PlanError(f"an edge needs a worker, batches of 1 or more and waits of 0 to 10 s, got {given}")
        self._segments, self._pace, self._clock = segments, pace, clock
        self._max_batch, self._wait_s = max_batch, batch_wait_s
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._is_closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"coinfer-edge-{k}", daemon=True) for k in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, connection: EdgeConnection, request: Request, arrived_s: float) -> Future[Computed]:
        """Have a request computed; its future may be cancelled as long as nobody has begun."""
        job = Job(connection, request, arrived_s, Future())
        with self._changed:
            self._waiting.append(job)
            self._changed.notify_all()
        return job.future

    def close(self) -> None:
        """End the threads, each behind the batch it is at; what waits is cancelled."""
        with self._changed:
            self._is_closed = True
            for job in self._waiting:
                job.future.cancel()
            self._waiting.clear()
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
        """The next batch, in the order of arrival; None once the edge is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._is_closed)
            if self._is_closed:
                return None
            plan, until_s = self._waiting[0].request.plan.number, self._waiting[0].arrived_s + self._wait_s
            while self._wait_s and (left_s := until_s - self._clock()) > 0:
                if sum(job.request.plan.number == plan for job in self._waiting) >= self._max_batch:
                    break
                self._changed.wait(left_s)
                if self._is_closed or not self._waiting:
                    return [] if not self._is_closed else None
                if self._waiting[0].request.plan.number != plan:
                    # Another worker has taken them.
                    plan = self._waiting[0].request.plan.number
                    until_s = self._waiting[0].arrived_s + self._wait_s
            batch: list[Job] = []
            rest: deque[Job] = deque()
            while self._waiting and len(batch) < self._max_batch:
                job = self._waiting.popleft()
                (batch if job.request.plan.number == plan else rest).append(job)
            self._waiting.extendleft(reversed(rest))
            return batch

    def compute(self, jobs: Sequence[Job]) -> list[Computed]:
        """Decode, run the tail, and frame the replies of requests of one plan, or the failures."""
        plan = jobs[0].request.plan
        codec = self._segments.codec(plan)
        found: dict[int, Computed] = {}
        decoded: list[_Decoded] = []
        for job in jobs:
            since_s = self._clock()
            try:
                values = self._pace.run("fp32", partial(codec.decode, job.request.payload))
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
        return [found[id(job)] for job in jobs]


def _failed(job: Job, error: Exception) -> Computed:
    _LOG.warning("request %d failed: %s", job.request.request, one_line(str(error)))
    return Computed(job.request, job.connection.failure(job.request.request, str(error)), ())


def _replied(one: _Decoded, result: SideResult, done_s: float, tail_s: float, batch: int) -> Computed:
    """A reply; what is neither its own decoding nor the tail was waiting."""
    job = one.job
    wait_s = max(0.0, done_s - job.arrived_s - one.took_s - tail_s)
    durations_s = (wait_s, one.took_s, tail_s)
    durations = Durations(*(round(1e6 * seconds) for seconds in durations_s))
    message = job.connection.reply(job.request.request, durations, result.values, exit=result.exit)
    return Computed(job.request, message, durations_s, batch)
