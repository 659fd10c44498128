"""A device that never loses a request: it chooses the plan of each, and answers itself what the link does not.

    with GuardedDevice(bundle, edge="ws://127.0.0.1:8300") as device:
        answer = device.infer(picture)                       # answer.answered: "edge", "exit", "device", "fallback"
        for answer in device.stream(camera, policy="drop-oldest", deadline_s=0.1):
            ...
        device.decisions                                     # which plan since when, and why

    camera -> [read] -> waiting -> [compute: plan, head, encode] -> [send] -> link -> [receive] -> answers
                           ^              '--- the device's own answers ------------------------->'
                           '---- again: lost, refused, or late -----------------------'

Every request ends in exactly one Answer: from the edge, an exit, the device by its plan, the device in place of the
edge ("fallback"), dropped by the stream's policy, or late, past the deadline that the caller named.  What the link is
slow with a device that has nothing else to do computes as well (`hedge`); whichever answer is there first is the one.
`Pilot` chooses, `Keeper` holds the link; both live as long as the device, a stream comes and goes.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf
from types import TracebackType
from typing import Any, Self

from numpy.typing import ArrayLike

from ..bundle import Bundle
from ..errors import PlanError
from ..profile import Conditions
from ..protocol import Reply, Terms
from ..search.goal import Goal
from ..timeline import Decision, Timeline
from .channel import Channel
from .control import Pilot
from .device import Device
from .guarded_stream import GuardedStream, begin, slow_at
from .keeper import NOTICE_S, Keeper, KeepTerms
from .own import made_up
from .pace import Pace
from .request import Answer, Asked, Ended, Event, Handed
from .stream import Policy, StreamTerms

_LOG = logging.getLogger("coinfer.device")
HEDGE = 0.3
REHEARSAL_S = 2.0


class _One:
    """Waits for what comes of one request."""

    def __init__(self) -> None:
        self._is_back = threading.Event()
        self.event: tuple[Event, float] | None = None
        self.is_over = False

    def is_wanted(self, handed: Handed) -> bool:
        """Whether anybody still waits."""
        return not self.is_over

    def heard(self, handed: Handed, asked: Asked, event: Event, received_s: float) -> None:
        """The edge answered, or said that it cannot."""
        self.event = event, received_s
        self._is_back.set()

    def again(self, handed: Handed, asked: Asked) -> None:
        """The link is lost."""
        self._is_back.set()

    def wait(self, timeout_s: float | None) -> bool:
        """Whether it came back within so long."""
        return self._is_back.wait(timeout_s)


class GuardedDevice:
    """Runs a bundle with an edge that may be slow, busy, away or hostile, and answers every request.

    Args:
        bundle: the folder that both machines hold; a plan of its menu must run on the device alone.
        edge: where the edge listens.
        plan: number of the one plan to use; None chooses for each request.
        goal, conditions, fallback, probe_s: as for `Pilot`.
        hedge: an answer is slow that is late by so many times what the device would take alone; infinity: none is.
        keep: how the link is kept, see `KeepTerms`.
        pace, threads, timeline, clock, connect: as for `Device`.
        token: what the edge knows this device by.
        tls: how a wss:// edge is verified.
        seed: of the back-off's chance.

    The link is opened in the background; making a device waits for the first try, for 2 s at most.
    For one thread; `infer` is not for the middle of a `stream`.

    Raises:
        BundleError: a plan is not on the menu, or does not fit its segments.
        PlanError: no plan of the menu runs on the device alone.
        UsageError: `edge` is no address, or a file of `tls` cannot be used.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        edge: str,
        plan: int | None = None,
        goal: Goal | None = None,
        conditions: Conditions | None = None,
        fallback: int | None = None,
        probe_s: float = 0.5,
        hedge: float = HEDGE,
        keep: KeepTerms | None = None,
        pace: Pace | None = None,
        threads: int = 1,
        timeline: Timeline | None = None,
        clock: Callable[[], float] = time.perf_counter,
        connect: Callable[..., Channel] | None = None,
        seed: int | None = None,
        **link: Any,
    ) -> None:
        if not hedge >= 0:
            raise PlanError(f"hedge must be 0 or more, got {hedge}")
        self.pilot = Pilot(
            bundle, plan=plan, goal=goal, conditions=conditions, fallback=fallback, probe_s=probe_s
        )
        self.device = Device(bundle, pace=pace, threads=threads, timeline=timeline, clock=clock)
        # So that no request pays for the loading of a plan that it is the first of.
        self.device.prepare(*(other.number for other in bundle.manifest.menu if plan in (None, other.number)))
        self.device.prepare(self.pilot.fallback.number)
        terms, keep = Terms.of(bundle), KeepTerms() if keep is None else keep
        # An idle link is silent for longer than a loss may go unnoticed, and so is one with a slow request.
        connect = connect or partial(Channel, is_watched=True)
        self.keeper = Keeper(
            partial(connect, edge, terms, timeout_s=keep.notice_s, **link),
            self.device.hear_any, self.pilot, terms=keep, now_s=self.device.now_s, seed=seed,
        )  # fmt: skip
        self._hedge = hedge
        self._is_streaming = False
        self._noted = 0
        self.keeper.wait_tried(min(keep.notice_s, NOTICE_S))
        if self.keeper.error is not None:
            self.close()
            raise self.keeper.error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the link and end its threads."""
        self.keeper.close()

    def now_s(self) -> float:
        """Seconds on the device's clock."""
        return self.device.now_s()

    @property
    def bundle(self) -> Bundle:
        """What is run."""
        return self.device.bundle

    @property
    def timeline(self) -> Timeline:
        """Spans, outcomes and decisions."""
        return self.device.timeline

    @property
    def decisions(self) -> Sequence[Decision]:
        """The latest changes of plan, each with its reason."""
        return tuple(self.pilot.decisions)

    def rehearse(self, x: ArrayLike | None = None, *, most_s: float = REHEARSAL_S) -> None:
        """Compute the device's side of each plan that may be chosen, for nothing, to learn how long it takes.

        What the bundle says of a plan may be of another machine, and of a plan that was not taken yet nothing else is
        known.  Each is timed twice and the lesser time counts; none is begun after `most_s` seconds, and what was not
        timed is judged by the others.  So are plans with exits on the device, whose time depends on the pictures.

        Args:
            x: a request; made up by default: a picture with gentle slopes and some noise.

        Raises:
            DataError: `x` is of another size or dtype than the bundle's input.
            PlanError: the device is in the middle of a stream.
        """
        self._check_free()
        x, end_s = made_up(self.bundle.manifest.input) if x is None else x, time.perf_counter() + most_s
        own_s: dict[int, float] = {}
        for plan in 2 * [plan for plan in self.pilot.plans() if not plan.exits_on("device")]:
            if time.perf_counter() < end_s:
                own_s[plan.number] = min(self.device.own_s(x, plan), own_s.get(plan.number, inf))
        if own_s:
            self.pilot.rehearsed(own_s)

    def infer(self, x: ArrayLike, *, deadline_s: float | None = None) -> Answer:
        """The answer to one request; without one by `deadline_s` it is "late".

        Raises:
            DataError: `x` is of another size or dtype than the bundle's input.
            PlanError: the deadline is not above 0, or the device is in the middle of a stream.
        """
        if deadline_s is not None and not 0 < deadline_s < inf:
            raise PlanError(f"a deadline must be above 0 s, got {deadline_s:g}")
        self._check_free()
        handed = self.device.hand(x)
        ended = self._answered(handed, deadline_s)
        if ended is None or (deadline_s is not None and ended.answer.outcome.latency_s > deadline_s):
            ended = self.device.unanswered(handed, self.pilot.fallback, "late")
        return self._record(ended)

    def _answered(self, handed: Handed, deadline_s: float | None) -> Ended | None:
        """What comes of a request; None where nothing does in time."""
        until_s = inf if deadline_s is None else handed.start_s + deadline_s
        begun = begin(self.device, self.keeper, self.pilot, handed, until_s=until_s)
        if isinstance(begun, Ended):
            return begun
        one, asked = _One(), begun[0]
        slow_s = slow_at(self.pilot, asked.plan, self.device.now_s(), self._hedge, until_s)
        self.keeper.ask(handed, *begun, one)
        left_s = min(until_s, slow_s) - self.device.now_s()
        if not one.wait(None if left_s == inf else max(0.0, left_s)):
            one.is_over = True
            if until_s <= slow_s:
                return None
        if one.event is not None and isinstance(one.event[0], Reply):
            ended = self.device.answer(asked, *one.event)
            self.pilot.answered(ended.answer.outcome.end_s - one.event[1])
            return ended
        return self.device.alone(handed, self.pilot.fallback, is_fallback=True)

    def stream(
        self,
        xs: Iterable[ArrayLike],
        *,
        window: int = 8,
        policy: Policy = "block",
        queue: int = 1,
        deadline_s: float | None = None,
        is_ordered: bool = True,
    ) -> Iterator[Answer]:
        """What came of each request of a stream, once for each.  As `Device.stream`, but no link ends it.

        A request's memory belongs to the stream until it has its answer: a source that fills one buffer again and again
        must give copies.

        Raises:
            PlanError: a number or policy is none that is allowed, or a stream is under way.
            DataError: while iterating, a request is of another size or dtype.
        """
        terms = StreamTerms(window, policy, queue, deadline_s, is_ordered)
        terms.check()
        return self._streamed(xs, terms)

    def _streamed(self, xs: Iterable[ArrayLike], terms: StreamTerms) -> Iterator[Answer]:
        self._check_free()
        self._is_streaming = True
        try:
            for answer in GuardedStream(self.device, self.keeper, self.pilot, terms, self._hedge).answers(xs):
                self._note()
                yield answer
        finally:
            self._is_streaming = False

    def _check_free(self) -> None:
        if self._is_streaming:
            raise PlanError("the device is in the middle of a stream; close it first")

    def _record(self, ended: Ended) -> Answer:
        self._note()
        return self.device.record(ended)

    def _note(self) -> None:
        """Put new decisions into the timeline."""
        new, self._noted = self.pilot.decisions_from(self._noted)
        self.timeline.add(*new)
