"""Which plan the next request takes: looked up in the map of plans by the link's rate and the edge's load as they are.

    frames, replies, heartbeats --> UplinkRate, edge's load --> look-up --> hysteresis --> plan of the next frame
    own times, plan by plan ------------------------------------------------------^

The map says which plans are the best at this rate and near it; among these the device's own times decide, which it
knows better than whoever built the bundle.

`Pilot` has no I/O and no clock: it is told what happened and when, in seconds of the device's clock.  A switch is a
number in the next frame; what is in flight stays as it is.  Without a link, or while the edge says that it is busy, the
next request is the device's own (`fallback`).  Every change is a `Decision` with its reason.  A Pilot is safe from
several threads.
"""

from __future__ import annotations

import logging
import math
import threading
from collections import deque
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from ..bundle import Bundle
from ..plan import Plan
from ..profile import Conditions
from ..protocol import Durations
from ..search.goal import Goal
from ..timeline import Decision
from ..units import format_duration, format_rate
from .edge_load import EdgeLoad
from .own import OwnLoads
from .pricebook import PriceBook
from .probing import Probing
from .rate import UplinkRate

_LOG = logging.getLogger("coinfer.device")
# A plan is left for one that is better by a twentieth; right after a change it takes more.
GAIN, GAIN_AFTER_CHANGE, CALM_S = 0.05, 0.25, 1.0
# How much the latest answer counts in what a reply takes from its arrival.
_NEWEST = 0.3
# How far from what is assumed a rate may be that nothing has told for a while; and where plans are looked at as well.
_MAY_BE, _NEIGHBOURS = (0.1, 0.3, 1.0, 3.0, 10.0, 100.0), (0.25, 0.5, 2.0, 4.0)
# How far from a border of the map the rate must be for a change, where gains are not counted in seconds.
_NEAR = (0.8, 1.25)
# A map that was drawn anew stays for so long: drawing takes the device tens of milliseconds, or more.
_DRAWN_S = 30.0
_KEPT = 1000


class Choice(NamedTuple):
    """The plan of the next request; `is_fallback`: since the link or the edge cannot be used."""

    plan: Plan
    is_fallback: bool


class Pilot:
    """Chooses a plan of a bundle's menu for each request.

    Args:
        bundle: with evidence, and a map of plans.
        plan: the number of the one plan to use; None chooses.
        goal: what to make best; what the bundle was built for by default.
        conditions: rate, round trip and device as assumed at first; what the bundle was built for by default.
        fallback: number of the plan without an edge; the best one on the menu by default.
        probe_s: so often the link is measured where requests do not tell its rate.

    Raises:
        PlanError: no plan of the menu runs on the device alone, or the one named does not.
        BundleError: a plan is not on the menu, or there is no evidence.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        plan: int | None = None,
        goal: Goal | None = None,
        conditions: Conditions | None = None,
        fallback: int | None = None,
        probe_s: float = 0.5,
    ) -> None:
        self.bundle = bundle
        # The latest ones, and how many there were.
        self.decisions: deque[Decision] = deque(maxlen=_KEPT)
        self.num_decisions = 0
        self._book = PriceBook(bundle, goal=goal, conditions=conditions)
        self._is_latency = self._book.goal.minimise == "latency"
        self._named_fallback = fallback
        # Where the fallback does not keep the goal, it is for want of an edge alone.
        self.fallback, self._keeps_goal = self._book.fallback(fallback)
        self._fixed = None if plan is None else bundle.plan(plan)
        link = self._book.base.link
        self.rate = UplinkRate(link.rate_bps, 2 * link.delay_s)
        self._edge, self._own = EdgeLoad(), OwnLoads()
        # What a reply takes from its arrival to the answer.
        self._beyond_s: float | None = None
        self._current = self.fallback.number
        self._changed_s = -math.inf
        self._is_up = False
        self._down = "no link yet"
        self._busy_until_s = -math.inf
        self._probing = Probing(self.rate, probe_s)
        self._asked: dict[int, int] = {}
        self._drawn_s: float | None = None
        # Plans that the edge does not take.
        self._left_out: set[int] = set()
        self._lock, self._drawing = threading.RLock(), threading.Lock()

    # What is known.

    @property
    def is_up(self) -> bool:
        """Whether there is a link."""
        return self._is_up

    def wants_probe(self, now_s: float) -> bool:
        """Whether the link should be measured now, if it is idle; whoever asks then does.

        That is where what crosses it has not told its rate for `probe_s`, or no heartbeat its way for longer, unless no
        other rate would change anything; ever more seldom where measuring changes nothing either.
        """
        with self._lock:
            if not self._probing.is_due(now_s):
                return False
            if self._fixed is not None:
                # Its requests measure the link themselves, unless the device answers them.
                if self._fixed.kind == "device" or self._current == self._fixed.number:
                    return False
            elif all(number == self._current for number in self._around(now_s, _MAY_BE)):
                return False
            self._probing.began(now_s)
            return True

    def wants_way(self, now_s: float) -> bool:
        """Whether a bare heartbeat should tell the way though the link is not idle; whoever asks then sends one."""
        with self._lock:
            return self._probing.asks_way(now_s)

    def edge_load(self, now_s: float) -> float:
        """How many times as long as measured decoding and tails take, as of late."""
        with self._lock:
            return self._edge.at(now_s)

    def decisions_from(self, count: int) -> tuple[list[Decision], int]:
        """Those behind the first `count`, as far as they are kept; and how many there are by now."""
        with self._lock:
            left_out = max(0, len(self.decisions) - (self.num_decisions - count))
            return list(self.decisions)[left_out:], self.num_decisions

    def leave_out(self, plan: Plan, why: str) -> None:
        """Choose a plan no more as long as this link lasts: the edge does not take it."""
        with self._lock:
            self._left_out.add(plan.number)
            _LOG.warning("plan %d is left out: %s", plan.number, why, extra={"plan": plan.number})

    @property
    def current(self) -> int:
        """The number of the plan that the last request took."""
        return self._current

    def uplink_bps(self, now_s: float) -> float:
        """Bits a second of the uplink, as far as is known."""
        with self._lock:
            return self.rate.at(now_s)

    def choose(self, now_s: float, request: int | None = None, *, until_s: float = math.inf) -> Choice:
        """The plan of a request that is begun now.

        Where the edge's answer would come later than `until_s`, the device answers, if it is sooner done.
        """
        with self._lock:
            choice = self._choose(now_s, request)
            if until_s == math.inf or choice.plan.kind == "device":
                return choice
            edge_s = self._latency_s(choice.plan.number, now_s, self.rate.at(now_s))
            late_s = now_s + edge_s - until_s
            if late_s <= 0 or edge_s <= self.own_s:
                return choice
            why = f"the edge's answer would be {format_duration(late_s)} late"
            return self._settle(now_s, request, self.fallback, why, is_fallback=True)

    @property
    def own_s(self) -> float:
        """Seconds that the device takes alone, as of late."""
        return self._own_s(self.fallback.number)

    def _own_s(self, number: int) -> float:
        """Seconds that the device takes for its side of a plan, as of late."""
        return self._own.of(number) * self._book.line(number).device_s

    def _choose(self, now_s: float, request: int | None) -> Choice:
        if not self._is_up:
            return self._settle(now_s, request, self.fallback, self._down, is_fallback=True)
        if now_s < self._busy_until_s:
            left = format_duration(self._busy_until_s - now_s)
            return self._settle(now_s, request, self.fallback, f"the edge is busy for {left}", is_fallback=True)
        if self._fixed is not None:
            if self._fixed.number in self._left_out:
                return self._settle(now_s, request, self.fallback, "the edge does not take it", is_fallback=True)
            return self._settle(now_s, request, self._fixed, "the plan that was asked for")
        rate_bps = self.rate.at(now_s)
        load = self._edge.at(now_s)
        number = self._book.best_at(rate_bps, load)
        wanted = self.fallback.number if number is None or number in self._left_out else number
        reason = f"{format_rate(rate_bps)}, the edge at {load:.2g} times its times"
        if self._is_latency and number is not None:
            near = {n for n in self._around(now_s, _NEIGHBOURS) if n is not None} - self._left_out
            some = {wanted, *near, *((self.fallback.number,) if self._keeps_goal else ())}
            costs = {n: self._latency_s(n, now_s, rate_bps) for n in {*some, self._current}}
            wanted = min(some, key=lambda n: (costs[n], n))
            if wanted == self.fallback.number != number:
                # The map knows no queues.
                waits = (format_duration(t) for t in (self.rate.backlog_s(now_s, rate_bps), self._edge.wait_s(now_s)))
                reason = "{}, {} of bytes on the link, {} at the edge".format(reason, *waits)
            is_worth_it = wanted != self._current and self._is_worth_it(now_s, costs[wanted], costs[self._current])
        else:
            is_worth_it = wanted != self._current and self._is_sure(now_s, wanted)
        if self._may_stay() and not is_worth_it:
            wanted = self._current
        return self._settle(now_s, request, self.bundle.plan(wanted), reason)

    def _latency_s(self, number: int, now_s: float, rate_bps: float, edge: tuple[float, float] | None = None) -> float:
        line, (load, wait_s) = self._book.line(number), edge or (self._edge.at(now_s), self._edge.wait_s(now_s))
        if self._beyond_s is not None:
            line = line._replace(exchange_s=self._beyond_s)
        return line.latency_s(
            rate_bps, base_s=self.rate.base_s, load=load, wait_s=wait_s,
            backlog_s=self.rate.backlog_s(now_s, rate_bps), own_load=self._own.of(number),
        )  # fmt: skip

    def _may_stay(self) -> bool:
        """Whether the plan of the request before may be kept."""
        is_makeshift = self._current == self.fallback.number and not self._keeps_goal
        return not is_makeshift and self._current not in self._left_out

    def _is_worth_it(self, now_s: float, new_s: float, old_s: float) -> bool:
        """Whether a change gains enough: more right after another one, so that plans do not flap."""
        since_s = now_s - self._changed_s
        needed = GAIN + GAIN_AFTER_CHANGE * math.exp(-since_s / CALM_S)
        return new_s < (1 - needed) * old_s

    def _is_sure(self, now_s: float, wanted: int) -> bool:
        """Whether a plan would also be the best if the rate were somewhat lower or higher."""
        near = self._around(now_s, _NEAR)
        return now_s - self._changed_s > CALM_S and all(number == wanted for number in near)

    def _around(self, now_s: float, factors: tuple[float, ...]) -> Iterator[int | None]:
        """The best plans where the rate is so many times as high."""
        rate_bps, load = self.rate.at(now_s), self._edge.at(now_s)
        return (self._book.best_at(rate_bps * factor, load) for factor in factors)

    def _settle(
        self, now_s: float, request: int | None, plan: Plan, reason: str, *, is_fallback: bool = False
    ) -> Choice:
        if plan.number != self._current or not self.decisions:
            before, self._current, self._changed_s = self._current, plan.number, now_s
            decision = Decision(
                at_s=now_s, request=request, plan=plan.number, before=before if self.decisions else None, reason=reason,
                rate_bps=self.rate.at(now_s), edge_load=self._edge.at(now_s),
            )  # fmt: skip
            self.decisions.append(decision)
            self.num_decisions += 1
            extra = {"request": request, "plan": plan.number}
            _LOG.info("plan %d (%s) from request %s on: %s", plan.number, plan.label, request, reason, extra=extra)
        return Choice(plan, is_fallback)

    # What happens.

    def connected(self, now_s: float) -> None:
        """There is a link from now on."""
        with self._lock:
            self._is_up = True
            self._busy_until_s = -math.inf
            self._edge = EdgeLoad()
            self._probing.connected(now_s)
            self._left_out.clear()

    def lost(self, now_s: float, why: str) -> None:
        """There is none any more; what was on it is not acknowledged."""
        with self._lock:
            self._is_up, self._down = False, why
            self._asked.clear()
            self.rate.forget()

    def sent(self, request: int, plan: Plan, now_s: float, wire_bytes: int) -> None:
        """A request was handed to the link."""
        with self._lock:
            self._asked[request] = plan.number
            edge_s = self._book.line(plan.number).edge_s * self._edge.at(now_s) + self._edge.wait_s(now_s)
            self.rate.sent(request, now_s, wire_bytes, edge_s=edge_s)

    def unsent(self, request: int) -> None:
        """A request was taken back before the link had it."""
        with self._lock:
            self._asked.pop(request, None)
            self.rate.unsent(request)

    def plans(self) -> list[Plan]:
        """All that may be taken; those that are the best most often come first."""
        fixed = () if self._fixed is None else dict.fromkeys((self._fixed.number, self.fallback.number))
        return [self.bundle.plan(number) for number in fixed or self._book.plans()]

    def computed(self, plan: Plan, took_s: float) -> None:
        """The device computed its side of a request."""
        with self._lock:
            self._own.took(plan.number, took_s, self._book.line(plan.number).device_s)

    def answered(self, beyond_s: float) -> None:
        """Between a reply's arrival and the answer so many seconds passed."""
        with self._lock:
            before_s = beyond_s if self._beyond_s is None else self._beyond_s
            self._beyond_s = before_s + _NEWEST * (beyond_s - before_s)

    def replied(self, request: int, now_s: float, durations: Durations) -> None:
        """The edge answered."""
        wait_s, decode_s, tail_s = (1e-6 * duration for duration in durations)
        with self._lock:
            number = self._asked.pop(request, None)
            self.rate.heard(request, now_s, edge_s=wait_s + decode_s + tail_s)
            if number is not None and (expected_s := self._book.line(number).edge_s) > 0:
                self._edge.replied(now_s, took_s=decode_s + tail_s, said_s=expected_s, wait_s=wait_s)

    def refused(self, request: int, now_s: float, retry_after_s: float | None) -> None:
        """The edge could not answer a request; with `retry_after_s` it will be busy for so long."""
        with self._lock:
            self._asked.pop(request, None)
            self.rate.heard(request, now_s)
            if retry_after_s is not None:
                self._busy_until_s = max(self._busy_until_s, now_s + retry_after_s)

    def beats(self, token: int, now_s: float, wire_bytes: int) -> None:
        """A heartbeat was handed to the link."""
        with self._lock:
            self.rate.sent(_beat_key(token), now_s, wire_bytes)

    def beaten(self, token: int, now_s: float, *, is_way: bool) -> None:
        """A heartbeat came back; `is_way`: a bare one that tells the way, not one behind another."""
        with self._lock:
            before_bps = self.rate.at(now_s)
            self.rate.heard(_beat_key(token), now_s, is_way=is_way)
            if not is_way:
                self._probing.ended(now_s, before_bps)

    def adapt(self) -> None:
        """Draw the map anew where round trip or device are others than it was drawn for; for a thread that has time."""
        if self._fixed is not None or not self._drawing.acquire(blocking=False):
            return
        try:
            with self._lock:
                base_s = self.rate.base_s if self.rate.is_way_known else 2 * self._book.base.link.delay_s
                loads, other = self._own.known(), self._own.other
                is_due = self._drawn_s is None or self.rate.last_heard_s >= self._drawn_s + _DRAWN_S
            if is_due and self._book.is_other(base_s, loads):
                fresh = self._book.drawn_for(base_s, loads, other)
                with self._lock:
                    self._book, self._drawn_s = fresh, self.rate.last_heard_s
        finally:
            self._drawing.release()

    def rehearsed(self, own_s: Mapping[int, float]) -> None:
        """By plan, what the device took for its side: from now on this is what is said of them, and of all others."""
        with self._drawing:
            fresh = self._book.timed(self.rate.base_s, own_s)
            with self._lock:
                self._book, self._own = fresh, OwnLoads()
                self.fallback, self._keeps_goal = fresh.fallback(self._named_fallback)

    def late_s(self, plan: Plan, now_s: float, hedge: float) -> float:
        """When the answer to a request that is sent now is late: by `hedge` times what the device would take alone.

        Not before the clocks' noise is passed.  A link that is silent just now does not make it later.
        """
        with self._lock:
            own_s, rate_bps = self._own_s(plan.number), self.rate.known_bps
            if self._latency_s(plan.number, now_s, self.rate.at(now_s)) < self.own_s < self._latency_s(
                plan.number, now_s, rate_bps, self._edge.told
            ):
                # A try whether the edge is still as busy as it was: the device need not wait for its end.
                return now_s
            late_s = max(hedge * self.own_s, 4 * self.rate.noise_s)
            return now_s + self._latency_s(plan.number, now_s, rate_bps) - own_s + late_s

    def expected_s(self, plan: Plan, now_s: float) -> float:
        """Seconds that a request of a plan is expected to take from here."""
        with self._lock:
            return self._latency_s(plan.number, now_s, self.rate.at(now_s))

    def probe_bytes(self, now_s: float) -> int:
        """The padding of a heartbeat that measures the link."""
        with self._lock:
            return self._probing.num_bytes(now_s)


def _beat_key(token: int) -> int:
    """A heartbeat among the frames: requests have the numbers from 0 on."""
    return -1 - token
