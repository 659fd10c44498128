"""A stream of requests in which computing, sending and receiving overlap.

    xs --> [compute: head, encode] --> to_send --> [send] --> on_the_way --> [receive] --> done --> caller
              |                                                                              |
              +------- at most `window` requests from here ---------------- to here ---------+

Three threads, one for each box; the link's two directions and the device's core are three resources, and
none waits for another.  The one bound is the window: a slot is taken before a request is computed and given
back when the caller takes its answer, so a slow link, edge or caller holds back all that lies before it.
An answer of the device itself (an exit, a device plan) goes from the first box to `done` at once.

A stream that drops has one box more: [read] takes from a live source whatever it gives and puts it into a short
queue, which the policy keeps short.  A request that is late has its Answer at its deadline; its slot is given
back when the link is rid of it, so that a link that stands still does not fill up.

An error in `xs` or in computing ends the stream behind the answers to everything before it; an error of
the link ends it at once.  Whichever way the stream ends, its threads end with it (one that waits inside `xs`
ends when `xs` gives its next item).
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Literal, NamedTuple

from numpy.typing import ArrayLike

from ..errors import PlanError
from ..plan import Plan
from .channel import Channel
from .request import Answer, Asked, Ended, Handed

if TYPE_CHECKING:
    from .device import Device

JOIN_S = 1.0
Policy = Literal["block", "drop-oldest", "drop-newest"]
POLICIES: tuple[Policy, ...] = ("block", "drop-oldest", "drop-newest")


class StreamTerms(NamedTuple):
    """How a stream is to be run, see `Device.stream`."""

    window: int = 8
    policy: Policy = "block"
    queue: int = 1
    deadline_s: float | None = None
    is_ordered: bool = True

    def check(self) -> None:
        """Raise where a number or the policy is none that is allowed.

        Raises:
            PlanError: one is.
        """
        if self.window < 1 or self.queue < 1 or not (self.deadline_s is None or 0 < self.deadline_s < math.inf):
            given = f"window {self.window}, queue {self.queue}, deadline {self.deadline_s}"
            raise PlanError(f"a stream's window and queue must be at least 1, its deadline above 0 s, got {given}")
        if self.policy not in POLICIES:
            raise PlanError(f'a stream\'s policy must be one of {", ".join(POLICIES)}, got "{self.policy}"')


class Worker(threading.Thread):
    """Runs one of the boxes; what ends it is raised again in the caller's thread."""

    def __init__(self, name: str, work: Callable[[], None], ended: Callable[[], None]) -> None:
        super().__init__(name=f"coinfer-{name}", daemon=True)
        self.error: BaseException | None = None
        self.has_ended = False
        self._work = work
        self._ended = ended

    def run(self) -> None:
        """Run the box."""
        try:
            self._work()
        except BaseException as error:
            self.error = error
        finally:
            self.has_ended = True
            self._ended()


class Intake:
    """Where requests wait to be computed, at most `queue` of them, each until one of `window` slots is free."""

    def __init__(self, terms: StreamTerms) -> None:
        self._terms = terms
        self._free = terms.window
        self._waiting: deque[Handed] = deque()
        self._changed = threading.Condition()
        self._has_ended = self._is_stopped = False

    def put(self, handed: Handed) -> Handed | None:
        """Let one wait; gives the one that is dropped for it, which may be itself."""
        with self._changed:
            is_full = len(self._waiting) == self._terms.queue
            if is_full and self._terms.policy == "drop-newest":
                return handed
            dropped = self._waiting.popleft() if is_full else None
            self._waiting.append(handed)
            self._changed.notify_all()
            return dropped

    def take(self) -> Handed | None:
        """The next one, with a slot; None where no more will come.

        It waits for the slot first: until there is one, a newer request may take its place.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._is_stopped or (self._free > 0 if self._waiting else self._has_ended),
            )
            if self._is_stopped or not self._waiting:
                return None
            self._free -= 1
            return self._waiting.popleft()

    def take_slot(self) -> bool:
        """Wait for a slot alone; False where the stream was stopped."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_stopped or self._free > 0)
            self._free -= 1
            return not self._is_stopped

    def free_slot(self) -> None:
        """A request is over."""
        with self._changed:
            self._free += 1
            self._changed.notify_all()

    def end(self) -> None:
        """No more will come."""
        with self._changed:
            self._has_ended = True
            self._changed.notify_all()

    def stop(self) -> None:
        """Let nobody wait any longer."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()


class Done(NamedTuple):
    """What is said of a request: how it ended, or why it has no answer.

    `held_slot`: its slot is given back by this.  `is_last` False: somebody else has it still, and will say so when he
    is rid of it; nobody will be told what he made of it.
    """

    handed: Handed
    ended: Ended | None
    why: Literal["dropped", "late"] = "late"
    held_slot: bool = True
    is_last: bool = True


class Stream:
    """The queues between the boxes, and the boxes.  How a request ends is decided in the caller's thread alone."""

    def __init__(self, device: Device, channel: Channel | None, plan: Plan, terms: StreamTerms) -> None:
        self.device = device
        self.channel = channel
        self.plan = plan
        self.terms = terms
        self.stopped = threading.Event()
        self.is_complete = False
        self.intake = Intake(terms)
        self.has_reader = terms.policy != "block"
        # From the first request on that is not over, in the order in which they came.
        self.order: deque[Handed] = deque()
        self.broken: int | None = None
        self.asked: dict[int, tuple[Handed, Asked]] = {}
        self.to_send: SimpleQueue[tuple[Handed, Asked] | None] = SimpleQueue()
        self.on_the_way: SimpleQueue[bool] = SimpleQueue()
        # None: a worker has ended.
        self.done: SimpleQueue[Done | None] = SimpleQueue()

    def read(self, xs: Iterable[ArrayLike]) -> None:
        """Take what a live source gives; what the queue has no room for is dropped."""
        try:
            for x in xs:
                if self.stopped.is_set():
                    break
                dropped = self.intake.put(self._hand(x))
                if dropped is not None:
                    self.done.put(Done(dropped, None, "dropped", held_slot=False))
        finally:
            self.intake.end()

    def compute(self, xs: Iterable[ArrayLike]) -> None:
        """Head and encoder, request by request."""
        try:
            for handed in iter(self.intake.take, None) if self.has_reader else self._one_by_one(xs):
                try:
                    self._compute(handed)
                except BaseException:
                    self.broken = handed.request
                    raise
        finally:
            self.to_send.put(None)

    def _one_by_one(self, xs: Iterable[ArrayLike]) -> Iterator[Handed]:
        """Requests that are handed in when there is a slot for them."""
        for x in xs:
            if not self.intake.take_slot():
                return
            yield self._hand(x)

    def _compute(self, handed: Handed) -> None:
        if self._left_s(handed) <= 0:
            self.done.put(Done(handed, None))
            return
        if self.channel is None:
            self.done.put(Done(handed, self.device.alone(handed, self.plan)))
            return
        asked = self.device.ask(handed, self.plan, self.channel)
        if isinstance(asked, Ended):
            self.done.put(Done(handed, asked))
        else:
            self.to_send.put((handed, asked))

    def send(self) -> None:
        """Write each request to the link."""
        assert self.channel is not None
        try:
            while (item := self.to_send.get()) is not None and not self.stopped.is_set():
                asked = item[1]
                self.asked[asked.request] = item
                self.on_the_way.put(True)
                self.device.send(asked, self.channel)
        finally:
            self.on_the_way.put(False)

    def receive(self) -> None:
        """Read one answer for each request that went out; they may come in another order."""
        assert self.channel is not None
        while self.on_the_way.get() and not self.stopped.is_set():
            event, received_s = self.device.hear(self.channel)
            handed, asked = self.asked.pop(event.request)
            self.done.put(Done(handed, self.device.answer(asked, event, received_s)))

    def answers(self, xs: Iterable[ArrayLike]) -> Iterator[Answer]:
        """Start the boxes and give the answers; `is_complete` where nothing is left on the link."""
        compute = self._worker("compute", lambda: self.compute(xs))
        readers = (self._worker("read", lambda: self.read(xs)),) if self.has_reader else ()
        link = () if self.channel is None else (self._worker("receive", self.receive), self._worker("send", self.send))
        try:
            for worker in (*readers, compute, *link):
                worker.start()
            yield from self._given(compute, link)
        finally:
            self._stop()
            for worker in link:
                worker.join()
            for worker in (*readers, compute):
                worker.join(JOIN_S)
        _raise_first((*readers, compute))

    def _given(self, compute: Worker, link: Iterable[Worker]) -> Iterator[Answer]:
        """What the caller is given, until all requests are over."""
        finished: dict[int, Done] = {}
        late: set[int] = set()
        while not self._is_finished(compute):
            done = self._next()
            if done is None:
                _raise_first(link)
                continue
            request = done.handed.request
            if request in late:
                if done.is_last:
                    late.remove(request)
                if done.held_slot:
                    self.intake.free_slot()
                continue
            if not done.is_last:
                late.add(request)
            if not self.terms.is_ordered:
                yield self._give(done)
            finished[request] = done
            while self.order and self.order[0].request in finished:
                first = finished.pop(self.order.popleft().request)
                if self.terms.is_ordered:
                    yield self._give(first)
        self.is_complete = not late

    def _is_finished(self, compute: Worker) -> bool:
        """Whether all that will be said has been."""
        return compute.has_ended and self._is_over()

    def _is_over(self) -> bool:
        """Whether the requests that are left, if any, come behind one whose computing failed."""
        if not self.order:
            return True
        return self.broken is not None and (self.order[0].request - self.broken) % 2**32 < 2**31

    def _next(self) -> Done | None:
        """What is said next; or that the first request's deadline has passed."""
        limit_s = self.terms.deadline_s
        while limit_s is not None:
            first = self.order[0] if self.order else None
            try:
                return self.done.get(timeout=limit_s if first is None else max(0.0, self._left_s(first)))
            except Empty:
                if first is not None and self._left_s(first) <= 0:
                    return Done(first, None, held_slot=False, is_last=False)
        return self.done.get()

    def _left_s(self, handed: Handed) -> float:
        """Seconds until a request is late."""
        limit_s = self.terms.deadline_s
        return math.inf if limit_s is None else handed.start_s + limit_s - self.device.now_s()

    def _give(self, done: Done) -> Answer:
        if done.held_slot:
            self.intake.free_slot()
        ended, limit_s = done.ended, self.terms.deadline_s
        if ended is not None and limit_s is not None and ended.answer.outcome.latency_s > limit_s:
            # Too late, although nobody was waiting when its deadline passed.
            ended = None
        return self.device.record(ended or self.device.unanswered(done.handed, self.plan, done.why))

    def _hand(self, x: ArrayLike) -> Handed:
        handed = self.device.hand(x)
        self.order.append(handed)
        return handed

    def _worker(self, name: str, work: Callable[[], None]) -> Worker:
        return Worker(name, work, lambda: self.done.put(None))

    def _stop(self) -> None:
        """Have every box end, wherever it waits; where something is left on the link, with the link."""
        self.stopped.set()
        self.intake.stop()
        self.to_send.put(None)
        self.on_the_way.put(False)
        if not self.is_complete and self.channel is not None:
            self.channel.abort()


def _raise_first(workers: Iterable[Worker]) -> None:
    for worker in workers:
        if worker.error is not None:
            raise worker.error


def overlapped(device: Device, xs: Iterable[ArrayLike], plan: Plan, terms: StreamTerms) -> Iterator[Answer]:
    """The answers of `device` to `xs` by a plan; see the module."""
    channel = None if plan.kind == "device" else device.channel()
    device.claim(True)
    stream = Stream(device, channel, plan, terms)
    try:
        yield from stream.answers(xs)
    finally:
        device.claim(False)
        # With answers still under way the connection is of no use to the next request.
        if not stream.is_complete:
            device.drop()
