"""Plans of several streams against every combination, and against the simulation of their requests."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.profile import Arrivals, Conditions, Link, Slowdown
from coinfer.search import Goal, Table, estimate
from coinfer.search.streams import StreamAsk, choose_plans
from coinfer.simulate.arrivals import poisson
from coinfer.simulate.events import Stream, simulate
from coinfer.stages import courses_of, price

CONDITIONS = Conditions(link=Link(rate_bps=2e6, delay_s=0.002), device=Slowdown(fp32=10, int8=10))


def network(make_candidate, seed: int, count: int = 7) -> Table:
    chance = np.random.default_rng(seed)
    return Table([
        make_candidate(
            number, ("device", "upload", "split")[number % 3],
            payload_bytes=float(chance.uniform(30, 3000)), loss_points=float(chance.choice([0.0, 0.5, 2.0])),
            head_s=float(chance.uniform(2e-4, 4e-3)), tail_s=float(chance.uniform(2e-4, 4e-3)),
        )
        for number in range(count)
    ])  # fmt: skip


def latencies_by_hand(streams: list[StreamAsk], picked: tuple[int, ...]) -> list[float] | None:
    """Each stream's latency; None where a resource is overrun or a plan loses too much."""
    found, loads, squares = [], dict.fromkeys(("device", "uplink", "edge", "downlink"), 0.0), []
    for stream, index in zip(streams, picked, strict=True):
        candidate = stream.table.candidates[index]
        if candidate.evidence.loss_points > stream.goal.max_loss_points:
            return None
        (course,) = courses_of(candidate, {})
        busy_s = {name: float(value) for name, value in price(course.work, CONDITIONS).busy_s.items()}
        for name in loads:
            loads[name] += stream.arrivals.rate_hz * busy_s[name]
        squares.append({name: stream.arrivals.rate_hz * busy_s[name] ** 2 for name in loads})
    if max(loads.values()) >= 1:
        return None
    for k, (stream, index) in enumerate(zip(streams, picked, strict=True)):
        candidate = stream.table.candidates[index]
        took = estimate(candidate, CONDITIONS).latency_s
        for name in loads:
            if name == "device" or candidate.plan.kind != "device":
                others = [s[name] for j, s in enumerate(squares) if j != k or stream.arrivals.is_random]
                took += sum(others) / (2 * (1 - loads[name]))
        if stream.goal.max_latency_s is not None and took > stream.goal.max_latency_s:
            return None
        found.append(took)
    return found


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("minimise", ["latency", "throughput"])
def test_the_choice_is_the_best_of_all_combinations(make_candidate, seed: int, minimise: str) -> None:
    chance = np.random.default_rng(100 + seed)
    streams = [
        StreamAsk(
            network(make_candidate, 10 * seed + k),
            Goal(max_loss_points=1.0, max_latency_s=0.05 if seed % 3 == 0 else None),
            Arrivals(rate_hz=float(chance.uniform(3, 25)), is_random=bool(chance.integers(2))),
        )
        for k in range(3)
    ]  # fmt: skip
    known = {}
    for picked in itertools.product(*(range(len(stream.table)) for stream in streams)):
        latencies = latencies_by_hand(streams, picked)
        if latencies is not None:
            known[picked] = latencies
    if not known:
        with pytest.raises(Infeasible, match="streams together|relax|deadlines of all"):
            choose_plans(streams, CONDITIONS, minimise=minimise)
        return
    choice = choose_plans(streams, CONDITIONS, minimise=minimise)
    assert choice.latency_s == pytest.approx(known[choice.indexes])
    if minimise == "latency":
        assert sum(choice.latency_s) == pytest.approx(min(sum(latencies) for latencies in known.values()))
    else:
        busiest = {
            picked: max(
                sum(s.arrivals.rate_hz * busy(s, index, name) for s, index in zip(streams, picked, strict=True))
                for name in ("device", "uplink", "edge", "downlink")
            )
            for picked in known
        }
        assert 1 / choice.headroom == pytest.approx(min(busiest.values()))


def busy(stream: StreamAsk, index: int, name: str) -> float:
    (course,) = courses_of(stream.table.candidates[index], {})
    return float(price(course.work, CONDITIONS).busy_s[name])


def test_streams_wait_for_each_other_as_in_the_simulation(make_candidate) -> None:
    tables = [
        Table([make_candidate(0, "device", head_s=0.002)]),
        Table([make_candidate(0, "device", head_s=0.0005)]),
    ]
    asks = [StreamAsk(t, Goal(), Arrivals(rate_hz=r, is_random=True)) for t, r in zip(tables, (20, 60), strict=True)]
    choice = choose_plans(asks, CONDITIONS)
    assert choice.loads["device"] == pytest.approx(0.7)
    runs = [
        Stream(
            ask.table.candidates[0].plan, courses_of(ask.table.candidates[0], {}),
            poisson(ask.arrivals.rate_hz, int(300 * ask.arrivals.rate_hz), seed=k), CONDITIONS, window=10**6,
        )
        for k, ask in enumerate(asks)
    ]  # fmt: skip
    outcomes = simulate(runs, spans=False).outcomes
    cut = len(runs[0].arrivals_s)
    seen = [np.mean([o.latency_s for o in part]) for part in (outcomes[:cut], outcomes[cut:])]
    # Streams take turns: weighted by load, the waits are as said.
    said, met = (0.4 * (given[0] - 0.02) + 0.3 * (given[1] - 0.005) for given in (choice.latency_s, seen))
    assert said == pytest.approx(met, rel=0.08)


def test_one_even_stream_waits_for_nobody(make_candidate) -> None:
    table = network(make_candidate, 3)
    choice = choose_plans([StreamAsk(table, Goal(), Arrivals(rate_hz=1.0))], CONDITIONS)
    want = min(
        estimate(c, CONDITIONS).latency_s for c in table.candidates if (c.evidence.loss_points or 0.0) <= 1.0
    )
    assert choice.mean_latency_s == pytest.approx(want)


def test_what_cannot_be_served_together_names_the_resource(make_candidate) -> None:
    slow = Table([make_candidate(0, "device", head_s=0.01)])
    asks = [StreamAsk(slow, Goal(), Arrivals(rate_hz=6.0)) for _ in range(2)]
    with pytest.raises(Infeasible, match="the device would be busy 120 % of the time"):
        choose_plans(asks, CONDITIONS)
    strict = asks[0]._replace(goal=Goal(max_latency_s=1e-3))
    with pytest.raises(Infeasible, match="relax max_latency_s"):
        choose_plans([strict], CONDITIONS)
    with pytest.raises(PlanError, match='got 0, "latency"'):
        choose_plans([], CONDITIONS)
    with pytest.raises(PlanError, match='"bytes"'):
        choose_plans(asks, CONDITIONS, minimise="bytes")


def test_a_deadline_counts_the_wait_for_other_streams(make_candidate) -> None:
    table = Table([make_candidate(0, "device", head_s=0.002)])
    asks = [StreamAsk(table, Goal(max_latency_s=0.021), Arrivals(rate_hz=15)) for _ in range(2)]
    assert choose_plans(asks[:1], CONDITIONS).latency_s == pytest.approx((0.02,))
    with pytest.raises(Infeasible, match=r"keep the deadlines of all 2 streams.*stream \d takes .* ms > 21 ms"):
        choose_plans(asks, CONDITIONS)
