"""Divisions of graphs: equal to trying every one of them, on random graphs; what cannot be is refused."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.profile import Conditions, Link
from coinfer.search import Goal, search
from coinfer.search.dag import Dag, DagValue, Division, divide, heavy_load, light_load
from coinfer.stages import cost, stages, work_of


def random_dag(seed: int, *, most: int = 8) -> Dag:
    """Up to `most` layers, each reading one to three values made before it; values of several readers among them."""
    rng = np.random.default_rng(seed)
    count = int(rng.integers(1, most + 1))
    readers: dict[int, set[int]] = {k: set() for k in range(-2, count)}
    for layer in range(count):
        for made in rng.integers(-2, layer, size=rng.integers(1, 4)) if layer else rng.integers(-2, 0, size=2):
            readers[int(made)].add(layer)
    values = tuple(
        DagValue(f"v{made}", float(rng.choice((0.5, 1.0, 3.0, 9.0))), None if made < 0 else made, tuple(sorted(found)))
        for made, found in readers.items()
    )
    device, edge = rng.integers(0, 12, count) / 4, rng.integers(0, 12, count) / 16
    return Dag(tuple(map(float, device)), tuple(map(float, edge)), values, float(rng.choice((0.0, 0.0, 1.0, 4.0))))


def every_division(dag: Dag) -> list[Division]:
    """All that the graph allows, found by trying all sets of layers."""
    found = []
    layers = range(len(dag.device_s))
    for size in range(len(layers) + 1):
        for chosen in combinations(layers, size):
            try:
                found.append(divide(dag, frozenset(chosen)))
            except PlanError:
                continue
    return found


@pytest.mark.parametrize("first", range(0, 1000, 100))
def test_light_and_heavy_load_equal_trying_everything(first: int) -> None:
    for seed in range(first, first + 100):
        dag = random_dag(seed)
        every = every_division(dag)
        assert light_load(dag).latency_s == pytest.approx(min(d.latency_s for d in every), abs=1e-9), seed
        if seed % 4 == 0:
            heavy, best_s = heavy_load(dag), min(d.period_s for d in every)
            assert heavy.division.period_s == pytest.approx(best_s, abs=1e-6), seed
            assert heavy.bound_s <= best_s + 1e-6


def is_pinned(division: Division, pinned: dict[int, str]) -> bool:
    return all((k in division.on_device) == (side == "device") for k, side in pinned.items())


def test_pins_hold_and_equal_trying_everything_with_them() -> None:
    tried = 0
    for seed in range(60):
        dag = random_dag(seed)
        rng = np.random.default_rng(seed)
        layers = rng.permutation(len(dag.device_s))[:2]
        pinned = {int(k): ("device", "edge")[int(rng.integers(2))] for k in layers}
        fitting = [d for d in every_division(dag) if is_pinned(d, pinned)]
        if not fitting:
            with pytest.raises(Infeasible, match="pinned to the device and needs layer .* pinned to the edge"):
                light_load(dag, pinned=pinned)
            continue
        tried += 1
        best = light_load(dag, pinned=pinned)
        assert is_pinned(best, pinned)
        assert best.latency_s == pytest.approx(min(d.latency_s for d in fitting), abs=1e-9), seed
        heavy = heavy_load(dag, pinned=pinned)
        assert heavy.division.period_s == pytest.approx(min(d.period_s for d in fitting), abs=1e-6), seed
    assert tried > 20


def test_a_value_is_paid_once_however_many_read_it() -> None:
    values = (DagValue("x", 9.0, None, (0,)), DagValue("y", 1.0, 0, (1, 2, 3)))
    dag = Dag((0.1, 5.0, 5.0, 5.0), (0.1, 0.1, 0.1, 0.1), values)
    best = light_load(dag)
    assert (best.on_device, best.crossing, best.link_s) == (frozenset({0}), ("y",), 1.0)


def test_a_stream_takes_another_division_than_a_lone_request() -> None:
    # A chain of three equal layers, the edge as fast as the device: alone all stay, a stream shares.
    values = tuple(DagValue(f"v{k}", 0.1, None if k == 0 else k - 1, (k,)) for k in range(3))
    dag = Dag((1.0, 1.0, 1.0), (1.0, 1.0, 1.0), values)
    assert light_load(dag).on_device == frozenset({0, 1, 2})
    heavy = heavy_load(dag)
    assert heavy.division.period_s == 2.0 and heavy.bound_s == pytest.approx(2.0)


def test_times_that_are_no_neat_fractions_equal_trying_everything() -> None:
    for seed in range(150):
        rng, dag = np.random.default_rng(seed), random_dag(seed)
        dag = Dag(
            tuple(map(float, rng.lognormal(-9, 3, len(dag.device_s)))),
            tuple(map(float, rng.lognormal(-11, 3, len(dag.device_s)))),
            tuple(value._replace(send_s=float(rng.lognormal(-9, 3))) for value in dag.values),
            float(rng.choice((0.0, 1e-3))),
        )  # fmt: skip
        every = every_division(dag)
        assert light_load(dag).latency_s == pytest.approx(min(d.latency_s for d in every), rel=1e-9), seed
        assert heavy_load(dag).division.period_s == pytest.approx(min(d.period_s for d in every), rel=1e-4), seed


@pytest.mark.parametrize("seed", range(60))
def test_pins_hold_on_large_graphs_of_any_times(seed: int) -> None:
    rng, layers = np.random.default_rng(seed), 60
    readers: dict[int, set[int]] = {k: set() for k in range(-1, layers)}
    for layer in range(layers):
        for made in rng.integers(max(-1, layer - 8), layer, size=rng.integers(1, 4)):
            readers[int(made)].add(layer)
    values = tuple(
        DagValue(
            f"v{made}", math.inf if rng.random() < 0.2 else float(rng.lognormal(-6, 2)), None if made < 0 else made,
            tuple(sorted(found)),
        )
        for made, found in readers.items()
    )  # fmt: skip
    device_s = tuple(map(float, rng.lognormal(-7, 2, layers)))
    dag = Dag(device_s, tuple(second / 7 for second in device_s), values, 0.003)
    late = {int(rng.integers(30, 60)): "device"}
    for pinned in ({}, {seed: "device"}, late):
        best = light_load(dag, pinned=pinned)
        assert is_pinned(best, pinned)
        # No layer alone is better on the other side, nor is everything here.
        for k in range(layers):
            try:
                moved = divide(dag, best.on_device ^ {k})
            except PlanError:
                continue
            assert not is_pinned(moved, pinned) or moved.latency_s >= best.latency_s * (1 - 1e-9)
        assert divide(dag, frozenset(range(layers))).latency_s >= best.latency_s * (1 - 1e-9)
        if seed % 10 == 0:
            heavy = heavy_load(dag, pinned=pinned)
            assert is_pinned(heavy.division, pinned) and heavy.bound_s <= heavy.division.period_s


def test_a_value_that_cannot_cross_never_does_and_is_named() -> None:
    tried = 0
    for seed in range(200):
        dag = random_dag(seed)
        made = next((k for k, value in enumerate(dag.values) if value.producer is not None and value.readers), None)
        if made is None:
            continue
        stuck = dag.values[made]._replace(send_s=math.inf)
        dag = dag._replace(values=(*dag.values[:made], stuck, *dag.values[made + 1 :]))
        every = every_division(dag)
        best, heavy = light_load(dag), heavy_load(dag)
        assert stuck.name not in best.crossing and stuck.name not in heavy.division.crossing
        assert best.latency_s == pytest.approx(min(d.latency_s for d in every), abs=1e-9), seed
        assert heavy.division.period_s == pytest.approx(min(d.period_s for d in every), abs=1e-6), seed
        assert stuck.producer is not None
        pinned = {stuck.producer: "device", stuck.readers[0]: "edge"}
        with pytest.raises(PlanError, match=f'"{stuck.name}" cannot cross'):
            before = frozenset(range(stuck.producer + 1))
            divide(dag, before)
        with pytest.raises(Infeasible, match=f'need what cannot cross: "{stuck.name}"'):
            light_load(dag, pinned=pinned)
        with pytest.raises(Infeasible, match="cannot cross"):
            heavy_load(dag, pinned=pinned)
        tried += 1
    assert tried > 100


@pytest.mark.parametrize("seed", range(20))
def test_the_search_over_a_chain_is_dads(make_candidate, seed: int) -> None:
    """Light load is its least latency, heavy load its highest rate, where nothing is coded or pruned."""
    rng = np.random.default_rng(seed)
    count = 6
    device_s, edge_s = rng.uniform(1e-3, 2e-2, count), rng.uniform(1e-4, 8e-3, count)
    sizes = rng.integers(20, 6000, count)
    conditions = Conditions(link=Link(rate_bps=float(rng.choice((3e5, 2e6, 2e7))), delay_s=0.003))
    candidates = [
        make_candidate(
            cut, "device" if cut == count else "split" if cut else "upload",
            payload_bytes=float(sizes[min(cut, count - 1)]),
            head_s=float(device_s[:cut].sum()), tail_s=float(edge_s[cut:].sum()), encode_s=0.0, decode_s=0.0,
        )
        for cut in range(count + 1)
    ]  # fmt: skip
    work = work_of(candidates)
    send, reply = (next(s for s in stages(work) if s.name == name) for name in ("send", "reply"))
    reply_s = float(cost(reply, conditions).busy_s[0])
    send_s = cost(send, conditions).busy_s
    values = tuple(DagValue(f"v{k}", float(send_s[k]), None if k == 0 else k - 1, (k,)) for k in range(count))
    dag = Dag(tuple(map(float, device_s)), tuple(map(float, edge_s)), values, 2 * 0.003 + reply_s)
    fastest = search(candidates, conditions, Goal())
    assert fastest.rows[0].latency_s == pytest.approx(light_load(dag).latency_s)
    busiest = search(candidates, conditions, Goal(minimise="throughput"))
    period_s = heavy_load(dag).division.period_s
    assert 1 / busiest.rows[0].throughput_hz == pytest.approx(period_s, rel=1e-6)


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(PlanError, match='"v" must be read by layers 2 to 1, got'):
        light_load(Dag((1.0, 1.0), (1.0, 1.0), (DagValue("v", 1.0, 1, (0,)),)))
    with pytest.raises(PlanError, match=r"pinned to device or edge, got \['nowhere'\]"):
        light_load(Dag((1.0,), (1.0,), ()), pinned={0: "nowhere"})
    with pytest.raises(PlanError, match="numbers of 0 or more"):
        light_load(Dag((-1.0,), (1.0,), ()))
    with pytest.raises(PlanError, match='what "v" takes to send must be 0 s or more, got nan'):
        light_load(Dag((1.0,), (1.0,), (DagValue("v", math.nan, None, (0,)),)))
    with pytest.raises(PlanError, match="need as many times on the edge, got 2"):
        heavy_load(Dag((1.0,), (1.0, 1.0), ()))
    with pytest.raises(PlanError, match="layers 0 to 0, pinned are"):
        light_load(Dag((1.0,), (1.0,), ()), pinned={3: "edge"})
    with pytest.raises(PlanError, match="made on the edge and read on the device"):
        divide(Dag((1.0, 1.0), (1.0, 1.0), (DagValue("v", 1.0, 0, (1,)),)), frozenset({1}))
