"""Divisions that no prefix gives: valid splits, bit for bit, and as good as any that a small graph allows."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn

from coinfer.build.divisions import dag_of, other_cuts
from coinfer.engine.onnx import Session
from coinfer.errors import CutError, PlanError
from coinfer.model.cut import split
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import Graph, capture
from coinfer.model.zoo import build_model
from coinfer.search.dag import Dag, divide, heavy_load, light_load


class Fork(nn.Module):
    """Two branches from the input: one narrows what it gets at once, one is dear and wide."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.cheap = nn.Conv2d(4, 1, 1)
        self.dear = nn.Conv2d(4, 16, 5, padding=2)
        self.last = nn.Linear(17, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.stem(x))
        a, b = self.cheap(y).mean((2, 3)), self.dear(y).mean((2, 3))
        return self.last(torch.cat([a, b], 1))


@pytest.fixture(scope="module")
def fork() -> Graph:
    torch.manual_seed(0)
    return capture(Fork().eval(), torch.zeros(2, 3, 8, 8))


def closed_sets(graph: Graph) -> list[frozenset[int]]:
    dag = dag_of(graph, device_s=1.0, edge_s=0.1, value_s=1e-3)
    found = []
    layers = range(len(dag.device_s) - 1)
    for size in range(len(layers) + 1):
        for chosen in combinations(layers, size):
            try:
                divide(dag, frozenset(chosen))
                found.append(frozenset(chosen))
            except PlanError:
                continue
    return found


def test_every_division_that_the_graph_allows_is_a_cut_and_splits_bit_for_bit(fork: Graph) -> None:
    names = [node.name for node in fork.roles.compute]
    x = torch.randn(3, 3, 8, 8)
    want = fork.module(x)
    cuts = set()
    for chosen in closed_sets(fork):
        try:
            cut = fork.cut_of([names[k] for k in chosen])
        except CutError as error:
            assert "something to compute on either side" in str(error)
            continue
        graph = fork.with_cuts([cut])
        head, tail = split(graph, cut)
        assert torch.equal(tail(*head(x)), want)
        cuts.add(cut)
    assert {cut for cut in cuts if " + " not in cut.name} <= set(fork.cuts())
    assert any(" + " in cut.name for cut in cuts)


def test_a_graph_with_more_cuts_exports_and_cuts_there(fork: Graph, tmp_path) -> None:
    names = [node.name for node in fork.roles.compute]
    every = {cut for cut in (_cut_or_none(fork, names, chosen) for chosen in closed_sets(fork)) if cut is not None}
    graph = fork.with_cuts(sorted(every, key=lambda cut: cut.name))
    whole = export_onnx(graph, tmp_path / "fork.onnx")
    x = torch.randn(2, 3, 8, 8).numpy()
    (want,) = Session(whole.path).run([x])
    more = [cut for cut in whole.cuts if " + " in cut.name]
    assert more
    for cut in more:
        head, tail = tmp_path / "head.onnx", tmp_path / "tail.onnx"
        cut_onnx(whole, cut.name, head=head, tail=tail)
        (got,) = Session(tail).run(Session(head).run([x]))
        assert abs(got - want).max() < 1e-5


def _cut_or_none(graph: Graph, names: list[str], chosen: frozenset[int]):
    try:
        return graph.cut_of([names[k] for k in chosen])
    except CutError:
        return None


@pytest.mark.parametrize("edge_s", [0.02, 0.3])
@pytest.mark.parametrize("value_s", [1e-5, 3e-4, 3e-3])
def test_the_solvers_are_as_good_as_any_division(fork: Graph, edge_s: float, value_s: float) -> None:
    dag = dag_of(fork, device_s=1.0, edge_s=edge_s, value_s=value_s)
    end = len(dag.device_s) - 1
    every = [divide(dag, chosen) for chosen in closed_sets(fork)]
    every.append(divide(dag, frozenset(range(end + 1))))
    assert light_load(dag).latency_s == pytest.approx(min(d.latency_s for d in every))
    assert heavy_load(dag).division.period_s == pytest.approx(min(d.period_s for d in every))


def all_closed_sets(dag: Dag) -> list[frozenset[int]]:
    """Every set of layers that needs nothing from outside it, grown layer by layer."""
    needs: dict[int, set[int]] = {k: set() for k in range(len(dag.device_s))}
    for value in dag.values:
        for reader in value.readers:
            needs[reader] |= set() if value.producer is None else {value.producer}
    found, last = {frozenset[int]()}, {frozenset[int]()}
    while last:
        last = {
            chosen | {k} for chosen in last for k, sources in needs.items() if k not in chosen and sources <= chosen
        } - found
        found |= last
    return list(found)


def test_the_solvers_are_as_good_as_any_division_of_googlenet() -> None:
    graph = capture(build_model("googlenet").module, torch.zeros(2, 3, 32, 32))
    for edge_s, value_s in ((0.05, 1e-6), (0.2, 2e-6), (0.3, 1e-7)):
        dag = dag_of(graph, device_s=1.0, edge_s=edge_s, value_s=value_s, remote_s=0.01)
        device_s, all_edge_s = np.array(dag.device_s), np.array(dag.edge_s)
        best_s = period_s = np.inf
        for chosen in all_closed_sets(dag):
            here = np.zeros(len(device_s), bool)
            here[list(chosen)] = True
            link_s = sum(
                value.send_s for value in dag.values
                if (value.producer is None or here[value.producer]) and not here[list(value.readers)].all()
            )  # fmt: skip
            own_s, rest_s = float(device_s[here].sum()), float(all_edge_s[~here].sum())
            best_s = min(best_s, own_s + link_s + rest_s + (0.0 if here.all() else dag.remote_s))
            period_s = min(period_s, max(own_s, link_s, rest_s))
        assert light_load(dag).latency_s == pytest.approx(best_s)
        assert heavy_load(dag).division.period_s == pytest.approx(period_s, rel=1e-3)


def test_a_chain_has_no_other_cuts_and_branches_have() -> None:
    chain = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval(), torch.zeros(2, 3, 8, 8))
    assert other_cuts(chain) == ()
    net = capture(build_model("googlenet").module, torch.zeros(2, 3, 32, 32))
    found = other_cuts(net)
    known = {cut.specs for cut in net.cuts()}
    assert all(" + " in cut.name and cut.specs not in known for cut in found)
    x = torch.randn(2, 3, 32, 32)
    graph = net.with_cuts(found)
    for cut in found[:3]:
        head, tail = split(graph, cut)
        assert torch.equal(tail(*head(x)), net.module(x))


def test_divisions_that_cannot_be_are_refused(fork: Graph) -> None:
    names = [node.name for node in fork.roles.compute]
    with pytest.raises(CutError, match="nothing comes back"):
        fork.cut_of(names[1:2])
    with pytest.raises(CutError, match="on either side"):
        fork.cut_of([])
    with pytest.raises(CutError, match="on either side"):
        fork.cut_of(names)
    with pytest.raises(CutError, match='"nobody" is no compute node'):
        fork.cut_of(["nobody"])


class Elsewhere(nn.Module):
    """A value whose batch does not lead, between two that can cross."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        turned = x.flatten(1).transpose(0, 1) * 2.0
        return (turned * 3.0).transpose(0, 1).relu()


def test_a_value_that_cannot_cross_is_named() -> None:
    graph = capture(Elsewhere().eval(), torch.zeros(2, 3, 4, 4))
    names = [node.name for node in graph.roles.compute]
    bad = next(name for name in names if not graph.facts[name].has_batch)
    with pytest.raises(CutError, match=f'"{bad}" would have to cross and cannot'):
        graph.cut_of(names[: names.index(bad) + 1])
