"""Where to divide a network that is a graph, not a chain: which layers run on the device, which values cross.

    light_load(dag)    least sum: device + link + edge, exactly, by a minimum cut
    heavy_load(dag)    least maximum of the three, by a mixed-integer program, with a bound

Light and heavy load are those of DADS (Hu et al., INFOCOM 2019): a lone request waits for the sum, a stream for the
busiest resource.  Every value is paid once however many layers read it on the other side, and nothing comes back: what
follows a layer of the edge runs on the edge.

The minimum cut: source = device, sink = edge.  A layer on the edge costs its arc from the source, one on the device its
arc to the sink; a value has a node of its own, so that one arc of its bytes serves all of its readers; arcs without a
limit from a reader to what it reads forbid the way back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import Infeasible, PlanError

Side = Literal["device", "edge"]
_DEVICE, _EDGE = "device", "edge"
# Capacities are whole numbers, of which all together make so many: the cut is read from flows that equal capacities,
# which those of floats do not.
_WHOLE = 2**60


class DagValue(NamedTuple):
    """One value: what it costs to send, the layer that makes it (None: an input, on the device), its readers.

    A value that cannot be sent costs `math.inf`.
    """

    name: str
    send_s: float
    producer: int | None
    readers: tuple[int, ...]


class Dag(NamedTuple):
    """Layers in an order in which they can run, and the values between them.

    `device_s` and `edge_s` are the layers' times on either machine; `remote_s` is what anything on the edge costs
    beside that: delays, the exchange, the reply.
    """

    device_s: tuple[float, ...]
    edge_s: tuple[float, ...]
    values: tuple[DagValue, ...]
    remote_s: float = 0.0


class Division(NamedTuple):
    """Which layers run on the device, the names of what crosses, and the time of each resource."""

    on_device: frozenset[int]
    crossing: tuple[str, ...]
    device_s: float
    link_s: float
    edge_s: float
    remote_s: float

    @property
    def latency_s(self) -> float:
        """Of a lone request."""
        return self.device_s + self.link_s + self.edge_s + self.remote_s

    @property
    def period_s(self) -> float:
        """Between the requests of a stream."""
        return max(self.device_s, self.link_s, self.edge_s)


class Bounded(NamedTuple):
    """A division, and a period below which none can be."""

    division: Division
    bound_s: float


def divide(dag: Dag, on_device: frozenset[int]) -> Division:
    """What it costs to run just these layers on the device.

    Raises:
        PlanError: a layer of the device reads what the edge makes, there is no such layer, or a value that cannot cross
            would have to.
    """
    check_dag(dag)
    count = len(dag.device_s)
    if not on_device <= set(range(count)):
        raise PlanError(f"the graph has layers 0 to {count - 1}, got {sorted(on_device - set(range(count)))}")
    crossing = []
    for value in dag.values:
        is_here = value.producer is None or value.producer in on_device
        if not is_here and any(reader in on_device for reader in value.readers):
            raise PlanError(f'"{value.name}" is made on the edge and read on the device: nothing comes back')
        if is_here and any(reader not in on_device for reader in value.readers):
            crossing.append(value)
            if value.send_s == math.inf:
                raise PlanError(f'"{value.name}" cannot cross, and layers of the edge read it')
    rest = set(range(count)) - on_device
    return Division(
        on_device=on_device,
        crossing=tuple(value.name for value in crossing),
        device_s=sum(dag.device_s[k] for k in on_device),
        link_s=sum(value.send_s for value in crossing),
        edge_s=sum(dag.edge_s[k] for k in rest),
        remote_s=dag.remote_s if rest else 0.0,
    )


def light_load(dag: Dag, *, pinned: Mapping[int, Side] | None = None) -> Division:
    """The division of least latency.

    Args:
        dag: the graph.
        pinned: layers that must run on one side.

    Raises:
        PlanError: the graph is none: a cycle, a time below 0, a reader that is no layer.
        Infeasible: the pins contradict each other: a layer of the edge before one of the device, or a value that cannot
            cross between them.
    """
    import networkx as nx

    pinned = dict(pinned or {})
    _check_pins(dag, pinned)
    sends_s = (value.send_s for value in dag.values if value.send_s < math.inf)
    unit = _WHOLE / (sum(dag.device_s) + sum(dag.edge_s) + sum(sends_s) or 1.0)

    def limit(seconds: float) -> dict[str, int]:
        # What must not be cut is an arc without a capacity.
        return {"capacity": round(seconds * unit)} if seconds < math.inf else {}

    graph = nx.DiGraph()
    graph.add_nodes_from((_DEVICE, _EDGE))
    for k, (device_s, edge_s) in enumerate(zip(dag.device_s, dag.edge_s, strict=True)):
        side = pinned.get(k)
        graph.add_edge(_DEVICE, k, **limit(math.inf if side == "device" else edge_s))
        graph.add_edge(k, _EDGE, **limit(math.inf if side == "edge" else device_s))
    for place, value in enumerate(dag.values):
        if not value.readers:
            continue
        made, sent = value.producer, ("value", place)
        graph.add_edge(_DEVICE if made is None else made, sent, **limit(value.send_s))
        for reader in value.readers:
            graph.add_edge(sent, reader)
            if made is not None:
                graph.add_edge(reader, made)
    try:
        _, (here, _) = nx.minimum_cut(graph, _DEVICE, _EDGE, flow_func=nx.algorithms.flow.preflow_push)
    except nx.NetworkXUnbounded:
        raise Infeasible(f"layers pinned to the edge need what cannot cross: {_forced(dag, pinned)}") from None
    best = divide(dag, frozenset(k for k in here if isinstance(k, int)))
    # What anything on the edge costs at all is no arc: with it, all on the device may be better.
    if dag.remote_s and "edge" not in pinned.values():
        alone = divide(dag, frozenset(range(len(dag.device_s))))
        best = min(alone, best, key=lambda division: division.latency_s)
    return best


def heavy_load(dag: Dag, *, pinned: Mapping[int, Side] | None = None, limit_s: float = 10.0) -> Bounded:
    """The division of least period, or the best one found in `limit_s`, with the bound that was proved.

    Args, Raises: as `light_load`.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_array

    pinned = dict(pinned or {})
    candidates = [light_load(dag, pinned=pinned)]
    count, values = len(dag.device_s), [value for value in dag.values if value.readers]
    # x_k: layer k is on the device; y_v: value v crosses; then the period.
    size = count + len(values) + 1
    rows = 3 + sum(len(value.readers) * (1 if value.producer is None else 2) for value in values)
    matrix, upper = lil_array((rows, size)), np.zeros(rows)
    for k in range(count):
        matrix[0, k] = dag.device_s[k]
        matrix[2, k] = -dag.edge_s[k]
    for place, value in enumerate(values):
        matrix[1, count + place] = 0.0 if value.send_s == math.inf else value.send_s
    for row in range(3):
        matrix[row, size - 1] = -1.0
    upper[2] = -sum(dag.edge_s)
    row = 3
    for place, value in enumerate(values):
        for reader in value.readers:
            # It crosses where its maker is on the device and a reader is not.
            matrix[row, count + place], matrix[row, reader] = -1.0, -1.0
            if value.producer is None:
                upper[row] = -1.0
            else:
                matrix[row, value.producer] = 1.0
                # A reader on the device has its maker there.
                matrix[row + 1, reader], matrix[row + 1, value.producer] = 1.0, -1.0
                row += 1
            row += 1
    low, high = np.zeros(size), np.ones(size)
    high[-1] = np.inf
    for place, value in enumerate(values):
        high[count + place] = float(value.send_s < math.inf)
    for k, side in pinned.items():
        low[k] = high[k] = float(side == "device")
    is_whole: NDArray[np.int64] = np.ones(size, np.int64)
    is_whole[-1] = 0
    aim = np.zeros(size)
    aim[-1] = 1.0
    scale = max(sum(dag.device_s), sum(dag.edge_s), 1e-12)
    matrix[:3, : size - 1] /= scale
    upper[2] /= scale
    found = milp(
        aim,
        integrality=is_whole,
        bounds=Bounds(low, high),
        constraints=LinearConstraint(matrix.tocsr(), -np.inf, upper),
        options={"time_limit": limit_s},
    )
    if found.x is not None:
        candidates.append(divide(dag, frozenset(int(k) for k in np.flatnonzero(found.x[:count] > 0.5))))
    best = min(candidates, key=lambda division: division.period_s)
    bound = found.mip_dual_bound if found.mip_dual_bound is not None else 0.0
    return Bounded(best, min(best.period_s, max(0.0, float(bound) * scale)))


def _forced(dag: Dag, pinned: Mapping[int, Side]) -> str:
    """The names of values that cannot cross and have to, by the pins."""
    there = set(_behind(dag, pinned))
    here = {k for k, side in pinned.items() if side == "device"}
    for value in reversed(_in_order(dag)):
        if value.producer is not None and here & set(value.readers):
            here.add(value.producer)
    stuck = [value for value in dag.values if value.send_s == math.inf and value.readers]
    forced = [v for v in stuck if (v.producer is None or v.producer in here) and there & set(v.readers)]
    return ", ".join(f'"{value.name}"' for value in forced or stuck)


def _behind(dag: Dag, pinned: Mapping[int, Side]) -> dict[int, int]:
    """The layers that run on the edge because of the pins, each with one that is pinned there."""
    behind: dict[int, int] = {k: k for k, side in pinned.items() if side == "edge"}
    for value in _in_order(dag):
        if value.producer in behind:
            for reader in value.readers:
                behind.setdefault(reader, behind[value.producer])
    return behind


def _in_order(dag: Dag) -> list[DagValue]:
    """The values, inputs first, then in the order in which they are made."""
    return sorted(dag.values, key=lambda value: -1 if value.producer is None else value.producer)


def check_dag(dag: Dag) -> None:
    """Refuse what is no graph of layers.

    Raises:
        PlanError: as many device times as edge times are needed, none below 0; a value is read by layers behind the
            one that makes it.
    """
    count = len(dag.device_s)
    if len(dag.edge_s) != count:
        raise PlanError(f"{count} layers need as many times on the edge, got {len(dag.edge_s)}")
    times: Sequence[float] = (*dag.device_s, *dag.edge_s, dag.remote_s)
    if not all(0 <= time < math.inf for time in times):
        raise PlanError("times of layers must be numbers of 0 or more")
    for value in dag.values:
        if not value.send_s >= 0:
            raise PlanError(f'what "{value.name}" takes to send must be 0 s or more, got {value.send_s}')
        made = -1 if value.producer is None else value.producer
        if not all(made < reader < count for reader in value.readers) or made >= count:
            order = f"layers {made + 1} to {count - 1}" if value.producer is not None else f"layers 0 to {count - 1}"
            raise PlanError(f'"{value.name}" must be read by {order}, got {list(value.readers)}')


def _check_pins(dag: Dag, pinned: Mapping[int, Side]) -> None:
    check_dag(dag)
    odd = [side for side in pinned.values() if side not in (_DEVICE, _EDGE)]
    if odd:
        raise PlanError(f"a layer is pinned to device or edge, got {odd}")
    unknown = [k for k in pinned if not 0 <= k < len(dag.device_s)]
    if unknown:
        raise PlanError(f"the graph has layers 0 to {len(dag.device_s) - 1}, pinned are {unknown}")
    behind = _behind(dag, pinned)
    for k, side in pinned.items():
        if side == "device" and k in behind:
            raise Infeasible(
                f"layer {k} is pinned to the device and needs layer {behind[k]}, which is pinned to the edge: "
                "nothing comes back; pin both to one side"
            )
