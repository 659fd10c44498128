"""Divisions of graphs: equal to trying every one of them, on random graphs; what cannot be is refused."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.search.dag import Dag, DagValue, Division, divide, heavy_load, light_load


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


def test_what_is_no_graph_is_refused() -> None:
    with pytest.raises(PlanError, match='"v" must be read by layers 2 to 1, got'):
        light_load(Dag((1.0, 1.0), (1.0, 1.0), (DagValue("v", 1.0, 1, (0,)),)))
    with pytest.raises(PlanError, match="numbers of 0 or more"):
        light_load(Dag((-1.0,), (1.0,), ()))
    with pytest.raises(PlanError, match="need as many times on the edge, got 2"):
        heavy_load(Dag((1.0,), (1.0, 1.0), ()))
    with pytest.raises(PlanError, match="layers 0 to 0, pinned are"):
        light_load(Dag((1.0,), (1.0,), ()), pinned={3: "edge"})
    with pytest.raises(PlanError, match="made on the edge and read on the device"):
        divide(Dag((1.0, 1.0), (1.0, 1.0), (DagValue("v", 1.0, 0, (1,)),)), frozenset({1}))
