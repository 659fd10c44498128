"""Cuts of a graph with branches that no prefix of its layers gives, where a minimum cut finds them best.

    dag_of(graph, ...)        the graph as layers and values with costs (`search.dag`)
    other_cuts(graph)         the best divisions over a grid of devices and links that are none of `graph.cuts()`

A prefix computes everything up to some point on the device; a graph with branches has more divisions: one branch here,
another there.  Which of them is best depends on two ratios alone: how much faster the edge is, and what a value costs
to send beside what the network costs to compute.  So they are looked for without having measured anything.
"""

from __future__ import annotations

import math
from itertools import product

import numpy as np
from torch import fx

from ..errors import CutError
from ..model.cut import Cut
from ..model.graph import Graph, output_nodes
from ..search.dag import Dag, DagValue, heavy_load, light_load

# How many times faster the edge is; what sending all values of the input takes, in times of the whole network's.
EDGE_FACTORS = (4.0, 20.0, 100.0)
SEND_FACTORS = tuple(float(f"{factor:.3g}") for factor in np.geomspace(0.01, 10, 7))
# What a layer without multiply-accumulates takes, for each value, beside one with one.
_WRITE = 2.0
MOST = 12


def dag_of(graph: Graph, *, device_s: float, edge_s: float, value_s: float, remote_s: float = 0.0) -> Dag:
    """The graph as a Dag: layers are its compute nodes in order, and last a layer of no cost that takes the outputs.

    Args:
        graph: a captured network.
        device_s, edge_s: what the whole network takes on either machine; layers share it by their
            multiply-accumulates, and by the values that they write.
        value_s: what sending one value takes.
        remote_s: what anything on the edge costs beside that.
    """
    roles, facts = graph.roles, graph.facts
    place = {node: k for k, node in enumerate(roles.compute)}
    shares = np.array([graph.macs.get(n.name, 0) + _WRITE * _size(graph, n) for n in roles.compute], np.float64)
    shares /= shares.sum()
    end = len(place)
    readers: dict[fx.Node, set[int]] = {}
    for node in roles.compute:
        for source in node.all_input_nodes:
            readers.setdefault(roles.same.get(source, source), set()).add(place[node])
    for node in output_nodes(graph.module.graph):
        readers.setdefault(roles.same.get(node, node), set()).add(end)
    values = tuple(
        DagValue(
            name=node.name,
            send_s=value_s * _size(graph, node) if facts[node.name].has_batch else math.inf,
            producer=place.get(node),
            readers=tuple(sorted(found)),
        )
        for node, found in readers.items()
        if node in place or node.op == "placeholder"
    )
    device, edge = (tuple(float(share) for share in (*(whole_s * shares), 0.0)) for whole_s in (device_s, edge_s))
    return Dag(device, edge, values, remote_s)


def _size(graph: Graph, node: fx.Node) -> int:
    shape = graph.facts[node.name].shape
    return 0 if shape is None else int(np.prod(shape))


def other_cuts(graph: Graph, *, most: int = MOST) -> tuple[Cut, ...]:
    """Cuts that no prefix gives and that are best somewhere, those that are so most often first; `most` at most.

    Best for a lone request (the least sum) or for a stream (the least maximum).
    """
    names = [node.name for node in graph.roles.compute]
    inputs = sum(int(np.prod(spec.shape)) for spec in graph.inputs)
    known = {cut.specs for cut in graph.cuts()}
    found: dict[Cut, int] = {}
    for edge, send in product(EDGE_FACTORS, SEND_FACTORS):
        dag = dag_of(graph, device_s=1.0, edge_s=1.0 / edge, value_s=send / inputs)
        for division in {light_load(dag), heavy_load(dag, limit_s=1.0).division}:
            try:
                cut = graph.cut_of([names[k] for k in division.on_device if k < len(names)])
            except CutError:
                # All on one side, or a value that cannot cross.
                continue
            if cut.specs not in known:
                found[cut] = found.get(cut, 0) + 1
    return tuple(sorted(found, key=lambda cut: (-found[cut], cut.name))[:most])
