"""One device whose every request has a plan of its own, over a link that moves: a pilot, one plan, or an oracle.

    arrival -> [waits for a slot] -> [choose, then device's core] -> uplink (trace) -> edge -> downlink -> answer

    simulate_pilot   whoever chooses is told what a device would know when it would know it (`runtime.control.Pilot`)
    oracle           for each request the plan with the earliest finish, the link's future known

Service times are those of `search.line`; each resource serves one request after another.  A request of which nothing is
heard for too long, and all others on the link with it, are answered by the device; the link comes back by a handshake
that its rate must carry.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import count
from random import Random
from typing import Any, NamedTuple, Protocol

from ..errors import PlanError
from ..profile import Link
from ..protocol import Durations
from ..search.line import Line
from .transfer import Transfer

# A new connection: what it sends, and how often it goes there and back.
_GREETING_BYTES, _GREETING_TRIPS = 1500.0, 3
_BACKOFF_S = 0.05
# What of a cut connection the link has taken and still carries.
_BUFFERED_BYTES = 16384.0
_PATIENCE = 3.0


class Chooser(Protocol):
    """Who chooses plans, as `runtime.control.Pilot`; a plan has a `number` and a `kind`."""

    fallback: Any

    def choose(self, now_s: float, request: int | None = None) -> Any:
        """(plan, whether it is a fallback) of a request that is begun now."""

    def connected(self, now_s: float) -> None:
        """There is a link."""

    def lost(self, now_s: float, why: str) -> None:
        """There is none."""

    def sent(self, request: int, plan: Any, now_s: float, wire_bytes: int) -> None:
        """A request was handed to the link."""

    def computed(self, plan: Any, took_s: float) -> None:
        """The device computed its side."""

    def answered(self, beyond_s: float) -> None:
        """So long a reply took from its arrival to the answer."""

    def replied(self, request: int, now_s: float, durations: Durations) -> None:
        """The edge answered."""

    def beats(self, token: int, now_s: float, wire_bytes: int) -> None:
        """A heartbeat was sent."""

    def beaten(self, token: int, now_s: float, *, is_way: bool) -> None:
        """A heartbeat came back."""

    def wants_way(self, now_s: float) -> bool:
        """Whether a heartbeat should tell the way though the link is not idle."""

    def wants_probe(self, now_s: float) -> bool:
        """Whether the link should be measured now, if it is idle."""

    def probe_bytes(self, now_s: float) -> int:
        """The padding of a heartbeat that measures."""

    def expected_s(self, plan: Any, now_s: float) -> float:
        """Seconds that a request should take."""

    def late_s(self, plan: Any, now_s: float, hedge: float) -> float:
        """When the answer to a request that is sent now is late."""

    def adapt(self) -> None:
        """Draw the map anew, where that is due."""


class Ended(NamedTuple):
    """One request: its plan, who answered, from when to when."""

    request: int
    plan: int
    answered: str
    start_s: float
    end_s: float

    @property
    def latency_s(self) -> float:
        """Seconds from its arrival to its answer."""
        return self.end_s - self.start_s


class _Pending(NamedTuple):
    plan: Any
    since_s: float
    patience_s: float
    hedge_s: float


class _World:
    """Made-up time: what happens next, in order."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = count()

    def at(self, time_s: float, do: Callable[[], None]) -> None:
        """Have something done at a time."""
        heapq.heappush(self._events, (time_s, next(self._numbers), do))

    def run(self, is_over: Callable[[], bool]) -> None:
        """Let time pass until it is over."""
        while self._events and not is_over():
            self.now_s, _, do = heapq.heappop(self._events)
            do()


class _Run:
    """One device under a chooser."""

    def __init__(
        self,
        chooser: Chooser,
        lines: Mapping[int, Line],
        arrivals_s: Sequence[float],
        link: Link,
        *,
        window: int,
        notice_s: float,
        hedge: float,
        pauses_s: Sequence[float],
    ) -> None:
        self.hedge = hedge
        self.pauses_s = dict(enumerate(map(float, pauses_s)))
        self.world, self.chooser, self.lines = _World(), chooser, lines
        self.link, self.window, self.notice_s = link, window, notice_s
        self.uplink, self.downlink = Transfer(link, is_uplink=True), Transfer(link, is_uplink=False)
        self.arrivals_s = arrivals_s
        self.is_computing = self.is_up = False
        self.link_free_s = self.edge_free_s = self.heard_s = 0.0
        self.outstanding = self.epoch = 0
        self.waiting: deque[int] = deque()
        self.back: deque[int] = deque()
        self.pending: dict[int, _Pending] = {}
        # Requests on the link that the device computes as well, and those that have ended.
        self.hedged: set[int] = set()
        self.over: set[int] = set()
        self.beats: dict[int, float] = {}
        self.tokens, self.looks = count(2**31), Random(0)
        self.ended: list[Ended] = []

    def run(self) -> list[Ended]:
        """All requests, in order."""
        world = self.world
        self._connect()
        for request, at_s in enumerate(self.arrivals_s):
            world.at(float(at_s), partial(self._arrive, request))
        self._watch()
        world.run(lambda: len(self.ended) == len(self.arrivals_s))
        return sorted(self.ended)

    # The device.

    def _arrive(self, request: int) -> None:
        self.waiting.append(request)
        self._begin()

    def _begin(self) -> None:
        if self.is_computing:
            return
        if self.back:
            self._compute(self.back.popleft(), self.chooser.fallback, is_fallback=True)
        elif self.waiting and self.outstanding < self.window:
            request = self.waiting.popleft()
            self.outstanding += 1
            plan, is_fallback = self.chooser.choose(self.world.now_s, request)
            self._compute(request, plan, is_fallback=is_fallback)
        else:
            self._hedge()

    def _hedge(self) -> None:
        """With nothing else to do, the device computes what the link is late with."""
        due = [(entry.hedge_s, request) for request, entry in self.pending.items() if request not in self.hedged]
        if not due:
            return
        due_s, request = min(due)
        if due_s > self.world.now_s:
            if due_s < math.inf:
                self.world.at(due_s, self._begin)
            return
        self.hedged.add(request)
        self._compute(request, self.chooser.fallback, is_fallback=True)

    def _compute(self, request: int, plan: Any, *, is_fallback: bool) -> None:
        self.is_computing = True
        # A pause comes once, whoever is computed then.
        took_s = self.lines[plan.number].device_s + self.pauses_s.pop(request, 0.0)
        self.world.at(self.world.now_s + took_s, lambda: self._computed(request, plan, took_s, is_fallback))

    def _computed(self, request: int, plan: Any, took_s: float, is_fallback: bool) -> None:
        self.is_computing = False
        self.chooser.computed(plan, took_s)
        if plan.kind == "device":
            self._end(request, plan, "fallback" if is_fallback else "device")
        elif self.is_up:
            self._send(request, plan)
        else:
            self.back.append(request)
        self._begin()

    def _end(self, request: int, plan: Any, answered: str) -> None:
        if request in self.over:
            return
        self.over.add(request)
        self.outstanding -= 1
        start_s = float(self.arrivals_s[request])
        self.ended.append(Ended(request, plan.number, answered, start_s, self.world.now_s))

    # The link.

    def _send(self, request: int, plan: Any) -> None:
        now_s, line = self.world.now_s, self.lines[plan.number]
        patience_s = max(self.notice_s, _PATIENCE * self.chooser.expected_s(plan, now_s))
        hedge_s = self.chooser.late_s(plan, now_s, self.hedge)
        self.pending[request] = _Pending(plan, now_s, patience_s, hedge_s)
        self.chooser.sent(request, plan, now_s, round(line.up_bits / 8))
        arrived_s = self._carried(line.up_bits / 8) + self.link.delay_s
        done_s = max(arrived_s, self.edge_free_s) + line.edge_s
        self.edge_free_s = done_s
        wait_s = done_s - line.edge_s - arrived_s
        durations = Durations(round(1e6 * wait_s), 0, round(1e6 * line.edge_s))
        heard_s = float(self.downlink.end_s(done_s, line.down_bits / 8)) + self.link.delay_s + line.exchange_s
        epoch = self.epoch
        self.world.at(heard_s, lambda: self._heard(request, epoch, durations))

    def _carried(self, num_bytes: float) -> float:
        """When the link has carried so many bytes more."""
        self.link_free_s = float(self.uplink.end_s(max(self.world.now_s, self.link_free_s), num_bytes))
        return self.link_free_s

    def _heard(self, request: int, epoch: int, durations: Durations) -> None:
        if epoch != self.epoch or request not in self.pending:
            return
        entry = self.pending.pop(request)
        self.heard_s = self.world.now_s
        self.chooser.replied(request, self.world.now_s - self.lines[entry.plan.number].exchange_s, durations)
        self.chooser.answered(self.lines[entry.plan.number].exchange_s)
        self._end(request, entry.plan, "edge")
        self._begin()

    def _connect(self) -> None:
        now_s = self.world.now_s
        done_s = float(self.uplink.end_s(max(now_s, self.link_free_s), _GREETING_BYTES))
        done_s += 2 * self.link.delay_s * _GREETING_TRIPS
        if done_s - now_s > self.notice_s:
            self.world.at(now_s + self.notice_s + _BACKOFF_S, self._connect)
        else:
            self.world.at(done_s, self._connected)

    def _connected(self) -> None:
        self.is_up = True
        self.heard_s = self.world.now_s
        self.chooser.connected(self.world.now_s)
        self._measure()

    def _lose(self) -> None:
        now_s = self.world.now_s
        self.epoch += 1
        self.is_up = False
        self.chooser.lost(now_s, "link lost: silent")
        self.back.extend(sorted(self.pending.keys() - self.hedged))
        self.pending.clear()
        self.beats.clear()
        self.link_free_s = min(self.link_free_s, float(self.uplink.end_s(now_s, _BUFFERED_BYTES)))
        self.world.at(now_s + _BACKOFF_S, self._connect)
        self._begin()

    # What a keeper does besides.

    def _watch(self) -> None:
        now_s, tick_s = self.world.now_s, self.notice_s / 8
        if self.is_up:
            late = [
                entry for entry in self.pending.values()
                if now_s + tick_s - max(entry.since_s, self.heard_s) > entry.patience_s
                or now_s + tick_s - entry.since_s > _PATIENCE * entry.patience_s
            ]  # fmt: skip
            beats = [
                since_s for since_s in self.beats.values()
                if now_s + tick_s - max(since_s, self.heard_s) > self.notice_s
            ]  # fmt: skip
            if late or beats:
                self._lose()
            elif not self.pending and not self.beats and self.chooser.wants_probe(now_s):
                self._measure()
            elif not self.beats and self.chooser.wants_way(now_s):
                self._beat(60, is_way=True)
            self.chooser.adapt()
        self.world.at(now_s + self.looks.uniform(0.5, 1.0) * tick_s, self._watch)

    def _measure(self) -> None:
        self._beat(60)
        self._beat(60 + self.chooser.probe_bytes(self.world.now_s))

    def _beat(self, num_bytes: int, *, is_way: bool = False) -> None:
        now_s, token = self.world.now_s, next(self.tokens)
        is_way = is_way or not (self.pending or self.beats)
        self.beats[token] = now_s
        self.chooser.beats(token, now_s, num_bytes)
        heard_s = self._carried(num_bytes) + 2 * self.link.delay_s
        self.world.at(heard_s, partial(self._beaten, token, is_way))

    def _beaten(self, token: int, is_way: bool) -> None:
        if self.beats.pop(token, None) is not None:
            self.heard_s = self.world.now_s
            self.chooser.beaten(token, self.world.now_s, is_way=is_way)


def simulate_pilot(
    chooser: Chooser,
    lines: Mapping[int, Line],
    arrivals_s: Sequence[float],
    link: Link,
    *,
    window: int = 8,
    notice_s: float = 2.0,
    hedge: float = math.inf,
    pauses_s: Sequence[float] = (),
) -> list[Ended]:
    """What becomes of each request, by plans that `chooser` chooses.

    Args:
        chooser: is told what a device would know; begins without a link.
        lines: of the plans that it may choose, by number.
        arrivals_s: rising times.
        link: the uplink follows its trace from time 0.
        window: so many requests at most are between being begun and being answered; the next ones wait.
        notice_s: so long may nothing be heard of the edge.
        hedge: late by so many times what the device takes alone, an answer is computed there too.
        pauses_s: for each request from the first on, what the device takes besides, whatever its plan.

    Raises:
        PlanError: no request, or a window or bound that is none.
    """
    if not len(arrivals_s) or window < 1 or not notice_s > 0:
        given = f"{len(arrivals_s)} requests, window {window}, {notice_s} s"
        raise PlanError(f"a simulation needs a request, a window of 1 or more and a bound above 0 s, got {given}")
    run = _Run(
        chooser, lines, arrivals_s, link, window=window, notice_s=notice_s, hedge=hedge, pauses_s=pauses_s
    )
    return run.run()


def oracle(
    lines: Mapping[int, Line],
    arrivals_s: Sequence[float],
    link: Link,
    *,
    pauses_s: Sequence[float] = (),
) -> list[Ended]:
    """Each request by the plan of `lines` with the earliest finish, given what went before it and the link's future.

    `pauses_s` as for `simulate_pilot`.
    """
    uplink, downlink = Transfer(link, is_uplink=True), Transfer(link, is_uplink=False)
    core_free_s = link_free_s = edge_free_s = 0.0
    ended = []
    for request, start_s in enumerate(map(float, arrivals_s)):
        best: tuple[float, float, float, float, int] = (math.inf, 0.0, 0.0, 0.0, -1)
        begin_s = max(start_s, core_free_s) + (pauses_s[request] if request < len(pauses_s) else 0.0)
        for number, line in lines.items():
            computed_s = begin_s + line.device_s
            sent_s, done_s, end_s = link_free_s, edge_free_s, computed_s
            if line.share > 0:
                sent_s = float(uplink.end_s(max(computed_s, link_free_s), line.up_bits / 8))
                done_s = max(sent_s + link.delay_s, edge_free_s) + line.edge_s
                end_s = float(downlink.end_s(done_s, line.down_bits / 8)) + link.delay_s + line.exchange_s
            best = min(best, (end_s, computed_s, sent_s, done_s, number))
        end_s, core_free_s, link_free_s, edge_free_s, number = best
        ended.append(Ended(request, number, "edge" if lines[number].share > 0 else "device", start_s, end_s))
    return ended
