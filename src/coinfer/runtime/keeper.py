"""Keeps a device's link: connects, notices a loss, connects again; every request that is handed to it comes back once.

    Keeper.ask(request) --> exactly one of    sink.heard(request, event)    the edge answered, or said that it cannot
                                              sink.again(request)           the link is lost: answer it yourself

Three threads.  [send] writes requests, however long the link takes for them.  [link] connects (after a loss with
jittered back-off), then reads the connection until it breaks; replies go to the sink from there.  [watch] cuts a
connection on which nothing is heard for too long although something was asked, and beats where nothing is asked.  A
connection that is cut is never read again, and a request is never sent twice: the
edge computes it at most once, and an answer that comes too late meets nobody.
"""

from __future__ import annotations

import logging
import random
import threading
from collections.abc import Callable
from math import inf
from queue import SimpleQueue
from typing import NamedTuple, Protocol

from ..errors import LinkError, PlanError, RefusedError, UsageError
from ..protocol import HEADER_BYTES, Busy, Pong, Reply, message_wire_bytes
from .channel import Channel
from .control import Pilot
from .request import Asked, Event, Handed

_LOG = logging.getLogger("coinfer.device")
NOTICE_S = 2.0
# A request that should take longer than a third of that is waited for so many times as long.
_PATIENCE = 3.0
_JOIN_S = 1.0
# An edge that says how long a device may be silent hears of it three times in that time.
_OFTEN = 1 / 3
# An edge that refuses will most likely do so again.
_REFUSED_S = 1.0


class Sink(Protocol):
    """Who takes a request back; called from the keeper's threads, and from the one that calls `ask`."""

    def heard(self, handed: Handed, asked: Asked, event: Event, received_s: float) -> None:
        """The edge answered, or said that it cannot."""
        ...

    def again(self, handed: Handed, asked: Asked) -> None:
        """The link is lost: whatever the edge made of it will not be heard; or it was not sent."""
        ...

    def is_wanted(self, handed: Handed) -> bool:
        """Whether anybody still waits for the edge's answer."""
        ...


class KeepTerms(NamedTuple):
    """How a link is kept.

    `notice_s`: a loss is noticed within so long, or three times what a request is expected to take if that is more.
    `heartbeat_s`: so often an idle link is tried.  `backoff_s` and `most_backoff_s`: the longest wait before the first
    and any later try to connect; each is drawn, up to twice as long as the one before.
    """

    notice_s: float = NOTICE_S
    heartbeat_s: float = 5.0
    backoff_s: float = 0.1
    most_backoff_s: float = 5.0


class _Pending(NamedTuple):
    handed: Handed
    asked: Asked
    sink: Sink
    channel: Channel
    since_s: float
    patience_s: float


class _Beat(NamedTuple):
    channel: Channel
    token: int
    padding: int
    since_s: float
    is_way: bool


class Keeper:
    """Keeps the link that `connect` makes.

    Args:
        connect: makes a channel, or raises a LinkError.
        hear: reads and parses the channel's next message: an event and when its bytes had come.
        pilot: is told what happens on the link.
        terms: bounds.
        now_s: the device's clock.
        seed: of the back-off's chance; None draws one.

    Raises:
        PlanError: a bound is not above 0.
    """

    def __init__(
        self,
        connect: Callable[[], Channel],
        hear: Callable[[Channel], tuple[Event | Pong, float]],
        pilot: Pilot,
        *,
        terms: KeepTerms | None = None,
        now_s: Callable[[], float],
        seed: int | None = None,
    ) -> None:
        self.terms = KeepTerms() if terms is None else terms
        if not min(self.terms) > 0:
            given = ", ".join(f"{name} {value:g}" for name, value in self.terms._asdict().items())
            raise PlanError(f"a link's bounds must be above 0 s, got {given}")
        self.num_connected = self.num_lost = 0
        # What makes all tries useless, such as an address that is none.
        self.error: UsageError | None = None
        self._connect, self._hear, self._pilot, self._now_s = connect, hear, pilot, now_s
        self._chance = random.Random(seed)
        self._channel: Channel | None = None
        self._heard_s = 0.0
        self._pending: dict[int, _Pending] = {}
        self._to_send: SimpleQueue[_Pending | _Beat | None] = SimpleQueue()
        self._beats: dict[int, _Beat] = {}
        self._token = 2**31
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._up, self._tried = threading.Event(), threading.Event()
        self._threads = [
            threading.Thread(target=self._keep, name="coinfer-link", daemon=True),
            threading.Thread(target=self._send, name="coinfer-send", daemon=True),
            threading.Thread(target=self._watch, name="coinfer-watch", daemon=True),
            threading.Thread(target=self._adapt, name="coinfer-adapt", daemon=True),
        ]
        for thread in self._threads:
            thread.start()

    @property
    def channel(self) -> Channel | None:
        """The connection, where there is one."""
        return self._channel

    def wait_tried(self, timeout_s: float) -> None:
        """Wait until the first try to connect has come to something, for so long at most."""
        self._tried.wait(timeout_s)

    def wait_up(self, timeout_s: float) -> bool:
        """Whether there is a connection, after at most so long."""
        return self._up.wait(timeout_s)

    def close(self) -> None:
        """Cut the link and end the threads; what is in flight comes back by `again`."""
        self._closed.set()
        with self._lock:
            channel = self._channel
        if channel is not None:
            channel.abort()
        self._to_send.put(None)
        for thread in self._threads:
            if thread is not threading.current_thread():
                # One that is in the middle of connecting ends when that has come to something.
                thread.join(_JOIN_S)

    def ask(self, handed: Handed, asked: Asked, channel: Channel, sink: Sink) -> None:
        """Send a request on a channel that `channel` gave, without waiting; it comes back once, see the module."""
        now_s = self._now_s()
        asked.sent_s = now_s
        patience_s = max(self.terms.notice_s, _PATIENCE * self._pilot.expected_s(asked.plan, now_s))
        entry = _Pending(handed, asked, sink, channel, now_s, patience_s)
        with self._lock:
            is_there = channel is self._channel
            if is_there:
                self._pending[asked.request] = entry
                self._pilot.sent(asked.request, asked.plan, now_s, asked.wire_bytes)
        if is_there:
            self._to_send.put(entry)
        else:
            sink.again(handed, asked)

    def _send(self) -> None:
        while (entry := self._to_send.get()) is not None:
            try:
                # What is known no more had its connection lost before its turn came.
                if isinstance(entry, _Beat):
                    if self._beats.get(entry.token) is entry:
                        entry.channel.ping(entry.token, padding=entry.padding)
                elif self._begins(entry):
                    entry.channel.write(entry.asked.frame)
            except LinkError:
                # Whoever reads the connection learns it too, and gives back all that was on it.
                entry.channel.abort()

    def _begins(self, entry: _Pending) -> bool:
        """Whether a request is still to be sent; one that nobody waits for any more comes back."""
        request = entry.asked.request
        is_wanted = entry.sink.is_wanted(entry.handed)
        with self._lock:
            is_known = self._pending.get(request) is entry
            if is_known and not is_wanted:
                del self._pending[request]
                self._pilot.unsent(request)
                entry.channel.forget(request)
        if is_known and not is_wanted:
            entry.sink.again(entry.handed, entry.asked)
        return is_known and is_wanted

    # The thread that connects and reads.

    def _keep(self) -> None:
        wait_s, said = self.terms.backoff_s, ""
        while not self._closed.is_set():
            try:
                channel = self._connect()
            except (LinkError, UsageError) as error:
                if isinstance(error, UsageError) and not self.num_connected:
                    # No try will be better; later it may be a file that is being changed.
                    self.error = error
                    self._tried.set()
                    return
                # The same reason again and again is said once.
                _LOG.log(logging.DEBUG if str(error) == said else logging.WARNING, "no link: %s", error)
                said = str(error)
                if isinstance(error, RefusedError):
                    wait_s = max(wait_s, min(_REFUSED_S, self.terms.most_backoff_s))
                with self._lock:
                    self._pilot.lost(self._now_s(), f"no link: {error}")
                self._tried.set()
                self._closed.wait(self._chance.uniform(0, wait_s))
                wait_s = min(2 * wait_s, self.terms.most_backoff_s)
                continue
            said = ""
            since_s = self._now_s()
            why = self._read(channel)
            if self._now_s() - since_s > self.terms.notice_s:
                # It held: the next try may be soon.
                wait_s = self.terms.backoff_s
            if not self._closed.is_set():
                _LOG.warning("link lost: %s", why)
                self._closed.wait(self._chance.uniform(0, wait_s))
                wait_s = min(2 * wait_s, self.terms.most_backoff_s)

    def _read(self, channel: Channel) -> str:
        """Read a connection until it breaks; why it did."""
        with self._lock:
            self._channel, self._heard_s = channel, self._now_s()
            self._pilot.connected(self._heard_s)
            self.num_connected += 1
        self._up.set()
        self._tried.set()
        why = "closed"
        try:
            self._measure(channel)
            while not self._closed.is_set():
                event, received_s = self._hear(channel)
                self._heard_s = received_s
                if isinstance(event, Pong):
                    self._beaten(event.token, received_s)
                else:
                    self._answered(event, received_s)
        except LinkError as error:
            why = str(error)
        except BaseException as error:
            # A fault of our own must not cost the link for ever.
            _LOG.exception("the link's thread failed")
            why = f"{type(error).__name__}: {error}"
        finally:
            self._lose(channel, why)
        return why

    def _answered(self, event: Event, received_s: float) -> None:
        with self._lock:
            entry = self._pending.pop(event.request, None)
            if entry is None:
                return
            if isinstance(event, Reply):
                self._pilot.replied(event.request, received_s, event.durations)
            else:
                retry_s = event.retry_after_s if isinstance(event, Busy) else None
                self._pilot.refused(event.request, received_s, retry_s)
        entry.sink.heard(entry.handed, entry.asked, event, received_s)

    def _lose(self, channel: Channel, why: str) -> None:
        self._up.clear()
        with self._lock:
            self._channel = None
            left = [entry for entry in self._pending.values() if entry.channel is channel]
            self._pending.clear()
            self._beats.clear()
            self._pilot.lost(self._now_s(), f"link lost: {why}")
            self.num_lost += 1
        channel.abort()
        channel.close()
        for entry in left:
            entry.sink.again(entry.handed, entry.asked)

    # The thread that watches and beats.

    def _watch(self) -> None:
        tick_s = self.terms.notice_s / 8
        # Looks at equal distances could meet a camera's requests each time, and never an idle link.
        while not self._closed.wait(random.uniform(0.5, 1.0) * tick_s):
            channel = self._channel
            if channel is None:
                continue
            now_s = self._now_s()
            with self._lock:
                late = self._is_overdue(now_s + tick_s)
                is_idle = not self._pending and not self._beats
            if late:
                channel.abort()
            elif is_idle:
                self._beat_when_due(channel, now_s)
            elif not self._beats and self._pilot.wants_way(now_s):
                self._beat(channel, 0, is_way=True)

    def _adapt(self) -> None:
        """Drawing a map takes a slow device seconds: whoever watches the link must not wait for it."""
        while not self._closed.wait(self.terms.notice_s / 8):
            self._pilot.adapt()

    def _is_overdue(self, by_s: float) -> bool:
        """Whether something should have been heard before the next look."""
        for entry in self._pending.values():
            # Others may be answered meanwhile; one that never is means that something is wrong as well.
            if by_s - max(entry.since_s, self._heard_s) > entry.patience_s or (
                by_s - entry.since_s > _PATIENCE * entry.patience_s
            ):
                return True
        return any(by_s - max(beat.since_s, self._heard_s) > self.terms.notice_s for beat in self._beats.values())

    def _beat_when_due(self, channel: Channel, now_s: float) -> None:
        since_s = now_s - max(self._heard_s, self._pilot.rate.last_heard_s)
        if self._pilot.wants_probe(now_s):
            self._measure(channel)
        elif since_s >= min(self.terms.heartbeat_s, _OFTEN * (channel.limits.idle_s or inf)):
            self._beat(channel, 0)

    def _measure(self, channel: Channel) -> None:
        """Two heartbeats: a bare one for the way, one with padding for the rate."""
        self._beat(channel, 0)
        self._beat(channel, self._pilot.probe_bytes(self._now_s()))

    def _beat(self, channel: Channel, padding: int, *, is_way: bool = False) -> None:
        with self._lock:
            if channel is not self._channel:
                return
            self._token = 2**31 + (self._token + 1) % 2**31
            is_idle, now_s = not self._pending and not self._beats, self._now_s()
            beat = _Beat(channel, self._token, padding, now_s, is_way or is_idle)
            self._beats[beat.token] = beat
            self._pilot.beats(beat.token, now_s, _ping_wire_bytes(padding))
        self._to_send.put(beat)

    def _beaten(self, token: int, received_s: float) -> None:
        with self._lock:
            beat = self._beats.pop(token, None)
            if beat is not None:
                self._pilot.beaten(token, received_s, is_way=beat.is_way)


def _ping_wire_bytes(padding: int) -> int:
    """Bytes on the wire of a heartbeat."""
    return message_wire_bytes(HEADER_BYTES + padding, masked=True)
