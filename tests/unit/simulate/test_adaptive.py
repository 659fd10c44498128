"""One device under a pilot in made-up time: against closed forms, and against an oracle by brute force."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.errors import PlanError
from coinfer.profile import Link, Trace
from coinfer.protocol import Durations
from coinfer.runtime.control import Pilot
from coinfer.search.estimate import Table, estimate
from coinfer.search.line import Line, lines_of
from coinfer.simulate.adaptive import oracle, simulate_pilot
from coinfer.simulate.transfer import Transfer
from tiny_bundle import ASSUMED, DEVICE, SPLIT16, SPLIT32, UPLOAD, candidates, make_tiny_bundle

PERIOD_S = 0.1


@pytest.fixture(scope="module")
def known(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return make_tiny_bundle(tmp_path_factory.mktemp("known") / "bundle", has_evidence=True)


@pytest.fixture(scope="module")
def lines() -> dict[int, Line]:
    return lines_of(Table(candidates()), ASSUMED)


def arrivals(count: int, period_s: float = PERIOD_S) -> list[float]:
    return [k * period_s for k in range(count)]


def test_a_line_is_the_price_of_the_price_list(lines: dict[int, Line]) -> None:
    for candidate in candidates():
        want = estimate(candidate, ASSUMED).latency_s
        got = lines[candidate.plan.number].latency_s(ASSUMED.link.rate_bps, base_s=2 * ASSUMED.link.delay_s)
        assert got == pytest.approx(want, rel=1e-12)


@pytest.mark.parametrize("plan", [DEVICE, UPLOAD, SPLIT32, SPLIT16])
def test_requests_that_do_not_meet_take_what_their_line_says(known: Bundle, lines: dict[int, Line], plan: int) -> None:
    link = Link(rate_bps=4e6, delay_s=0.003)
    # The first one may come before there is a link.
    ended = simulate_pilot(Pilot(known, plan=plan), lines, [1.0 + t for t in arrivals(20)], link)
    want = lines[plan].latency_s(4e6, base_s=0.006)
    assert [one.request for one in ended] == list(range(20))
    assert {one.plan for one in ended} == {plan}
    for one in ended:
        assert one.latency_s == pytest.approx(want, rel=1e-9)
        assert one.answered == ("device" if plan == DEVICE else "edge")


def test_requests_that_meet_queue_for_the_core_and_the_link(known: Bundle, lines: dict[int, Line]) -> None:
    """Uploads of 40 ms of the link every 20 ms: each waits 20 ms longer than the one before it, up to the window."""
    link = Link(rate_bps=8 * 20_000 / 0.04, delay_s=0.0)
    ended = simulate_pilot(Pilot(known, plan=UPLOAD), lines, [1.0 + t for t in arrivals(6, 0.02)], link)
    on_link_s = lines[UPLOAD].up_bits / link.rate_bps
    gaps = np.diff([one.end_s for one in ended])
    assert gaps == pytest.approx([on_link_s] * 5)


@pytest.mark.parametrize("rates", [(1e7, 1e5), (5e4, 2e7)])
def test_the_oracle_is_the_best_of_all_choices_made_one_by_one(
    lines: dict[int, Line], rates: tuple[float, float]
) -> None:
    trace = Trace(name="t", start_s=(0.0, 0.2), rate_bps=rates, duration_s=0.4)
    link = Link(rate_bps=1e6, delay_s=0.002, trace=trace, down_rate_bps=1e7)
    found = oracle(lines, arrivals(5, 0.05), link)
    up = Transfer(link, is_uplink=True)
    core = uplink = edge = 0.0
    for one in found:
        ends = {}
        for number, line in lines.items():
            computed = max(one.start_s, core) + line.device_s
            if line.share == 0:
                ends[number] = computed
                continue
            sent = float(up.end_s(max(computed, uplink), line.up_bits / 8))
            ends[number] = max(sent + 0.002, edge) + line.edge_s + line.down_bits / 1e7 + 0.002
        assert one.end_s == pytest.approx(min(ends.values())) and ends[one.plan] == min(ends.values())
        core = max(one.start_s, core) + lines[one.plan].device_s
        if lines[one.plan].share:
            uplink = float(up.end_s(max(core, uplink), lines[one.plan].up_bits / 8))
            edge = max(uplink + 0.002, edge) + lines[one.plan].edge_s


@pytest.mark.parametrize("rate_bps", [1e5, 1e6, 4e6, 5e7])
def test_on_a_steady_link_a_pilot_comes_to_what_the_oracle_does(
    known: Bundle, lines: dict[int, Line], rate_bps: float
) -> None:
    link = Link(rate_bps=rate_bps, delay_s=0.001)
    adaptive = simulate_pilot(Pilot(known), lines, arrivals(200), link, hedge=0.3)
    best = oracle(lines, arrivals(200), link)
    late = slice(100, None)
    assert np.mean([one.latency_s for one in adaptive[late]]) <= 1.06 * np.mean([one.latency_s for one in best[late]])


@pytest.mark.parametrize("phase_s", np.arange(0.0, 0.25, 0.02).round(3))
def test_a_camera_as_fast_as_a_keeper_does_not_keep_the_link_unmeasured(
    known: Bundle, lines: dict[int, Line], phase_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A keeper looks four times a second or more; each request is on the link for 60 ms of its 250."""
    measured_s: list[float] = []
    monkeypatch.setattr(Pilot, "wants_probe", lambda pilot, now_s: measured_s.append(now_s) or True)
    link = Link(rate_bps=4e6, delay_s=0.02)
    simulate_pilot(Pilot(known, plan=SPLIT16), lines, [phase_s + 0.25 * k for k in range(80)], link)
    assert max(np.diff([0.0, *measured_s, 20.0])) < 2.0


def test_the_way_is_measured_where_something_is_always_under_way(
    known: Bundle, lines: dict[int, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests of 46 ms every 20 ms: there is no idle link to measure."""
    ways_s: list[float] = []
    beaten = Pilot.beaten

    def told(pilot: Pilot, token: int, now_s: float, *, is_way: bool) -> None:
        beaten(pilot, token, now_s, is_way=is_way)
        if is_way:
            ways_s.append(now_s)

    monkeypatch.setattr(Pilot, "beaten", told)
    link = Link(rate_bps=2e7, delay_s=0.02)
    simulate_pilot(Pilot(known, plan=SPLIT16), lines, [0.5 + 0.02 * k for k in range(2000)], link)
    assert max(np.diff([0.0, *ways_s, 40.5])) < 11.0


def test_an_edge_that_was_busy_is_tried_again(
    known: Bundle, lines: dict[int, Line], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requests wait 200 ms there for five seconds, and never again: the device must not stay alone for ever."""
    replied = Pilot.replied

    def busy(pilot: Pilot, request: int, now_s: float, durations: Durations) -> None:
        wait_us = 200_000 if 5.0 < now_s < 10.0 else 0
        replied(pilot, request, now_s + 1e-6 * wait_us, durations._replace(wait_us=wait_us))

    monkeypatch.setattr(Pilot, "replied", busy)
    link = Link(rate_bps=1e8, delay_s=0.005)
    ended = simulate_pilot(Pilot(known), lines, [0.25 * k for k in range(160)], link)
    (want,) = {one.plan for one in oracle(lines, [0.0], link)}
    assert {one.plan for one in ended if 5.5 < one.start_s < 7.0} == {DEVICE}
    assert {one.plan for one in ended if 20.0 < one.start_s} == {want}


def outage(start_s: float, end_s: float) -> Link:
    trace = Trace(
        name="t", start_s=(0.0, start_s, end_s), rate_bps=(5e7, 0.0, 5e7), duration_s=max(100.0, end_s + 50)
    )
    return Link(rate_bps=5e7, delay_s=0.001, trace=trace, down_rate_bps=1e7)


@pytest.mark.parametrize(("hedge", "worst_s"), [(math.inf, 2.5), (0.3, 0.2)])
def test_an_outage_costs_what_it_takes_to_notice(
    known: Bundle, lines: dict[int, Line], hedge: float, worst_s: float
) -> None:
    ended = simulate_pilot(Pilot(known), lines, arrivals(200), outage(5.0, 12.0), notice_s=2.0, hedge=hedge)
    assert sorted(one.request for one in ended) == list(range(200))
    during = [one for one in ended if 5.1 < one.start_s < 11.9]
    assert max(one.latency_s for one in ended) < worst_s
    assert {one.answered for one in during} <= {"fallback", "device"}
    # It comes back by itself, within some tries.
    assert all(one.answered == "edge" for one in ended if one.start_s > 16)


def test_a_fixed_plan_is_guarded_as_well(known: Bundle, lines: dict[int, Line]) -> None:
    ended = simulate_pilot(Pilot(known, plan=UPLOAD), lines, arrivals(200), outage(5.0, 12.0), hedge=0.3)
    counts = {answered: len(list(some)) for answered, some in itertools.groupby(sorted(o.answered for o in ended))}
    assert set(counts) == {"edge", "fallback"} and counts["fallback"] >= 65


@pytest.mark.parametrize("plan", [DEVICE, SPLIT16])
def test_a_pause_of_the_device_is_added_to_its_request_alone(
    known: Bundle, lines: dict[int, Line], plan: int
) -> None:
    link, at_s = Link(rate_bps=4e6, delay_s=0.003), [1.0 + t for t in arrivals(4)]
    pauses_s = [0.0, 0.05]
    plain, paused = (
        simulate_pilot(Pilot(known, plan=plan), lines, at_s, link, pauses_s=some) for some in ((), pauses_s)
    )
    more_s = [one.latency_s - before.latency_s for one, before in zip(paused, plain, strict=True)]
    assert more_s == pytest.approx([0.0, 0.05, 0.0, 0.0])
    only = {plan: lines[plan]}
    more_s = [
        one.latency_s - before.latency_s
        for one, before in zip(oracle(only, at_s, link, pauses_s=pauses_s), oracle(only, at_s, link), strict=True)
    ]
    assert more_s == pytest.approx([0.0, 0.05, 0.0, 0.0])


@pytest.mark.parametrize("given", [{"window": 0}, {"notice_s": 0.0}])
def test_a_simulation_of_one_device_needs_numbers(known: Bundle, lines: dict[int, Line], given: dict) -> None:
    with pytest.raises(PlanError, match="a window of 1 or more and a bound above 0 s"):
        simulate_pilot(Pilot(known), lines, [0.0], Link(rate_bps=1e6), **given)
    with pytest.raises(PlanError, match="a simulation needs a request"):
        simulate_pilot(Pilot(known), lines, [], Link(rate_bps=1e6))


def test_every_recorded_link_is_named_once() -> None:
    from bench.traces import TRACES, named, trace_files

    if not TRACES.is_dir():
        pytest.skip("the recorded links are not at hand")
    names = [named(path) for path in trace_files()]
    assert len(set(names)) == len(names) == 17
    assert all(isinstance(path, Path) for path in trace_files())
