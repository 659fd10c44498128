"""The device: runs a bundle's plans, alone or with an edge.

    with Device(bundle, edge="ws://127.0.0.1:8300", plan=3) as device:
        answer = device.infer(picture)                  # one request
        for answer in device.stream(pictures):          # a stream: computing, sending, receiving overlap
            ...                                         # answer.label, answer.outcome.latency_s

A request is a picture (H, W, C) uint8, or whatever `bundle.manifest.input` states, with or without a leading 1.
All that the device computes goes through its `Pace`: segments with the plan's precision, coding and framing as
fp32 work.  Every request ends in an Answer or an error; there is no silent fallback.  Spans are on the
device's clock, seconds since the Device was made; the edge's spans are durations on the edge's own clock.

Nothing here imports torch or a server.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..bundle import Bundle
from ..engine.segments import Segments
from ..errors import DataError, PlanError, RefusedError
from ..plan import Plan
from ..protocol import Failure, Pong, Reply, Result, Terms, decode_result, encode_result, message_wire_bytes
from ..timeline import Answered, Outcome, Span, Timeline
from .channel import Channel
from .pace import AsFastAsItGoes, Pace
from .recent import RecentTimeline
from .stream import overlapped

Array = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request.

    Either `outputs`, the network's output tensors (1, *shape), or with `plan.top` the best `classes` (k,) with
    their softmax `scores` (k,), best first.
    """

    request: int
    outcome: Outcome
    spans: tuple[Span, ...]
    outputs: tuple[Array, ...]
    classes: NDArray[np.int64] | None = None
    scores: NDArray[np.float32] | None = None

    @property
    def answered(self) -> Answered:
        """Which machine answered."""
        return self.outcome.answered

    @property
    def label(self) -> int:
        """The best class."""
        return int(self.outputs[0].argmax()) if self.classes is None else int(self.classes[0])


@dataclass(slots=True)
class Asked:
    """A request on its way: framed and ready to be sent, with what has happened to it so far."""

    request: int
    plan: Plan
    start_s: float
    frame: bytes
    payload_bytes: int
    wire_bytes: int
    spans: list[Span] = field(default_factory=list)
    sent_s: float = 0.0


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
    ) -> None:
        self.bundle = bundle
        self.edge = edge
        self.plan = plan
        self.pace: Pace = AsFastAsItGoes() if pace is None else pace
        self.timeline = RecentTimeline() if timeline is None else timeline
        self._segments = Segments(bundle.path, bundle.manifest.outputs, threads=threads)
        self._terms = Terms.of(bundle)
        self._timeout_s = timeout_s
        self._zero_s = time.perf_counter()
        self._requests = 0
        self._channel: Channel | None = None
        self._is_streaming = False
        if plan is not None:
            self.prepare(plan)
        if edge is not None:
            self._channel = Channel(edge, self._terms, timeout_s=timeout_s)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
            if plan.head is not None:
                self._segments.head(plan)
            if plan.codec is not None:
                self._segments.codec(plan)

    def warm_up(self, x: ArrayLike, *, plan: int | None = None) -> None:
        """Compute once, for nothing, what the device computes for a request: the next one finds warm caches.

        Raises:
            DataError: as `infer`.
        """
        chosen = self._chosen(plan)
        crossing: Any = (self._checked(x),)
        if chosen.head is not None:
            crossing = self._segments.head(chosen).run(crossing)
        if chosen.codec is not None:
            payload = self._segments.codec(chosen).encode(crossing)
            if self._channel is not None:
                self._channel.warm_up(payload)

    def infer(self, x: ArrayLike, *, plan: int | None = None) -> Answer:
        """The answer to one request, by `plan` or the device's own.

        Raises:
            DataError: `x` is of another size or dtype than the bundle's input.
            PlanError: no plan was named, or it needs an edge and none was given.
            RefusedError: the edge could not answer this request; the connection lives on.
            LinkError: the link broke, or was silent for `timeout_s`.
        """
        chosen = self._chosen(plan)
        if chosen.kind == "device":
            return self._alone(x, chosen)
        channel = self.channel()
        asked = self.ask(x, chosen, channel)
        is_done = False
        try:
            self.send(asked, channel)
            event, received_s = self.hear(channel)
            is_done = True
        finally:
            if not is_done:
                self.drop()
        answer = self.answer(asked, event, received_s)
        if isinstance(answer, RefusedError):
            raise answer
        return answer

    def stream(self, xs: Iterable[ArrayLike], *, plan: int | None = None, window: int = 8) -> Iterator[Answer]:
        """The answers to a stream of requests, in order, as they come.

        Computing, sending and receiving overlap; at most `window` requests are between being read
        from `xs` and being taken from here.  `xs` is read in a thread of its own.  An error in `xs` or in a
        request is raised when all earlier answers have been given.  Closing the iterator early cuts
        the connection; the next request opens another.

        Raises:
            PlanError: as `infer`; or `window` is below 1; the rest as `infer`, while iterating.
        """
        if window < 1:
            raise PlanError(f"a stream's window must be at least 1, got {window}")
        chosen = self._chosen(plan)
        if chosen.kind == "device":
            return (self._alone(x, chosen) for x in xs)
        return overlapped(self, xs, chosen, window)

    def ping(self) -> float:
        """Seconds of one heartbeat to the edge and back.

        Raises:
            LinkError: the link broke.
        """
        channel = self.channel()
        start_s = self._now_s()
        channel.ping(self._next())
        while not isinstance(channel.parse(channel.read()), Pong):
            pass
        return self._now_s() - start_s

    # What a stream's threads share with `infer`.

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
            self._channel = Channel(self.edge, self._terms, timeout_s=self._timeout_s)
        return self._channel

    def claim(self, is_streaming: bool) -> None:
        """Say that a stream has begun or ended."""
        self._is_streaming = is_streaming

    def drop(self) -> None:
        """Close the connection in whatever state; the next request opens another."""
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.abort()
            channel.close()

    def ask(self, x: ArrayLike, plan: Plan, channel: Channel) -> Asked:
        """Compute the head, encode and frame one request.

        Raises:
            DataError: `x` is of another size or dtype than the bundle's input.
        """
        array = self._checked(x)
        request = self._next()
        codec = self._segments.codec(plan)
        head = self._segments.head(plan) if plan.kind == "split" else None
        start_s = middle_s = self._now_s()

        def compute() -> tuple[bytes, int, int]:
            nonlocal middle_s
            crossing: Any = (array,)
            if head is not None:
                crossing = self.pace.run(plan.precision, lambda: head.run((array,)))
                middle_s = self._now_s() + self.pace.lag_s
            payload = codec.encode(crossing)
            return *channel.frame(request, plan.number, payload), len(payload)

        frame, message_bytes, payload_bytes = self.pace.run("fp32", compute)
        spans = [Span(request=request, stage="encode", start_s=middle_s, end_s=max(middle_s, self._now_s()))]
        if head is not None:
            spans.insert(0, Span(request=request, stage="head", start_s=start_s, end_s=middle_s))
        wire = message_wire_bytes(message_bytes, masked=True)
        return Asked(request, plan, start_s, frame, payload_bytes, wire, spans)

    def send(self, asked: Asked, channel: Channel) -> None:
        """Write a request to the link, and note when."""
        asked.sent_s = self._now_s()
        channel.write(asked.frame)

    def hear(self, channel: Channel) -> tuple[Reply | Failure, float]:
        """The edge's next answer, and when its bytes had arrived."""
        while True:
            message = channel.read()
            received_s = self._now_s()
            parse, rehearse = partial(channel.parse, message), partial(channel.rehearse, message)
            event = self.pace.run("fp32", parse, rehearse)
            if isinstance(event, Reply | Failure):
                return event, received_s

    def answer(self, asked: Asked, event: Reply | Failure, received_s: float) -> Answer | RefusedError:
        """The answer to a request from the edge's event, or why it has none; recorded in the timeline."""
        end_s = self._now_s()
        is_answered = isinstance(event, Reply)
        outcome = Outcome(
            request=asked.request,
            plan=asked.plan.number,
            answered="edge" if is_answered else "failed",
            start_s=asked.start_s,
            end_s=end_s,
            payload_bytes=asked.payload_bytes,
            wire_bytes=asked.wire_bytes,
            reply_wire_bytes=message_wire_bytes(event.num_bytes, masked=False),
        )
        spans = (*asked.spans, *_link_spans(asked, event, received_s))
        self.timeline.add(outcome, *spans)
        if isinstance(event, Failure):
            text = f"request {asked.request}: {event.text} ({asked.plan.label})"
            return RefusedError(f"the edge could not answer {text}")
        return Answer(asked.request, outcome, spans, *event.result)

    def _alone(self, x: ArrayLike, plan: Plan) -> Answer:
        """The answer by the device alone."""
        array = self._checked(x)
        request = self._next()
        head = self._segments.head(plan)
        specs = self.bundle.manifest.outputs

        def compute() -> Result:
            outputs = head.run((array,))
            if plan.top is None:
                return Result(tuple(outputs))
            return decode_result(plan, encode_result(plan, outputs, specs), specs)

        start_s = self._now_s()
        result = self.pace.run(plan.precision, compute)
        end_s = self._now_s()
        span = Span(request=request, stage="head", start_s=start_s, end_s=end_s)
        outcome = Outcome(request=request, plan=plan.number, answered="device", start_s=start_s, end_s=end_s)
        self.timeline.add(outcome, span)
        return Answer(request, outcome, (span,), *result)

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

    def _now_s(self) -> float:
        return time.perf_counter() - self._zero_s


def _link_spans(asked: Asked, event: Reply | Failure, received_s: float) -> list[Span]:
    """The exchange on the device's clock, and the edge's durations on the edge's."""
    request = asked.request
    sent_s, num_bytes = asked.sent_s, asked.wire_bytes
    spans = [Span(request=request, stage="exchange", start_s=sent_s, end_s=received_s, num_bytes=num_bytes)]
    if isinstance(event, Reply):
        at_s = 0.0
        for stage, duration_us in zip(("wait", "decode", "tail"), event.durations, strict=True):
            after_s = at_s + duration_us * 1e-6
            spans.append(Span(request=request, stage=stage, start_s=at_s, end_s=after_s, clock="edge"))
            at_s = after_s
    return spans
