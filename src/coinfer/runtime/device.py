"""The device: runs a bundle's plans, alone or with an edge.

    with Device(bundle, edge="ws://127.0.0.1:8300", plan=3) as device:
        answer = device.infer(picture)                  # one request
        for answer in device.stream(pictures):          # a stream: computing, sending, receiving overlap
            ...                                         # answer.label, answer.outcome.latency_s
        for answer in device.stream(camera, policy="drop-oldest", deadline_s=0.1, is_ordered=False):
            ...                                         # the newest frame wins; answers as they are completed

A request is a picture (H, W, C) uint8, or whatever `bundle.manifest.input` states, with or without a leading 1.
All that the device computes goes through its `Pace`: segments with the plan's precision, coding and framing as
fp32 work.  Every request ends in an Answer or an error; there is no silent fallback.  Spans are on the
device's clock, seconds since the Device was made; the edge's spans are durations on the edge's own clock.

Nothing here imports torch or a server.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bundle import Bundle
from ..engine.segments import Segments
from ..engine.sides import Mark, Run, SideResult, run_now, run_side, unmarked
from ..errors import DataError, PlanError
from ..plan import Plan
from ..protocol import Pong, Reply, Result, Terms, decode_result, encode_result, message_wire_bytes
from ..timeline import Outcome, Timeline
from .channel import Channel
from .pace import AsFastAsItGoes, Pace
from .recent import RecentTimeline
from .request import Answer, Asked, Ended, Event, Found, Handed, refusal_of
from .stamps import Stamps, link_spans
from .stream import Policy, StreamTerms, overlapped
from .tls import DeviceTls

Array = NDArray[Any]


class Device:
    """Runs plans of `bundle`; connects to `edge` (ws://HOST:PORT) at once where one is given.

    Args:
        bundle: the folder that both machines hold.
        edge: where the edge listens; None runs device plans only.
        plan: number of the plan that `infer` and `stream` use unless told otherwise.
        pace: how fast this device works.
        threads: threads of each session.
        timeout_s: the longest silence of the link before it counts as lost.
        timeline: where spans and outcomes go; a bounded record of its own by default.
        clock: tells seconds; another one than the machine's is for tests in made-up time.
        connect: makes the Channel to `edge`; a link in memory, or one in made-up time.
        token, tls: what the edge knows this device by, and whom to trust at a wss:// address; see `Link`.

    For one thread; `infer` is not for the middle of a `stream`.

    Raises:
        BundleError: the plan is not on the menu, or does not fit its segments.
        LinkError: the edge cannot be reached, speaks another protocol, or refuses (see its subclasses).
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        edge: str | None = None,
        plan: int | None = None,
        pace: Pace | None = None,
        threads: int = 1,
        timeout_s: float = 30.0,
        timeline: Timeline | None = None,
        clock: Callable[[], float] = time.perf_counter,
        connect: Callable[..., Channel] | None = None,
        token: str | None = None,
        tls: DeviceTls | None = None,
    ) -> None:
        self.bundle, self.edge, self.plan = bundle, edge, plan
        self.pace: Pace = AsFastAsItGoes() if pace is None else pace
        self.timeline = RecentTimeline() if timeline is None else timeline
        self._segments = Segments(bundle.path, bundle.manifest.outputs, threads=threads)
        self._terms = Terms.of(bundle)
        self._timeout_s = timeout_s
        self._clock, self._connect = clock, connect or partial(Channel, token=token, tls=tls)
        self._zero_s, self._requests, self._is_streaming = clock(), 0, False
        self._channel: Channel | None = None
        if plan is not None:
            self.prepare(plan)
        if edge is not None:
            self._channel = self._connected(edge)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def prepare(self, *plans: int) -> None:
        """Load what these plans compute with, so that their first request does not pay for it.

        Raises:
            BundleError: a plan is not on the menu, or does not fit its segments.
        """
        for number in plans:
            plan = self.bundle.plan(number)
            self._segments.parts(plan, "device")
            if plan.codec is not None:
                self._segments.codec(plan)

    def warm_up(self, x: ArrayLike, *, plan: int | None = None) -> None:
        """Compute once, for nothing, what the device computes for a request: the next one finds warm caches.

        Raises:
            DataError: as `infer`.
        """
        self._rehearse(self._chosen(plan), self._checked(x))

    def own_s(self, x: ArrayLike, plan: Plan) -> float:
        """Seconds that the device takes for its side of a request with warm caches, computed for nothing."""
        array = self._checked(x)
        self._rehearse(plan, array)
        begun_s = self.now_s()
        self.pace.run("fp32", partial(self._made, plan, array, run=self.pace.run), partial(self._rehearse, plan, array))
        return self.now_s() - begun_s

    def infer(self, x: ArrayLike, *, plan: int | None = None) -> Answer:
        """The answer to one request, by `plan` or the device's own.

        Raises:
            DataError: `x` is of another size or dtype than the bundle's input.
            PlanError: no plan was named, or it needs an edge and none was given.
            RefusedError: the edge could not answer this request; the connection lives on.
            LinkError: the link broke, or was silent for `timeout_s`.
        """
        chosen = self._chosen(plan)
        handed = self.hand(x)
        if chosen.kind == "device":
            return self.record(self.alone(handed, chosen))
        channel = self.channel()
        asked = self.ask(handed, chosen, channel)
        if isinstance(asked, Ended):
            return self.record(asked)
        is_done = False
        try:
            self.send(asked, channel)
            event, received_s = self.hear(channel)
            is_done = True
        finally:
            if not is_done:
                self.drop()
        return self.record(self.answer(asked, event, received_s))

    def stream(
        self,
        xs: Iterable[ArrayLike],
        *,
        plan: int | None = None,
        window: int = 8,
        policy: Policy = "block",
        queue: int = 1,
        deadline_s: float | None = None,
        is_ordered: bool = True,
    ) -> Iterator[Answer]:
        """What came of each request of a stream, once for each.

        Computing, sending and receiving overlap.  `xs` is read in a thread of its own.  An error in `xs` or in a
        request is raised when all earlier answers have been given.  Closing the iterator early cuts the connection;
        the next request opens another.

        Args:
            xs: the requests; a live source gives each when it is there.
            plan: number of the plan, the device's own by default.
            window: so many requests at most are between being computed and being taken from here.
            policy: where the device is behind: "block" reads no more of `xs`; "drop-oldest" keeps the `queue` newest
                that wait to be computed, "drop-newest" the first ones.  A dropped request has an Answer that says so.
            queue: requests that may wait to be computed; "block" has none that wait.
            deadline_s: of each request, from its being read from `xs`; without an answer by then it is "late" for good.
            is_ordered: in the order of `xs`; else as they are completed: an exit does not wait for those on the link.

        Raises:
            PlanError: as `infer`; or a number or policy is none that is allowed; the rest as `infer`, while iterating.
        """
        terms = StreamTerms(window, policy, queue, deadline_s, is_ordered)
        terms.check()
        chosen = self._chosen(plan)
        if chosen.kind == "device" and policy == "block" and deadline_s is None:
            return (self.record(self.alone(self.hand(x), chosen)) for x in xs)
        return overlapped(self, xs, chosen, terms)

    def ping(self) -> float:
        """Seconds of one heartbeat to the edge and back.

        Raises:
            LinkError: the link broke.
        """
        channel = self.channel()
        start_s = self.now_s()
        channel.ping(self._next())
        while not isinstance(self.hear_any(channel)[0], Pong):
            pass
        return self.now_s() - start_s

    def channel(self) -> Channel:
        """The connection; a new one where the old one has been closed meanwhile.

        Raises:
            PlanError: this device was given no edge, or is in the middle of a stream.
            LinkError: the edge cannot be reached.
        """
        if self.edge is None:
            raise PlanError("this plan needs an edge, and the device was given none")
        if self._is_streaming:
            raise PlanError("the device is in the middle of a stream; close it first")
        if self._channel is not None and not self._channel.is_open():
            self.drop()
        if self._channel is None:
            self._channel = self._connected(self.edge)
        return self._channel

    def _connected(self, url: str) -> Channel:
        return self._connect(url, self._terms, timeout_s=self._timeout_s)

    def claim(self, is_streaming: bool) -> None:
        """Say that a stream has begun or ended."""
        self._is_streaming = is_streaming

    def drop(self) -> None:
        """Close the connection in whatever state; the next request opens another."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort()
            channel.close()

    def hand(self, x: ArrayLike) -> Handed:
        """A request from now on."""
        return Handed(self._next(), x, self.now_s())

    def ask(self, handed: Handed, plan: Plan, channel: Channel) -> Asked | Ended:
        """Compute the device's side of one request, encode and frame it; ended where an exit answers.

        Raises:
            DataError: the request is of another size or dtype than the bundle's input.
        """
        array, stamps = self._checked(handed.x), Stamps(self._came_as_far_s, handed)

        def compute() -> tuple[bytes, int, int] | Found:
            made = self._made(plan, array, run=self.pace.run, mark=stamps.mark)
            return made if isinstance(made, Found) else (*channel.frame(handed.request, plan.number, made), len(made))

        made = self.pace.run("fp32", compute, partial(self._rehearse, plan, array, channel))
        if isinstance(made, Found):
            return self._answered(handed, plan, made, stamps)
        frame, message_bytes, payload_bytes = made
        stamps.mark("encode")
        wire = message_wire_bytes(message_bytes, masked=True)
        return Asked(handed.request, plan, handed.start_s, frame, payload_bytes, wire, stamps.spans)

    def send(self, asked: Asked, channel: Channel) -> None:
        """Write a request to the link, and note when."""
        asked.sent_s = self.now_s()
        channel.write(asked.frame)

    def hear(self, channel: Channel) -> tuple[Event, float]:
        """The edge's next answer, and when its bytes had arrived."""
        while isinstance((found := self.hear_any(channel))[0], Pong):
            pass
        return found  # type: ignore[return-value]

    def hear_any(self, channel: Channel) -> tuple[Event | Pong, float]:
        """The edge's next answer or heartbeat, and when its bytes had arrived."""
        while True:
            message = channel.read()
            received_s = self.now_s()
            parse, rehearse = partial(channel.parse, message), partial(channel.rehearse, message)
            event = self.pace.run("fp32", parse, rehearse, is_urgent=True)
            if event is not None:
                return event, received_s

    def answer(self, asked: Asked, event: Event, received_s: float) -> Ended:
        """The answer to a request from the edge's event, or why it has none."""
        end_s, is_answered = self.now_s(), isinstance(event, Reply)
        outcome = Outcome(
            request=asked.request,
            plan=asked.plan.number,
            answered="edge" if is_answered else "failed",
            start_s=asked.start_s,
            end_s=end_s,
            payload_bytes=asked.payload_bytes,
            wire_bytes=asked.wire_bytes,
            reply_wire_bytes=message_wire_bytes(event.num_bytes, masked=False),
            exit=event.exit if isinstance(event, Reply) else None,
        )
        spans = (*asked.spans, *link_spans(asked, event, received_s))
        if not isinstance(event, Reply):
            return Ended(Answer(asked.request, outcome, spans, ()), refusal_of(asked, event))
        return Ended(Answer(asked.request, outcome, spans, *event.result))

    def alone(self, handed: Handed, plan: Plan, *, is_fallback: bool = False) -> Ended:
        """The answer by the device alone, of an exit or of the network's end.  Raises as `ask`."""
        array, stamps = self._checked(handed.x), Stamps(self._came_as_far_s, handed)
        compute = partial(self._made, plan, array, run=self.pace.run, mark=stamps.mark)
        found = self.pace.run("fp32", compute, partial(self._rehearse, plan, array))
        assert isinstance(found, Found)
        return self._answered(handed, plan, found, stamps, is_fallback=is_fallback)

    def _made(self, plan: Plan, array: Array, *, run: Run = run_now, mark: Mark = unmarked) -> bytes | Found:
        """What the device makes of one request: the payload that it sends, or an answer."""
        side = run_side(plan, "device", self._segments, (array,), run=run, mark=mark)
        if plan.kind == "device" or side.exit is not None:
            return self._found(plan, side)
        return self._segments.codec(plan).encode(side.values)

    def _rehearse(self, plan: Plan, array: Array, channel: Channel | None = None) -> None:
        """All that the device computes for a request, for nothing."""
        made, channel = self._made(plan, array), channel or self._channel
        if channel is not None and not isinstance(made, Found):
            channel.warm_up(made)

    def _found(self, plan: Plan, side: SideResult) -> Found:
        """What the edge would have sent of outputs that the device computed itself."""
        specs = self.bundle.manifest.outputs
        if plan.top is None:
            return Found(Result(tuple(side.values)), side.exit)
        return Found(decode_result(plan, encode_result(plan, side.values, specs), specs), side.exit)

    def _answered(
        self, handed: Handed, plan: Plan, found: Found, stamps: Stamps, *, is_fallback: bool = False
    ) -> Ended:
        """The answer that the device computed; making it of the last stage's output is part of that stage."""
        stamps.extend()
        outcome = Outcome(
            request=handed.request,
            plan=plan.number,
            answered="fallback" if is_fallback else "device" if found.exit is None else "exit",
            start_s=handed.start_s,
            end_s=stamps.since_s,
            exit=found.exit,
        )
        return Ended(Answer(handed.request, outcome, tuple(stamps.spans), *found.result))

    def unanswered(self, handed: Handed, plan: Plan, why: Literal["dropped", "late"]) -> Ended:
        """What a stream gives for a request that has no answer."""
        outcome = Outcome(
            request=handed.request, plan=plan.number, answered=why, start_s=handed.start_s, end_s=self.now_s()
        )
        return Ended(Answer(handed.request, outcome, (), ()))

    def record(self, ended: Ended) -> Answer:
        """The answer, recorded in the timeline.

        Raises:
            RefusedError: there is none, since the edge could not give it.
        """
        self.timeline.add(ended.answer.outcome, *ended.answer.spans)
        if ended.error is not None:
            raise ended.error
        return ended.answer

    def _chosen(self, plan: int | None) -> Plan:
        number = self.plan if plan is None else plan
        if number is None:
            have = ", ".join(str(plan.number) for plan in self.bundle.manifest.menu)
            raise PlanError(f"name a plan: the menu has {have} (bundle {self.bundle.folder})")
        return self.bundle.plan(number)

    def _checked(self, x: ArrayLike) -> Array:
        spec = self.bundle.manifest.input
        array = np.asarray(x)
        if array.dtype.name != spec.dtype or array.shape not in (spec.shape, (1, *spec.shape)):
            raise DataError(
                f"a request must be {spec.dtype} {spec.shape}, got {array.dtype.name} {array.shape} "
                f"(model {self.bundle.manifest.model})"
            )
        return np.ascontiguousarray(array).reshape(1, *spec.shape)

    def _next(self) -> int:
        number = self._requests
        self._requests = (number + 1) % 2**32
        return number

    def _came_as_far_s(self) -> float:
        """When this device, slow as it is, would have come as far as this machine has now."""
        return self.now_s() + self.pace.lag_s

    def now_s(self) -> float:
        """Seconds on the device's clock."""
        return self._clock() - self._zero_s
