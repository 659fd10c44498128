"""The pilot in made-up time: what it chooses, when it changes, and why it says so."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import msgspec
import pytest

from coinfer.bundle import Bundle, load_bundle, write_manifest
from coinfer.errors import BundleError, PlanError
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.protocol import Durations
from coinfer.runtime.control import Pilot
from coinfer.search.estimate import estimate
from coinfer.search.goal import Goal
from coinfer.search.planmap import load_map, plan_map
from tiny_bundle import (
    ASSUMED,
    DEVICE,
    DEVICE_TOP,
    EVIDENCE,
    MENU,
    SPLIT16,
    SPLIT32,
    UPLOAD,
    candidates,
    make_tiny_bundle,
)

BASE_S = 0.002
SECONDS = Durations(0, 0, 2000)


class Road:
    """A link in made-up time; requests go over it one after the other, each a second after the one before."""

    def __init__(self, pilot: Pilot, rate_bps: float, *, base_s: float = BASE_S) -> None:
        self.pilot, self.rate_bps, self.base_s = pilot, rate_bps, base_s
        self.now_s, self.count = 0.0, 0
        pilot.connected(0.0)
        self.measure()

    def measure(self) -> None:
        """Two heartbeats, one right behind the other."""
        sent_s, self.now_s = self.now_s, self.now_s + self.base_s
        sizes = (60, 60 + self.pilot.probe_bytes(sent_s))
        for k, num_bytes in enumerate(sizes):
            self.pilot.beats(2**31 + k, sent_s, num_bytes)
        for k, num_bytes in enumerate(sizes):
            self.now_s += 8 * num_bytes / self.rate_bps
            self.pilot.beaten(2**31 + k, self.now_s, is_way=k == 0)

    def ask(self, durations: Durations = SECONDS) -> int:
        """The plan of the next request, which is then carried."""
        self.now_s += 1.0
        self.count += 1
        choice = self.pilot.choose(self.now_s, self.count)
        if choice.plan.kind != "device":
            num_bytes = {UPLOAD: 20_000, SPLIT32: 2_000, SPLIT16: 1_000}[choice.plan.number]
            self.pilot.sent(self.count, choice.plan, self.now_s, num_bytes)
            heard_s = self.now_s + 8 * num_bytes / self.rate_bps + self.base_s + sum(durations) * 1e-6
            self.pilot.replied(self.count, heard_s, durations)
            self.now_s = heard_s
        return choice.plan.number

    def settled(self) -> int:
        """The plan after some requests, with the link measured between them as a keeper does."""
        for _ in range(12):
            self.ask()
            if self.pilot.wants_probe(self.now_s):
                self.measure()
        return self.ask()


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("known") / "bundle", has_evidence=True)


@pytest.mark.parametrize("rate_bps", [5e4, 2e5, 4e5, 7e5, 1.5e6, 4e6, 1e7, 4e7, 2e8])
def test_the_pilot_settles_on_the_best_plan_of_the_rate(known: Bundle, rate_bps: float) -> None:
    road = Road(Pilot(known), rate_bps)
    found = road.settled()
    conditions = msgspec.structs.replace(ASSUMED, link=Link(rate_bps=rate_bps, delay_s=BASE_S / 2))
    prices = {c.plan.number: estimate(c, conditions).latency_s for c in candidates()}
    # The best, or one from which a change would gain too little.
    assert prices[found] <= 1.06 * min(prices.values())


def test_without_a_link_the_device_answers(known: Bundle) -> None:
    pilot = Pilot(known)
    assert pilot.choose(0.0) == (known.plan(DEVICE), True)
    road = Road(pilot, 4e7)
    assert road.settled() == UPLOAD
    pilot.lost(road.now_s, "link lost: cut")
    assert pilot.choose(road.now_s + 1) == (known.plan(DEVICE), True)
    pilot.connected(road.now_s + 2)
    assert pilot.choose(road.now_s + 2) == (known.plan(UPLOAD), False)
    reasons = [decision.reason for decision in pilot.decisions]
    assert reasons[0] == "no link yet" and "link lost: cut" in reasons


def test_a_busy_edge_is_left_alone_for_as_long_as_it_says(known: Bundle) -> None:
    road = Road(Pilot(known), 4e7)
    road.settled()
    road.pilot.refused(road.count, road.now_s, 0.5)
    assert road.pilot.choose(road.now_s + 0.4) == (known.plan(DEVICE), True)
    assert road.pilot.choose(road.now_s + 0.6) == (known.plan(UPLOAD), False)


def test_a_loaded_edge_is_left_for_the_device_and_comes_back(known: Bundle) -> None:
    road = Road(Pilot(known), 4e7)
    assert road.settled() == UPLOAD
    slow = Durations(0, 0, 60_000)
    numbers = [road.ask(slow) for _ in range(8)]
    assert numbers[0] == UPLOAD and numbers[-1] == DEVICE
    assert road.pilot.edge_load(road.now_s) > 8
    # A queue counts as the tail does.
    queue = Road(Pilot(known), 4e7)
    queue.settled()
    assert [queue.ask(Durations(100_000, 0, 2000)) for _ in range(8)][-1] == DEVICE
    assert "at the edge" in queue.pilot.decisions[-1].reason


def test_bytes_that_queue_on_the_link_are_waited_for(known: Bundle) -> None:
    road = Road(Pilot(known), 4e7)
    road.settled()
    now_s = road.now_s + 1
    numbers = []
    for k in range(150):
        # All at once: each upload waits for those before it, 4 ms each; so do fewer bytes, but less.
        choice = road.pilot.choose(now_s, 1000 + k)
        numbers.append(choice.plan.number)
        if choice.plan.kind != "device":
            num_bytes = {UPLOAD: 20_000, SPLIT32: 2_000, SPLIT16: 1_000}[choice.plan.number]
            road.pilot.sent(1000 + k, choice.plan, now_s, num_bytes)
    assert numbers[0] == UPLOAD and numbers[-1] == DEVICE
    assert not road.pilot.choose(now_s).is_fallback


def test_a_rate_that_trembles_changes_nothing(known: Bundle) -> None:
    """At the rate where two plans cost the same, a tremble of a tenth never gains the twentieth that a change needs."""
    pilot = Pilot(known)
    road = Road(pilot, 4e6)
    road.settled()
    # Split32 against upload: 10 ms + 16 kbit against 1 ms + 160 kbit, equal at 16 Mbit/s.
    for k in range(60):
        road.rate_bps = 16.2e6 * (1.08 if k % 2 else 0.92)
        road.ask()
    changes = [d for d in pilot.decisions if d.before is not None and d.at_s > 12]
    assert len(changes) <= 1


@pytest.mark.parametrize("minimise", ["throughput", "bytes"])
def test_other_goals_do_not_flap_either(known: Bundle, minimise: str) -> None:
    """Around each border of the map, a rate that trembles by a hundredth."""
    borders = []
    drawn = plan_map(candidates(), Goal(minimise=minimise, max_latency_s=0.1), ASSUMED)  # type: ignore[arg-type]
    for low, high in itertools.pairwise(drawn.rates_bps):
        if drawn.at(low) != drawn.at(high):
            borders.append((low * high) ** 0.5)
    for border_bps in borders:
        pilot = Pilot(known, goal=Goal(minimise=minimise, max_latency_s=0.1))  # type: ignore[arg-type]
        road = Road(pilot, border_bps)
        road.settled()
        before = pilot.num_decisions
        for k in range(60):
            road.rate_bps = border_bps * (1.01 if k % 2 else 0.99)
            road.ask()
        assert pilot.num_decisions - before <= 1


def test_a_fallback_that_breaks_the_goal_stands_in_for_a_lost_link_alone(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "lossy", has_evidence=True)
    known = [
        msgspec.structs.replace(c, evidence=msgspec.structs.replace(c.evidence, loss_points=9.0))
        if c.plan.kind == "device" else c
        for c in candidates()
    ]  # fmt: skip
    (bundle.folder / "evidence.json").write_bytes(msgspec.json.encode(known))
    drawn = plan_map(known, Goal(), ASSUMED)
    (bundle.folder / "map.json").write_bytes(msgspec.json.encode(drawn))
    write_manifest(bundle.folder, bundle.manifest)
    lossy = load_bundle(bundle.folder)
    road = Road(Pilot(lossy), 4e5)
    assert road.settled() == SPLIT16
    # A slow edge is no reason for an answer that loses more than was allowed.
    assert [road.ask(Durations(0, 0, 90_000)) for _ in range(8)][-1] != DEVICE
    road.pilot.lost(road.now_s, "cut")
    assert road.pilot.choose(road.now_s).plan.number == DEVICE


def test_every_change_says_why(known: Bundle) -> None:
    road = Road(Pilot(known), 4e7)
    road.settled()
    road.rate_bps = 5e4
    road.settled()
    made = list(road.pilot.decisions)
    assert [d.before for d in made] == [None, *(d.plan for d in made[:-1])]
    assert made[-1].plan == DEVICE and "kbit/s" in made[-1].reason
    assert [d.at_s for d in made] == sorted(d.at_s for d in made)
    assert all(d.request is not None for d in made)


def test_one_plan_can_be_asked_for(known: Bundle) -> None:
    pilot = Pilot(known, plan=SPLIT16)
    assert pilot.choose(0.0).plan.number == DEVICE
    assert Road(pilot, 5e4).settled() == SPLIT16


def test_the_map_is_drawn_anew_for_another_round_trip(known: Bundle) -> None:
    """Behind 100 ms the link never wins; the map of the bundle was drawn for 2 ms."""
    pilot = Pilot(known)
    road = Road(pilot, 4e7, base_s=0.1)
    pilot.adapt()
    assert road.settled() == DEVICE
    near = Road(Pilot(known), 4e7)
    near.pilot.adapt()
    assert near.settled() == UPLOAD


def test_a_device_that_is_slower_than_it_was_taken_for_is_seen_by_its_own_times(known: Bundle) -> None:
    """Ten times slower, the head of the split takes longer than the upload; the map did not know."""
    assert Road(Pilot(known), 4e6).settled() in (SPLIT16, SPLIT32)
    slow = Road(Pilot(known), 4e6)
    slow.settled()
    for _ in range(20):
        number = slow.ask()
        slow.pilot.computed(known.plan(number), 10 * {SPLIT16: 0.012, SPLIT32: 0.010, UPLOAD: 0.001}[number])
    slow.pilot.adapt()
    assert slow.settled() == UPLOAD


def test_a_plan_that_is_quicker_here_than_the_bundle_says_comes_into_the_map(known: Bundle) -> None:
    """At 4 Mbit/s a split is the best by what the bundle says; a device that is done in 2 ms needs no edge."""
    taught = Pilot(known)
    taught.rehearsed({plan.number: 0.002 if plan.kind == "device" else 0.050 for plan in taught.plans()})
    road = Road(taught, 4e6)
    assert road.settled() == DEVICE
    # No rate of the link would change that.
    assert not taught.wants_probe(1e6)


def test_all_plans_can_be_rehearsed_those_that_win_most_often_first(known: Bundle) -> None:
    pilot = Pilot(known)
    numbers = [plan.number for plan in pilot.plans()]
    often = Counter(load_map(known).plans)
    assert sorted(numbers) == sorted(candidate.plan.number for candidate in known.candidates())
    assert [often[number] for number in numbers] == sorted((often[n] for n in numbers), reverse=True)
    assert [plan.number for plan in Pilot(known, plan=SPLIT16).plans()] == [SPLIT16, DEVICE]
    assert [plan.number for plan in Pilot(known, plan=DEVICE).plans()] == [DEVICE]


def test_what_was_rehearsed_is_what_is_said_and_of_other_plans_by_the_same_factor(known: Bundle) -> None:
    pilot = Pilot(known)
    said_s = {plan.number: pilot._book.line(plan.number).device_s for plan in pilot.plans()}
    pilot.rehearsed({SPLIT16: 2 * said_s[SPLIT16], UPLOAD: 5 * said_s[UPLOAD]})
    found_s = {number: pilot._book.line(number).device_s for number in said_s}
    other = (2 * said_s[SPLIT16] + 5 * said_s[UPLOAD]) / (said_s[SPLIT16] + said_s[UPLOAD])
    factors = {number: {SPLIT16: 2.0, UPLOAD: 5.0}.get(number, other) for number in said_s}
    assert found_s == pytest.approx({number: factors[number] * said_s[number] for number in said_s})
    # As it was rehearsed it is no other device.
    before = pilot._book
    for number, seconds in found_s.items():
        pilot.computed(known.plan(number), seconds)
    pilot.adapt()
    assert pilot._book is before


def test_a_difference_that_cannot_matter_draws_no_map(known: Bundle) -> None:
    pilot = Pilot(known)
    pilot.rehearsed({plan.number: 0.0005 for plan in pilot.plans()})
    before = pilot._book
    pilot.computed(known.plan(UPLOAD), 0.001)
    pilot.adapt()
    assert pilot._book is before
    pilot.computed(known.plan(SPLIT32), 0.1)
    pilot.adapt()
    assert pilot._book is not before


def test_the_fallback_is_the_quickest_by_the_devices_own_times_unless_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twin = msgspec.structs.replace(MENU[DEVICE], number=len(MENU), variant="twin")
    monkeypatch.setitem(EVIDENCE, twin.number, (0.050, *EVIDENCE[DEVICE][1:]))
    bundle = make_tiny_bundle(tmp_path / "bundle", menu=(*MENU, twin), has_evidence=True)
    pilot, named = Pilot(bundle), Pilot(bundle, fallback=DEVICE)
    for one in (pilot, named):
        one.rehearsed({plan.number: 0.001 if plan.number == twin.number else 0.02 for plan in pilot.plans()})
    assert pilot.fallback.number == twin.number and named.fallback.number == DEVICE


def test_other_conditions_and_goals_have_a_map_of_their_own(known: Bundle) -> None:
    slow = Conditions(link=Link(rate_bps=1e6, delay_s=BASE_S / 2), device=Slowdown(fp32=30.0, int8=30.0))
    assert Road(Pilot(known, conditions=slow), 1e6).settled() == UPLOAD
    few = Pilot(known, goal=Goal(minimise="bytes", max_latency_s=0.035))
    assert Road(few, 4e6).settled() == SPLIT16
    assert load_map(known).base == ASSUMED


def test_a_fallback_can_be_named_but_must_be_the_devices(known: Bundle) -> None:
    assert Pilot(known, fallback=DEVICE_TOP).fallback.number == DEVICE_TOP
    with pytest.raises(PlanError, match="a fallback must run on the device alone, plan 1 is upload"):
        Pilot(known, fallback=UPLOAD)
    with pytest.raises(BundleError, match="plan 99 is not on the menu"):
        Pilot(known, fallback=99)


def test_a_menu_without_a_plan_of_the_device_cannot_be_guarded(tmp_path: Path) -> None:
    menu = tuple(plan for plan in MENU if plan.kind != "device")
    bundle = make_tiny_bundle(tmp_path / "remote", menu=menu, has_evidence=True)
    with pytest.raises(PlanError, match="no plan of the menu runs on the device alone"):
        Pilot(bundle)


def test_heartbeats_are_padded_by_what_the_link_carries(known: Bundle) -> None:
    for rate_bps, least, most in ((1e4, 1024, 1024), (2e6, 4000, 7000), (1e9, 16384, 16384)):
        road = Road(Pilot(known), rate_bps)
        for _ in range(20):
            road.measure()
        assert least <= road.pilot.probe_bytes(road.now_s) <= most


def test_a_link_is_measured_only_where_that_could_change_something(known: Bundle) -> None:
    road = Road(Pilot(known), 4e6)
    road.settled()
    # Frames of 2,000 B take 4 ms at 4 Mbit/s: they tell the rate themselves, and only the way is measured now and then.
    asked, since_s = [], road.now_s
    while road.now_s < since_s + 60.0:
        asked.append(road.pilot.wants_probe(road.now_s + 0.4))
        if asked[-1]:
            road.measure()
        road.ask()
    assert 10 <= sum(asked) <= 12
    # Nobody uses a slow link, so that only measuring can tell when it is faster.
    slow = Road(Pilot(known), 5e4)
    assert slow.settled() == DEVICE
    asked = [slow.pilot.wants_probe(slow.now_s + 0.25 * k) for k in range(1, 41)]
    assert sum(asked) == 20
    # One plan is one plan.
    fixed = Road(Pilot(known, plan=UPLOAD), 5e4)
    assert fixed.ask() == UPLOAD
    assert not any(fixed.pilot.wants_probe(fixed.now_s + k) for k in range(100))


def test_a_deadline_that_the_link_cannot_hold_is_the_devices(known: Bundle) -> None:
    road = Road(Pilot(known, plan=UPLOAD), 1e6)
    road.settled()
    # 20,000 B at 1 Mbit/s are 160 ms; the device takes 40.
    now_s = road.now_s + 1
    assert road.pilot.choose(now_s, until_s=now_s + 0.3).plan.number == UPLOAD
    choice = road.pilot.choose(now_s, until_s=now_s + 0.1)
    assert choice.plan.number == DEVICE and choice.is_fallback
    assert "would be" in road.pilot.decisions[-1].reason
    # Nobody holds 10 ms: then at least the link is spared.
    assert road.pilot.choose(now_s, until_s=now_s + 0.01).plan.number == DEVICE
    # Whether the link is faster now, only measuring tells.
    assert road.pilot.wants_probe(now_s + 1)
    road.rate_bps = 1e9
    for _ in range(6):
        road.now_s += 1
        road.measure()
    assert road.pilot.choose(road.now_s, until_s=road.now_s + 0.1).plan.number == UPLOAD
