from __future__ import annotations

import math
import random
import re

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coinfer.errors import Infeasible, PlanError
from coinfer.profile import Arrivals, Conditions, Link, Radio, Slowdown
from coinfer.protocol import wire_bytes
from coinfer.search import Goal, Table, baselines, estimate, search

RADIO = Radio(name="wifi", alpha_w_per_bps=1e-7, beta_w=0.1)
CONDITIONS = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10, int8=20))


def brute_force(candidates, conditions, goal):
    """The feasible candidates in order, each priced by hand, one at a time."""
    link, found = conditions.link, []
    for index, candidate in enumerate(candidates):
        e, plan = candidate.evidence, candidate.plan
        factor = conditions.device.int8 if plan.precision == "int8" else conditions.device.fp32
        device_s = e.head_s * factor + e.encode_s * conditions.device.fp32
        edge_s = (e.decode_s + e.tail_s) * conditions.edge_load
        up = down = 0.0
        latency_s = device_s + edge_s
        if plan.kind != "device":
            up = float(wire_bytes(e.payload_bytes, masked=True))
            down = float(wire_bytes(e.reply_bytes, masked=False))
            latency_s += (up + down) * 8 / link.rate_bps + 2 * link.delay_s + conditions.exchange_s
        period_s = max(device_s, edge_s, up * 8 / link.rate_bps, down * 8 / link.rate_bps)
        sending_w = RADIO.alpha_w_per_bps * link.rate_bps + RADIO.beta_w
        energy_j = device_s * conditions.device_power_w + up * 8 / link.rate_bps * sending_w
        objectives = {"latency": latency_s, "throughput": period_s, "bytes": up, "energy": energy_j}
        is_feasible = (
            candidate.dropped is None
            and e.loss_points is not None
            and e.loss_points <= goal.max_loss_points + 1e-9
            and (goal.max_latency_s is None or latency_s <= goal.max_latency_s)
            and (goal.min_throughput_hz is None or 1 / period_s >= goal.min_throughput_hz)
            and (goal.max_energy_j is None or energy_j <= goal.max_energy_j)
            and (goal.max_bytes is None or up <= goal.max_bytes)
        )
        if is_feasible:
            found.append((objectives[goal.minimise], up, latency_s, plan.number, index))
    return sorted(found)


def limits(low, high):
    return st.one_of(st.none(), st.floats(low, high))


goals = st.builds(
    Goal,
    minimise=st.sampled_from(["latency", "throughput", "bytes", "energy"]),
    max_loss_points=st.floats(-1, 3),
    max_latency_s=limits(0.001, 1),
    min_throughput_hz=limits(1, 1000),
    max_energy_j=limits(0.0001, 1),
    max_bytes=limits(0, 5000),
)
conditions_of_any_kind = st.builds(
    Conditions,
    link=st.builds(Link, rate_bps=st.floats(1e4, 1e9), delay_s=st.floats(0, 0.1)),
    device=st.builds(Slowdown, fp32=st.floats(1, 300), int8=st.floats(1, 300)),
    edge_load=st.floats(0.5, 8),
    exchange_s=st.floats(0, 0.01),
    device_power_w=st.floats(0.1, 10),
    radio=st.just(RADIO),
)


def random_candidates(make_candidate, seed):
    rng = random.Random(seed)
    return [
        make_candidate(
            rng.randrange(1000),
            rng.choice(["device", "upload", "split"]),
            payload_bytes=float(rng.choice([20, 300, 2000, 5000])),
            loss_points=rng.choice([None, -0.3, 0.0, 0.5, 1.0, 2.5]),
            head_s=rng.choice([0.0005, 0.002, 0.01]),
            tail_s=rng.choice([0.0005, 0.002, 0.01]),
            precision=rng.choice(["fp32", "int8"]),
            dropped=rng.choice([None, None, None, "round 1: dominated"]),
        )
        for _ in range(rng.randrange(1, 12))
    ]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), conditions=conditions_of_any_kind, goal=goals)
def test_a_search_equals_brute_force(make_candidate, seed, conditions, goal):
    candidates = random_candidates(make_candidate, seed)
    expected = brute_force(candidates, conditions, goal)
    if not expected:
        with pytest.raises(Infeasible):
            search(candidates, conditions, goal)
        assert baselines(candidates, conditions, goal) == {}
        return
    ranking = search(candidates, conditions, goal)
    chosen = candidates[ranking.best]
    assert ranking.num_feasible == len(expected)
    got = ranking.rows[0]
    # Sums are taken in another order, so two candidates of equal price may differ in the last bits.
    assert objective_of(got, goal) == pytest.approx(expected[0][0], rel=1e-12)
    assert chosen.dropped is None and chosen.evidence.loss_points <= goal.max_loss_points + 1e-9
    assert {row.index for row in ranking.rows if row.rejected is None} == {entry[-1] for entry in expected}
    assert sorted(row.index for row in ranking.rows) == list(range(len(candidates)))
    for kind, index in baselines(candidates, conditions, goal).items():
        best = next(entry for entry in expected if candidates[entry[-1]].plan.kind == kind)
        row = next(row for row in ranking.rows if row.index == index)
        assert candidates[index].plan.kind == kind
        assert objective_of(row, goal) == pytest.approx(best[0], rel=1e-12)


def objective_of(row, goal):
    return {
        "latency": row.latency_s,
        "throughput": 1 / row.throughput_hz,
        "bytes": row.wire_bytes,
        "energy": row.energy_j,
    }[goal.minimise]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), conditions=conditions_of_any_kind, goal=goals)
def test_what_an_infeasible_search_says_to_relax_is_enough(make_candidate, seed, conditions, goal):
    candidates = random_candidates(make_candidate, seed)
    try:
        search(candidates, conditions, goal)
    except Infeasible as error:
        message = str(error)
    else:
        return
    if "relax" not in message:
        assert all(c.dropped or c.evidence.loss_points is None for c in candidates)
        return
    main, *alone = message.split(": relax ")[1].split(", or ")
    relaxed = {}
    for part in main.split(" and "):
        name, limit = part.split(" from ")[0], part.split(" to ")[1]
        relaxed[name] = float(limit)
    ways = [relaxed, *({way.split(" alone to ")[0]: float(way.split(" alone to ")[1])} for way in alone)]
    for way in ways:
        fields = {name: getattr(goal, name) for name in goal.__struct_fields__}
        assert search(candidates, conditions, Goal(**{**fields, **way})).num_feasible >= 1


def test_ties_go_to_fewer_bytes_then_the_lower_number(make_candidate):
    link = Link(rate_bps=8e6)
    # Work on the device makes the latencies equal: 1 B is 1 us on this link and both fit one segment.
    small = make_candidate(9, "split", payload_bytes=100.0, head_s=0.0002)
    large = make_candidate(1, "split", payload_bytes=100.0, head_s=0.0002)
    slow = make_candidate(0, "split", payload_bytes=90.0, head_s=0.0003)
    ranking = search([small, large, slow], Conditions(link=link), Goal(minimise="latency"))
    assert [row.index for row in ranking.rows] == [1, 0, 2]
    by_bytes = search([small, large, slow], Conditions(link=link), Goal(minimise="bytes"))
    assert [row.index for row in by_bytes.rows] == [2, 1, 0]


def test_an_objective_tie_goes_to_fewer_bytes(make_candidate):
    # The edge bounds both streams, so both sustain the same rate.
    heavy = make_candidate(0, "split", payload_bytes=900.0, tail_s=0.1)
    light = make_candidate(1, "split", payload_bytes=100.0, tail_s=0.1)
    ranking = search([heavy, light], Conditions(link=Link(rate_bps=1e9)), Goal(minimise="throughput"))
    assert ranking.rows[0].throughput_hz == ranking.rows[1].throughput_hz
    assert ranking.best == 1


def test_exactly_the_allowed_loss_is_allowed(make_candidate):
    loss_points = 100 * (0.93 - 0.92)
    assert loss_points > 1.0
    assert search([make_candidate(0, "device", loss_points=loss_points)], CONDITIONS, Goal()).best == 0


def test_rejected_rows_say_why_and_come_last(make_candidate, trio):
    candidates = [
        *trio,
        make_candidate(3, "split", loss_points=1.8, payload_bytes=1.0, head_s=0.0, tail_s=0.0),
        make_candidate(4, "split", dropped="round 1 (250 images): beaten by plan 2 in bytes and device time"),
        make_candidate(5, "split", loss_points=None),
    ]
    rows = search(candidates, CONDITIONS, Goal(max_latency_s=0.05)).rows
    reasons = {row.index: row.rejected for row in rows}
    assert reasons[3] == "loss 1.8 > 1 points"
    assert reasons[4] == "round 1 (250 images): beaten by plan 2 in bytes and device time"
    assert reasons[5] == "loss not measured"
    assert reasons[0].startswith("latency 100 ms > 50 ms")
    assert [row.rejected is None for row in rows] == sorted((row.rejected is None for row in rows), reverse=True)


def test_the_reason_names_every_kind_and_its_dominant_stage(trio):
    ranking = search(trio, CONDITIONS, Goal())
    assert ranking.reason == (
        "The best plan is 1 (upload net png), which answers in 39.4 ms, 55 % of it send. "
        "The best device plan is 0 (device net), which answers in 100 ms, 100 % of it head. "
        "The best split plan is 2 (split net layer2#0 uniform2c-range), which answers in 51.5 ms, 58 % of it head."
    )


@pytest.mark.parametrize(
    ("minimise", "part"),
    [
        ("throughput", "sustains 59.6 a second, bound by the uplink"),
        ("bytes", "0 (device net), which sends nothing and answers in 100 ms"),
        ("energy", "spends 0.00735 J of the device and answers in 39.4 ms"),
    ],
)
def test_the_reason_speaks_of_the_objective(trio, minimise, part):
    conditions = Conditions(
        link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10, int8=20), device_power_w=2.0, radio=RADIO
    )
    assert part in search(trio, conditions, Goal(minimise=minimise)).reason


def test_a_kind_without_a_feasible_plan_is_said_to_have_none(trio):
    ranking = search(trio, CONDITIONS, Goal(max_loss_points=0.2))
    assert "No split plan meets the constraints." in ranking.reason
    assert set(baselines(trio, CONDITIONS, Goal(max_loss_points=0.2))) == {"device", "upload"}


def test_constraint_costs_compare_with_and_without(make_candidate, trio):
    fast_but_lossy = make_candidate(3, "split", loss_points=4.0, payload_bytes=10.0, head_s=0.0001, tail_s=0.001)
    goal = Goal(max_loss_points=1.0, max_bytes=500.0)
    ranking = search([*trio, fast_but_lossy], CONDITIONS, goal)
    assert ranking.best == 2
    costs = {cost.name: cost for cost in ranking.constraint_costs}
    assert set(costs) == {"max_loss_points", "max_bytes"}
    assert costs["max_loss_points"].index_without == 3
    assert costs["max_bytes"].index_without == 1
    for cost in costs.values():
        assert cost.objective == ranking.rows[0].latency_s
        assert cost.objective_without < cost.objective


def test_a_constraint_that_costs_nothing_keeps_the_winner(trio):
    ranking = search(trio, CONDITIONS, Goal(max_latency_s=10.0))
    assert [cost.index_without for cost in ranking.constraint_costs] == [ranking.best] * 2


def test_throughput_costs_are_in_requests_a_second(make_candidate):
    candidates = [
        make_candidate(0, "device", head_s=0.010),
        make_candidate(1, "device", head_s=0.001, loss_points=3.0),
    ]
    (cost,) = search(candidates, Conditions(link=Link(rate_bps=1e6)), Goal(minimise="throughput")).constraint_costs
    assert (cost.objective, cost.objective_without) == (pytest.approx(100.0), pytest.approx(1000.0))


def test_infeasible_names_the_nearest_miss_and_what_to_relax(trio):
    with pytest.raises(Infeasible) as caught:
        search(trio, CONDITIONS, Goal(max_latency_s=0.039))
    assert str(caught.value) == (
        "no candidate meets the goal; the nearest miss is plan 1 (upload net png) with "
        "latency 39.4 ms > 39 ms: relax max_latency_s from 0.039 to 0.0395"
    )


def test_infeasible_names_other_single_ways_out(trio):
    ways = "relax max_loss_points from 0.2 to 0.5, or max_latency_s alone to 0.1, or max_bytes alone to 2100$"
    with pytest.raises(Infeasible, match=ways):
        search(trio, CONDITIONS, Goal(max_loss_points=0.2, max_bytes=1000.0, max_latency_s=0.06))


def test_infeasible_when_every_candidate_was_dropped(make_candidate):
    with pytest.raises(Infeasible, match="all 1 were dropped before"):
        search([make_candidate(0, "device", dropped="round 1")], CONDITIONS, Goal())


def test_the_device_holds_no_more_than_its_limit(make_candidate, trio):
    small, large = (make_candidate(k, "device", head_s=0.01 / k, device_bytes=1e5 * k) for k in (1, 2))
    link = Conditions(link=Link(rate_bps=1e3))
    assert search([small, large], link, Goal()).best == 1
    assert search([small, large], link, Goal(max_device_bytes=1.5e5)).best == 0
    with pytest.raises(Infeasible, match=r"100 kB > 50 kB on the device: relax max_device_bytes from 50000 to 100000"):
        search([small, large], link, Goal(max_device_bytes=5e4))
    # What was not measured does not keep a limit.
    with pytest.raises(Infeasible, match="no candidate's size is known"):
        search([make_candidate(1, "device")], link, Goal(max_device_bytes=5e4))


def test_no_candidates_is_a_plan_error():
    with pytest.raises(PlanError, match="at least one candidate, got none"):
        search([], CONDITIONS, Goal())


@pytest.mark.parametrize("goal", [Goal(minimise="energy"), Goal(max_energy_j=1.0)])
def test_energy_needs_powers(trio, goal):
    with pytest.raises(PlanError, match="needs the device's power and a radio"):
        search(trio, CONDITIONS, goal)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"minimise": "speed"}, 'got "speed"'),
        ({"max_loss_points": math.nan}, "max_loss_points must be a number, got nan"),
        ({"max_latency_s": -1.0}, "max_latency_s must be at least 0, got -1.0"),
        ({"min_throughput_hz": math.nan}, "min_throughput_hz must be at least 0, got nan"),
    ],
)
def test_a_goal_refuses_what_makes_no_sense(fields, message):
    with pytest.raises(PlanError, match=message):
        Goal(**fields)


def test_a_table_gives_the_same_answer_as_its_candidates(trio):
    table = Table(trio)
    assert len(table) == 3
    assert search(table, CONDITIONS, Goal()).rows == search(trio, CONDITIONS, Goal()).rows
    assert baselines(table, CONDITIONS, Goal()) == {"device": 0, "upload": 1, "split": 2}


def test_arrivals_that_nobody_can_serve_name_the_highest_rate(trio: list) -> None:
    base = Conditions(link=Link(rate_bps=1e6))
    fastest = max(row.throughput_hz for row in search(trio, base, Goal()).rows)
    busy = msgspec.structs.replace(base, arrivals=Arrivals(rate_hz=0.9 * fastest))
    assert search(trio, busy, Goal()).rows[0].throughput_hz >= 0.9 * fastest
    overrun = msgspec.structs.replace(base, arrivals=Arrivals(rate_hz=2 * fastest))
    with pytest.raises(Infeasible, match="relax min_throughput_hz from") as caught:
        search(trio, overrun, Goal())
    named = float(re.search(r"to ([0-9.e+]+)", str(caught.value)).group(1))
    assert named == pytest.approx(fastest, rel=0.01) and named <= fastest


@pytest.mark.parametrize("is_random", [False, True])
@pytest.mark.parametrize("limit_s", [None, 0.05, 0.2])
def test_the_rate_that_is_named_can_be_held(trio: list, is_random: bool, limit_s: float | None) -> None:
    def at(rate_hz: float) -> Conditions:
        return Conditions(link=Link(rate_bps=1e6), arrivals=Arrivals(rate_hz=rate_hz, is_random=is_random))

    goal = Goal(max_latency_s=limit_s)
    with pytest.raises(Infeasible, match="goal at 1e[+]09 requests a second; plan .* holds most") as caught:
        search(trio, at(1e9), goal)
    named = float(re.search(r"min_throughput_hz from 1e[+]09 to ([0-9.e+]+)", str(caught.value)).group(1))
    assert search(trio, at(named), goal).num_feasible >= 1
    with pytest.raises(Infeasible):
        search(trio, at(1.02 * named), goal)


def test_where_no_rate_would_do_the_rest_is_named(trio: list) -> None:
    busy = Conditions(link=Link(rate_bps=1e6), arrivals=Arrivals(rate_hz=1.0))
    with pytest.raises(Infeasible, match="nearest miss .* relax max_latency_s from 1e-09 to"):
        search(trio, busy, Goal(max_latency_s=1e-9))


def test_even_arrivals_at_just_the_highest_rate_are_served(make_candidate) -> None:
    candidate = make_candidate(0, "device", head_s=0.004)
    exactly = Conditions(link=Link(rate_bps=1e6), arrivals=Arrivals(rate_hz=250.0))
    assert estimate(candidate, exactly).latency_s == pytest.approx(0.004)
    assert search([candidate], exactly, Goal()).num_feasible == 1
    crowd = msgspec.structs.replace(exactly, arrivals=Arrivals(rate_hz=250.0, is_random=True))
    assert estimate(candidate, crowd).latency_s == math.inf


def test_the_resource_that_binds_many_devices_is_the_one_they_share(make_candidate) -> None:
    candidate = make_candidate(1, "upload", payload_bytes=1000, tail_s=0.002, encode_s=0.0, decode_s=0.0)
    alone = Conditions(link=Link(rate_bps=1e6))
    assert estimate(candidate, alone).critical == "uplink"
    crowd = msgspec.structs.replace(alone, arrivals=Arrivals(rate_hz=2.0, is_random=True, devices=40))
    found = estimate(candidate, crowd)
    assert found.critical == "edge" and found.throughput_hz == pytest.approx(1 / (40 * 0.002))
    assert found.stages_s["wait"] > 0 and sum(found.stages_s.values()) == pytest.approx(found.latency_s)
