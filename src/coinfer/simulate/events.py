"""Requests event by event, with SimPy: any mixture of devices, streams, plans, policies and deadlines on one edge.

    arrival -> [queue, slot] -> device's core -> uplink -> edge's workers -> downlink -> answer

Each box is a resource that serves one request at a time, first come first served (the edge: as many as it has
workers, each of which takes whatever waits of one plan together); streams of one device share its core and its link.
Service times are `stages.cost` of `stages.stages`, of the mean payload; a link with a trace carries bytes as the trace
allows.  Delays and the exchange occupy nothing.  What comes of it is a
`Timeline`, as of a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import simpy
from numpy.typing import NDArray

from ..errors import PlanError
from ..plan import Plan
from ..profile import Conditions
from ..stages import Course, Resource, Stage, cost, stages
from ..timeline import Answered, Outcome, Span, Timeline
from .transfer import Transfer

Policy = Literal["block", "drop-oldest", "drop-newest"]
Steps = Generator[simpy.Event, Any, None]


class Stream(NamedTuple):
    """Requests of one device by one plan.

    `courses` are those of the plan (`stages.courses_of`), each request takes one by chance of `seed`; `arrivals_s` are
    times; `device` names the device whose core and link it shares.  `window`, `policy`, `queue` and `deadline_s` are as
    in `Device.stream`; under "block" a request waits for as long as it must and counts from its arrival.  `offset_s` is
    how far into its trace the device's link begins.  `spread` has factors of a resource, one of which each request
    draws: its time there, or the bytes that it sends, are so many times those of its course.
    """

    plan: Plan
    courses: Sequence[Course]
    arrivals_s: NDArray[np.float64]
    conditions: Conditions
    device: str = "device"
    window: int = 8
    policy: Policy = "block"
    queue: int = 1
    deadline_s: float | None = None
    seed: int = 0
    offset_s: float = 0.0
    spread: Mapping[Resource, NDArray[np.float64]] = MappingProxyType({})


class _Machine:
    """A device's core and link."""

    def __init__(self, environment: simpy.Environment, stream: Stream) -> None:
        self.core, self.up, self.down = (simpy.Resource(environment) for _ in range(3))
        self.link, self.offset_s = stream.conditions.link, stream.offset_s
        self.uplink = Transfer(self.link, is_uplink=True, offset_s=self.offset_s)
        self.downlink = Transfer(self.link, is_uplink=False)


class _Waiting(NamedTuple):
    """A request at the edge: of which plan, its seconds alone, the part of them that a batch pays once, who waits."""

    plan: int
    own_s: float
    fixed_s: float
    served: simpy.Event


class _Edge:
    """Workers that take the first request that waits, and whatever else waits of its plan, up to `max_batch`."""

    def __init__(self, environment: simpy.Environment, workers: int, max_batch: int) -> None:
        self.environment, self.free, self.max_batch = environment, workers, max_batch
        self.waiting: list[_Waiting] = []

    def serve(self, plan: int, own_s: float, fixed_s: float) -> simpy.Event:
        """Happens when a worker takes the request; its value is how long that takes, and of how many together."""
        served = self.environment.event()
        self.waiting.append(_Waiting(plan, own_s, fixed_s, served))
        self._take()
        return served

    def _take(self) -> None:
        while self.free and self.waiting:
            batch, left = list[_Waiting](), list[_Waiting]()
            for one in self.waiting:
                joins = one.plan == self.waiting[0].plan and len(batch) < self.max_batch
                (batch if joins else left).append(one)
            self.waiting = left
            self.free -= 1
            took_s = max(one.fixed_s for one in batch) + sum(one.own_s - one.fixed_s for one in batch)
            for one in batch:
                one.served.succeed((took_s, len(batch)))
            self.environment.process(self._compute(took_s))

    def _compute(self, took_s: float) -> Steps:
        yield self.environment.timeout(took_s)
        self.free += 1
        self._take()


def simulate(
    streams: Sequence[Stream], *, workers: int = 1, max_batch: int = 1, spans: bool = True
) -> Timeline:
    """What becomes of all requests; they are numbered stream by stream.

    Args:
        streams: at least one; those of one device have the same link.
        workers: batches that the edge computes at a time.
        max_batch: requests in a batch at most; a batch takes `Work.batch_fixed_s` once, and the rest of each one's own
            time.
        spans: whether to record each stage, or outcomes alone.

    Raises:
        PlanError: no stream, no worker, streams of one device with different links, or a number that is none.
    """
    if not streams or workers < 1 or max_batch < 1:
        given = f"{len(streams)}, {workers} and {max_batch}"
        raise PlanError(f"a simulation needs a stream, a worker and batches of 1 or more, got {given}")
    environment, machines = simpy.Environment(), dict[str, _Machine]()
    timeline, edge, first = Timeline(), _Edge(environment, workers, max_batch), 0
    for stream in streams:
        if stream.window < 1 or stream.queue < 1 or not (stream.deadline_s is None or stream.deadline_s > 0):
            given = f"{stream.window}, {stream.queue}, {stream.deadline_s}"
            raise PlanError(f"a stream's window and queue must be at least 1, its deadline above 0 s, got {given}")
        for resource, factors in stream.spread.items():
            if not len(factors) or not (np.isfinite(factors) & (np.asarray(factors) >= 0)).all():
                raise PlanError(f"a stream's spread needs factors of 0 or more, got {factors!r:.60} ({resource})")
        machine = machines.setdefault(stream.device, _Machine(environment, stream))
        if (machine.link, machine.offset_s) != (stream.conditions.link, stream.offset_s):
            raise PlanError(f'streams of one device share one link, those of "{stream.device}" have different ones')
        _Run(environment, timeline, machine, edge, stream, first, spans).start()
        first += len(stream.arrivals_s)
    environment.run()
    timeline.outcomes.sort(key=lambda outcome: outcome.request)
    timeline.spans.sort(key=lambda span: (span.request, span.start_s))
    return timeline


class _Run:
    """One stream in simulated time."""

    def __init__(
        self,
        environment: simpy.Environment,
        timeline: Timeline,
        machine: _Machine,
        edge: _Edge,
        stream: Stream,
        first: int,
        spans: bool,
    ) -> None:
        self.environment, self.timeline, self.machine, self.edge = environment, timeline, machine, edge
        self.stream, self.first, self.has_spans = stream, first, spans
        self.slots = simpy.Resource(environment, stream.window)
        self.waiting: deque[int] = deque()
        self.taker: simpy.Event | None = None
        self.over: set[int] = set()
        shares = np.array([course.share for course in stream.courses])
        chance = np.random.default_rng(stream.seed)
        self.courses = chance.choice(len(shares), len(stream.arrivals_s), p=shares / shares.sum())
        count = len(stream.arrivals_s)
        self.factors = {name: chance.choice(factors, count) for name, factors in stream.spread.items()}
        # What one request of each course waits for and how long it occupies each resource.
        self.stages = [stages(course.work) for course in stream.courses]

    def start(self) -> None:
        """Let requests come, and be taken one after the other."""
        self.environment.process(self._arrive())
        self.environment.process(self._take())

    def _arrive(self) -> Steps:
        for request, at_s in enumerate(self.stream.arrivals_s):
            yield self.environment.timeout(float(at_s) - self.environment.now)
            if self.stream.deadline_s is not None:
                self.environment.process(self._deadline(request))
            if self.stream.policy != "block" and len(self.waiting) == self.stream.queue:
                dropped = request if self.stream.policy == "drop-newest" else self.waiting.popleft()
                self._end(dropped, "dropped")
                if dropped == request:
                    continue
            self.waiting.append(request)
            if self.taker is not None and not self.taker.triggered:
                self.taker.succeed()

    def _deadline(self, request: int) -> Steps:
        yield self.environment.timeout(float(self.stream.deadline_s or 0.0))
        self._end(request, "late")

    def _take(self) -> Steps:
        """Whenever a slot is free and a request waits, the device computes it; for nobody once all are over."""
        while True:
            slot = self.slots.request()
            yield slot
            while not self.waiting:
                self.taker = self.environment.event()
                yield self.taker
            request = self.waiting.popleft()
            with self.machine.core.request() as core:
                yield core
                if request in self.over:
                    self.slots.release(slot)
                    continue
                yield from self._compute(request)
            self.environment.process(self._cross(request, slot))

    def _compute(self, request: int) -> Steps:
        for stage in self._stages(request, "device"):
            yield from self._spend(request, stage)

    def _cross(self, request: int, slot: Any) -> Steps:
        """From the device's core to the answer."""
        environment, machine = self.environment, self.machine
        course = self.stream.courses[self.courses[request]]
        if float(np.asarray(course.work.remote_share)) == 0:
            self._end(request, "device" if course.exit is None else "exit", course.exit)
            self.slots.release(slot)
            return
        (send,), (reply,) = self._stages(request, "uplink"), self._stages(request, "downlink")
        for stage, resource, transfer in ((send, machine.up, machine.uplink), (reply, machine.down, machine.downlink)):
            if stage is reply:
                yield from self._at_the_edge(request)
            with resource.request() as turn:
                yield turn
                begin_s = environment.now
                yield environment.timeout(float(transfer.end_s(begin_s, stage.num_bytes)) - begin_s)
                self._note(request, stage, begin_s)
            yield environment.timeout(machine.link.delay_s)
        yield environment.timeout(self.stream.conditions.exchange_s)
        self._end(request, "edge", course.exit, send, reply)
        self.slots.release(slot)

    def _at_the_edge(self, request: int) -> Steps:
        """A request alone is decoded, then computed; several at once are computed as one."""
        parts = self._stages(request, "edge")
        own_s = sum(self._busy_s(part) for part in parts)
        fixed_s = float(np.asarray(self.stream.courses[self.courses[request]].work.batch_fixed_s))
        fixed_s = 0.0 if np.isnan(fixed_s) else min(own_s, fixed_s * self.stream.conditions.edge_load)
        took_s, together = yield self.edge.serve(self.stream.plan.number, own_s, fixed_s)
        if together == 1:
            for part in parts:
                yield from self._spend(request, part)
        else:
            begin_s = self.environment.now
            yield self.environment.timeout(took_s)
            self._note(request, parts[-1], begin_s)

    def _stages(self, request: int, resource: Resource) -> list[Stage]:
        factor = float(self.factors[resource][request]) if resource in self.factors else 1.0
        return [
            stage._replace(work_s=stage.work_s * factor, num_bytes=stage.num_bytes * factor)
            for stage in self.stages[self.courses[request]]
            if stage.resource == resource
        ]

    def _spend(self, request: int, stage: Stage) -> Steps:
        begin_s, busy_s = self.environment.now, self._busy_s(stage)
        if busy_s > 0:
            yield self.environment.timeout(busy_s)
            self._note(request, stage, begin_s)

    def _busy_s(self, stage: Stage) -> float:
        # A course ends at its exit: nothing gets to what lies behind it.
        return float(np.asarray(stage.share * cost(stage, self.stream.conditions).busy_s))

    def _note(self, request: int, stage: Stage, begin_s: float) -> None:
        if self.has_spans:
            num_bytes = round(float(np.asarray(stage.num_bytes)))
            self.timeline.spans.append(
                Span(
                    request=self.first + request,
                    stage=stage.name,
                    start_s=begin_s,
                    end_s=self.environment.now,
                    num_bytes=num_bytes,
                )
            )

    def _end(
        self,
        request: int,
        answered: Answered,
        exit: int | None = None,
        send: Stage | None = None,
        reply: Stage | None = None,
    ) -> None:
        """A request is over, once."""
        if request in self.over:
            return
        self.over.add(request)
        up, down = (0 if stage is None else round(float(np.asarray(stage.num_bytes))) for stage in (send, reply))
        self.timeline.outcomes.append(
            Outcome(
                request=self.first + request,
                plan=self.stream.plan.number,
                answered=answered,
                start_s=float(self.stream.arrivals_s[request]),
                end_s=self.environment.now,
                wire_bytes=up,
                reply_wire_bytes=down,
                exit=exit,
            )
        )
