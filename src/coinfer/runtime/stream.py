"""A stream of requests in which computing, sending and receiving overlap.

    xs --> [compute: head, encode] --> to_send --> [send] --> on_the_way --> [receive] --> done --> caller
              |                                                                              |
              +------- at most `window` requests from here ---------------- to here ---------+

Three threads, one for each box; the link's two directions and the device's core are three resources, and
none waits for another.  The one bound is the window: a slot is taken before a request is computed and given
back when the caller takes its answer, so a slow link, edge or caller holds back all that lies before it.

An error in `xs` or in computing ends the stream behind the answers to everything before it; an error of
the link ends it at once.  Whichever way the stream ends, its threads end with it (one that waits inside `xs`
ends when `xs` gives its next item).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from queue import SimpleQueue
from typing import TYPE_CHECKING

from numpy.typing import ArrayLike

from ..errors import RefusedError
from ..plan import Plan
from .channel import Channel

if TYPE_CHECKING:
    from .device import Answer, Asked, Device

JOIN_S = 1.0


class _Worker(threading.Thread):
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


class _Stream:
    """The queues between the boxes, and the boxes."""

    def __init__(self, device: Device, channel: Channel, plan: Plan, window: int) -> None:
        self.device = device
        self.channel = channel
        self.plan = plan
        self.slots = threading.Semaphore(window)
        self.stopped = threading.Event()
        self.is_complete = False
        self.order: deque[int] = deque()
        self.asked: dict[int, Asked] = {}
        self.to_send: SimpleQueue[Asked | None] = SimpleQueue()
        self.on_the_way: SimpleQueue[bool] = SimpleQueue()
        # None: a worker has ended.
        self.done: SimpleQueue[tuple[int, Answer | RefusedError] | None] = SimpleQueue()

    def compute(self, xs: Iterable[ArrayLike]) -> None:
        """Head and encoder, request by request."""
        try:
            for x in xs:
                self.slots.acquire()
                if self.stopped.is_set():
                    break
                asked = self.device.ask(x, self.plan, self.channel)
                self.order.append(asked.request)
                self.to_send.put(asked)
        finally:
            self.to_send.put(None)

    def send(self) -> None:
        """Write each request to the link."""
        try:
            while (asked := self.to_send.get()) is not None and not self.stopped.is_set():
                self.asked[asked.request] = asked
                self.on_the_way.put(True)
                self.device.send(asked, self.channel)
        finally:
            self.on_the_way.put(False)

    def receive(self) -> None:
        """Read one answer for each request that went out; they may come in another order."""
        while self.on_the_way.get() and not self.stopped.is_set():
            event, received_s = self.device.hear(self.channel)
            asked = self.asked.pop(event.request)
            self.done.put((asked.request, self.device.answer(asked, event, received_s)))

    def answers(self, xs: Iterable[ArrayLike]) -> Iterator[Answer]:
        """Start the boxes and give the answers in order; `is_complete` where every request has its answer."""
        compute = self._worker("compute", lambda: self.compute(xs))
        link = (self._worker("receive", self.receive), self._worker("send", self.send))
        ready: dict[int, Answer | RefusedError] = {}
        try:
            for worker in (compute, *link):
                worker.start()
            while not (compute.has_ended and not self.order):
                item = self.done.get()
                if item is None:
                    _raise_first(link)
                    continue
                ready[item[0]] = item[1]
                while self.order and self.order[0] in ready:
                    answer = ready.pop(self.order.popleft())
                    self.slots.release()
                    if isinstance(answer, RefusedError):
                        raise answer
                    yield answer
            self.is_complete = True
        finally:
            if not self.is_complete:
                self._stop()
            for worker in link:
                worker.join()
            compute.join(JOIN_S)
        _raise_first((compute,))

    def _worker(self, name: str, work: Callable[[], None]) -> _Worker:
        return _Worker(name, work, lambda: self.done.put(None))

    def _stop(self) -> None:
        """Wake every box, wherever it waits, and have it end."""
        self.stopped.set()
        self.channel.abort()
        self.slots.release()
        self.to_send.put(None)
        self.on_the_way.put(False)


def _raise_first(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        if worker.error is not None:
            raise worker.error


def overlapped(device: Device, xs: Iterable[ArrayLike], plan: Plan, window: int) -> Iterator[Answer]:
    """The answers of `device` to `xs` by a plan that needs the edge, in order; see the module."""
    channel = device.channel()
    device.claim(True)
    stream = _Stream(device, channel, plan, window)
    try:
        yield from stream.answers(xs)
    finally:
        device.claim(False)
        # With answers still under way the connection is of no use to the next request.
        if not stream.is_complete:
            device.drop()
