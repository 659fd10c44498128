"""A stream over a link that may fail: what the link does not answer comes back, and the device answers it.

    waiting --> [compute] --> the link --> heard --> done
       ^            |           |
       |            |           '--- again: lost or refused ---> the device's own, before all that waits
       |            '--- slow: with nothing else to do, the device computes it as well; the first answer is the one
       '--- [read]
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from math import inf

from numpy.typing import ArrayLike

from ..errors import LinkError
from ..plan import Plan
from ..protocol import Reply
from ..timeline import Span
from .channel import Channel
from .control import Pilot
from .device import Device
from .keeper import Keeper
from .request import Asked, Ended, Event, Handed
from .stream import Done, Intake, Stream, StreamTerms, Worker

_LOG = logging.getLogger("coinfer.device")
_OWN_STAGES = ("head", "exit", "encode")
# So many times what it takes alone, the device begins before a deadline.
_SPARE = 1.5


class GuardedIntake(Intake):
    """An intake to which requests come back that the device shall answer itself; they go before all others.

    What is on the link and slow is taken when nothing else waits.  Under "block" a request has its slot before it is
    read.
    """

    def __init__(self, terms: StreamTerms, now_s: Callable[[], float]) -> None:
        super().__init__(terms)
        self._window, self._is_held, self._now_s = terms.window, terms.policy == "block", now_s
        self._back: deque[Handed] = deque()
        # On the link: when each becomes slow.  Requests that the device answers itself; that both sides have; and that
        # one of both has ended.
        self._out: dict[int, tuple[float, Handed]] = {}
        self._own: set[int] = set()
        self._has_failed = False
        self._with_both: set[int] = set()
        self._ended_once: set[int] = set()

    @property
    def has_ended(self) -> bool:
        """Whether the source gives no more."""
        return self._has_ended

    def put_held(self, handed: Handed) -> None:
        """Let one wait that has its slot."""
        with self._changed:
            self._waiting.append(handed)
            self._changed.notify_all()

    def take(self) -> Handed | None:
        """The next one; None when no more can come, not even back."""
        with self._changed:
            while not self._is_stopped:
                if self._back:
                    return self._back.popleft()
                if self._has_failed and not self._out:
                    return None
                if not self._has_failed and self._waiting and (self._is_held or self._free > 0):
                    self._free -= not self._is_held
                    return self._waiting.popleft()
                if self._has_ended and not self._waiting and self._free == self._window:
                    return None
                slow_s, slow = min(self._out.values(), default=(inf, None), key=lambda out: out[0])
                left_s = slow_s - self._now_s()
                if slow is not None and left_s <= 0:
                    del self._out[slow.request]
                    self._own.add(slow.request)
                    self._with_both.add(slow.request)
                    return slow
                self._changed.wait(None if left_s == inf else left_s)
            return None

    def fail(self) -> None:
        """A request cannot be computed: of those before it what comes back is still given, and nothing else."""
        with self._changed:
            self._has_ended = self._has_failed = True

    def is_own(self, request: int) -> bool:
        """Whether the device shall answer this one itself; asked once."""
        with self._changed:
            is_own = request in self._own
            self._own.discard(request)
            return is_own

    def has_answer(self, request: int) -> bool:
        """Whether one side has answered what both have."""
        with self._changed:
            return request in self._ended_once

    def put_out(self, handed: Handed, slow_s: float) -> None:
        """A request goes over the link."""
        with self._changed:
            self._out[handed.request] = slow_s, handed

    def again(self, handed: Handed) -> Done | None:
        """The link does not answer this one: the device shall, unless it does already; what is to be said of it."""
        with self._changed:
            request = handed.request
            self._out.pop(request, None)
            if request in self._with_both:
                self._with_both.remove(request)
            elif request in self._ended_once:
                self._ended_once.remove(request)
                return Done(handed, None, held_slot=False)
            else:
                self._back.append(handed)
                self._own.add(request)
                self._changed.notify_all()
            return None

    def ended(self, handed: Handed, ended: Ended | None) -> Done:
        """One side is through with a request: what is to be said of it."""
        with self._changed:
            request = handed.request
            self._out.pop(request, None)
            self._changed.notify_all()
            if request in self._with_both:
                # The other side will say so too; nobody waits for it.
                self._with_both.remove(request)
                self._ended_once.add(request)
                return Done(handed, ended, is_last=False)
            is_first = request not in self._ended_once
            self._ended_once.discard(request)
            return Done(handed, ended, held_slot=is_first)


class GuardedStream(Stream):
    """A stream whose requests each have a plan of their own, and come back where the link does not answer them."""

    def __init__(self, device: Device, keeper: Keeper, pilot: Pilot, terms: StreamTerms, hedge: float) -> None:
        super().__init__(device, None, pilot.fallback, terms)
        self._keeper, self._pilot, self._hedge = keeper, pilot, hedge
        self._guarded = GuardedIntake(terms, device.now_s)
        self.intake = self._guarded
        self.has_reader = True

    def read(self, xs: Iterable[ArrayLike]) -> None:
        """Take what the source gives; under "block" not before there is a slot for it."""
        if self.terms.policy != "block":
            super().read(xs)
            return
        is_handed = True
        try:
            source = iter(xs)
            while self.intake.take_slot():
                is_handed = False
                x = next(source)
                self._guarded.put_held(self._hand(x))
                is_handed = True
        except StopIteration:
            pass
        finally:
            if not is_handed:
                self.intake.free_slot()
            self.intake.end()

    def compute(self, xs: Iterable[ArrayLike]) -> None:
        """Head and encoder, request by request; behind one that fails only what comes back of those before it."""
        failure: BaseException | None = None
        while (handed := self.intake.take()) is not None:
            try:
                self._compute(handed)
            except BaseException as error:
                if failure is not None:
                    raise
                failure, self.broken = error, handed.request
                self._guarded.fail()
        if failure is not None:
            raise failure

    def _is_finished(self, compute: Worker) -> bool:
        """What has its answer needs nobody who waits until all are rid of it."""
        return (self._guarded.has_ended and not self.order) or super()._is_finished(compute)

    def _compute(self, handed: Handed) -> None:
        is_own = self._guarded.is_own(handed.request)
        if self._left_s(handed) <= 0:
            self.done.put(self._guarded.ended(handed, None))
            return
        until_s = self.device.now_s() + self._left_s(handed)
        begun = begin(self.device, self._keeper, self._pilot, handed, is_own=is_own, until_s=until_s)
        if isinstance(begun, Ended):
            self.done.put(self._guarded.ended(handed, begun))
            return
        asked, channel = begun
        self._guarded.put_out(handed, slow_at(self._pilot, asked.plan, self.device.now_s(), self._hedge, until_s))
        self._keeper.ask(handed, asked, channel, self)

    def heard(self, handed: Handed, asked: Asked, event: Event, received_s: float) -> None:
        """From the keeper: the edge answered, or said that it cannot."""
        if isinstance(event, Reply):
            ended = self.device.answer(asked, event, received_s)
            self._pilot.answered(ended.answer.outcome.end_s - received_s)
            self.done.put(self._guarded.ended(handed, ended))
        else:
            self.again(handed, asked)

    def again(self, handed: Handed, asked: Asked) -> None:
        """From the keeper: the link is lost, or did not take it."""
        done = self._guarded.again(handed)
        if done is not None:
            self.done.put(done)

    def is_wanted(self, handed: Handed) -> bool:
        """Whether there is no answer yet, and it would not be late."""
        return self._left_s(handed) > 0 and not self._guarded.has_answer(handed.request)


def begin(
    device: Device, keeper: Keeper, pilot: Pilot, handed: Handed, *, is_own: bool = False, until_s: float = inf
) -> Ended | tuple[Asked, Channel]:
    """The device's own answer, or what it asks of the edge and on which connection; `is_own`: without the edge.

    The answer is wanted by `until_s`.
    """
    choice = None if is_own else pilot.choose(device.now_s(), handed.request, until_s=until_s)
    plan = pilot.fallback if choice is None else choice.plan
    is_fallback = choice is None or choice.is_fallback
    if plan.kind != "device":
        channel = keeper.channel
        try:
            if channel is not None:
                asked = device.ask(handed, plan, channel)
                pilot.computed(plan, _own_s(asked.answer.spans if isinstance(asked, Ended) else asked.spans))
                return asked if isinstance(asked, Ended) else (asked, channel)
        except LinkError as error:
            # It closed meanwhile, or takes no message of that size.
            extra = {"request": handed.request, "plan": plan.number}
            _LOG.warning("request %d is answered by the device: %s", handed.request, error, extra=extra)
            if channel is not None and keeper.channel is channel:
                pilot.leave_out(plan, str(error))
        plan, is_fallback = pilot.fallback, True
    ended = device.alone(handed, plan, is_fallback=is_fallback)
    pilot.computed(plan, _own_s(ended.answer.spans))
    return ended


def slow_at(pilot: Pilot, plan: Plan, now_s: float, hedge: float, until_s: float) -> float:
    """When a request that is sent now is slow: the device computes it as well, in time for `until_s` if that can be."""
    slow_s = pilot.late_s(plan, now_s, hedge)
    if hedge == inf or until_s == inf:
        return slow_s
    # Somewhat more than the device should take.
    latest_s = until_s - _SPARE * pilot.own_s
    return min(slow_s, latest_s) if latest_s > now_s else slow_s


def _own_s(spans: Iterable[Span]) -> float:
    """Seconds that the device computed."""
    return sum(span.end_s - span.start_s for span in spans if span.stage in _OWN_STAGES)
