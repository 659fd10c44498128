"""Several streams of one device: a plan for each, chosen together, since they share its core, its link and the edge.

    load of a resource = sum over streams of rate x busy time        at most 1 (the edge: its workers)
    latency of a stream = its own, alone, + what it waits for the others at every resource

A wait is that of a queue of several classes with constant service each (Pollaczek and Khinchine, M/G/1):

    W = sum(rate x service^2) / (2 (1 - load))

Streams that come evenly still meet each other at any phase, so the same wait is counted for all but the stream's own
requests.  Streams take turns on the core: one of many requests waits longer than said and one of few less,
the waits weighted by load are as said (Kleinrock's conservation law).  The choice is exact: branch and bound over the
plans of each stream that no other of its plans beats in latency and in every busy time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import Infeasible, PlanError
from ..profile import Arrivals, Conditions
from ..stages import RESOURCES, price
from ..units import format_duration
from .estimate import Table
from .goal import Goal, nearest_miss
from .solve import price_table

Floats = NDArray[np.float64]


class StreamAsk(NamedTuple):
    """A stream: the candidates of its network, what it asks of its plan, and how its requests arrive."""

    table: Table
    goal: Goal
    arrivals: Arrivals


class StreamChoice(NamedTuple):
    """The plans of all streams: index of each one's candidate, its mean latency; the load of each resource, 0 to 1.

    `headroom` is the factor by which all arrival rates may grow before a resource is full.
    """

    indexes: tuple[int, ...]
    latency_s: tuple[float, ...]
    loads: dict[str, float]
    headroom: float

    @property
    def mean_latency_s(self) -> float:
        """Of the streams, each counted once."""
        return sum(self.latency_s) / len(self.latency_s)


class _Options(NamedTuple):
    """The plans of one stream that are worth trying: lone latency (N,), load and squares (N, resources), visits."""

    rows: NDArray[np.int64]
    latency_s: Floats
    load: Floats
    square: Floats
    visits: Floats


def choose_plans(streams: Sequence[StreamAsk], conditions: Conditions, *, minimise: str = "latency") -> StreamChoice:
    """The plans with the least mean latency ("latency") or the most headroom ("throughput"), each stream's limits kept.

    Args:
        streams: at least one; their arrivals are of one device each.
        conditions: of the device, the link and the edge; its own arrivals do not count.
        minimise: "latency" or "throughput".

    Raises:
        PlanError: no stream, or another goal.
        Infeasible: a stream's own limits cannot be met; or no plans can serve all of them together, which names the
            resource that is short and by how much, or the deadline that is missed.
    """
    if not streams or minimise not in ("latency", "throughput"):
        given = f'{len(streams)}, "{minimise}"'
        raise PlanError(f"streams need at least one and the goal latency or throughput, got {given}")
    alone = msgspec.structs.replace(conditions, arrivals=None)
    options = [_options(stream, alone) for stream in streams]
    searched = _Search(streams, options, alone.edge_workers, minimise)
    best = searched.run()
    if best is None and searched.nearest[1]:
        raise Infeasible(
            f"no plans keep the deadlines of all {len(streams)} streams, waits for each other included; at the nearest "
            f"{searched.nearest[1]}: relax it, or lower the arrival rates"
        )
    if best is None:
        least = np.sum([option.load.min(axis=0) for option in options], axis=0)
        worst = int(np.argmax(least))
        if least[worst] >= 1:
            busy = f"{100 * least[worst]:.0f} % of the time whatever plans are taken"
            short = f"the {RESOURCES[worst]} would be busy {busy}"
        else:
            short = "whatever spares one resource fills another"
        raise Infeasible(f"no plans serve all {len(streams)} streams together: {short}; lower the arrival rates")
    return best


def _options(stream: StreamAsk, conditions: Conditions) -> _Options:
    table, rate_hz = stream.table, stream.arrivals.rate_hz
    priced = price_table(table, conditions, stream.goal)
    is_feasible = ~table.is_dropped
    for constraint in priced.constraints:
        is_feasible = is_feasible & constraint.is_met
    rows = np.flatnonzero(is_feasible)
    if not rows.size:
        raise Infeasible(nearest_miss(table, priced.constraints))
    total = price(table.work, conditions)
    remote = np.asarray(table.work.remote_share, np.float64)[rows]
    servers = np.array([conditions.edge_workers if name == "edge" else 1.0 for name in RESOURCES])
    busy_s = np.column_stack([total.busy_s[name][rows] for name in RESOURCES])
    visits = np.column_stack([np.ones(len(rows)) if name == "device" else remote for name in RESOURCES])
    with np.errstate(divide="ignore", invalid="ignore"):
        service_s = np.where(visits > 0, busy_s / visits, 0.0)
    load = rate_hz * busy_s / servers
    square = rate_hz * visits * (service_s / servers) ** 2
    latency_s = priced.latency_s[rows]
    kept = _unbeaten(np.column_stack([latency_s, load, square, visits]))
    return _Options(rows[kept], latency_s[kept], load[kept], square[kept], visits[kept])


def _unbeaten(points: Floats) -> NDArray[np.int64]:
    """Rows that no other row equals or betters in every column, the first of equals."""
    kept: list[int] = []
    for place in np.lexsort(points.T[::-1]):
        if not (points[kept] <= points[place]).all(axis=1).any():
            kept.append(int(place))
    return np.array(kept, dtype=np.int64)


class _Search:
    """Branch and bound, stream by stream; the bound of what is left is each stream's best plan alone."""

    def __init__(
        self, streams: Sequence[StreamAsk], options: Sequence[_Options], workers: int, minimise: str
    ) -> None:
        self.streams, self.options, self.minimise = streams, options, minimise
        self.best: StreamChoice | None = None
        self.cost = math.inf
        # Of the choices that serve all, how little the worst stream missed its deadline by, and how.
        self.nearest = (math.inf, "")
        # What the streams from k on take at least: latency, and load of every resource.
        self.least_s = [sum(float(o.latency_s.min()) for o in options[k:]) for k in range(len(options) + 1)]
        none = np.zeros(len(RESOURCES))
        self.least_load = [sum((o.load.min(axis=0) for o in options[k:]), none) for k in range(len(options) + 1)]

    def run(self) -> StreamChoice | None:
        """The best choice; None where there is none."""
        self._extend((), 0.0, np.zeros(len(RESOURCES)))
        return self.best

    def _extend(self, chosen: tuple[int, ...], latency_s: float, load: Floats) -> None:
        k = len(chosen)
        if ((load + self.least_load[k]) >= 1).any():
            return
        bound = latency_s + self.least_s[k] if self.minimise == "latency" else float((load + self.least_load[k]).max())
        if bound >= self.cost:
            return
        if k == len(self.options):
            self._weigh(chosen, load)
            return
        option = self.options[k]
        order = option.latency_s if self.minimise == "latency" else (option.load + load).max(axis=1)
        for place in np.argsort(order, kind="stable"):
            self._extend((*chosen, int(place)), latency_s + float(option.latency_s[place]), load + option.load[place])

    def _weigh(self, chosen: tuple[int, ...], load: Floats) -> None:
        latencies = self._latencies(chosen, load)
        misses = [
            (latency_s / limit_s - 1, f"stream {k} takes {format_duration(latency_s)} > {format_duration(limit_s)}")
            for k, (stream, latency_s) in enumerate(zip(self.streams, latencies, strict=True))
            if (limit_s := stream.goal.max_latency_s) is not None and latency_s > limit_s
        ]
        if misses:
            self.nearest = min(self.nearest, max(misses))
            return
        cost = sum(latencies) if self.minimise == "latency" else float(load.max())
        if cost < self.cost:
            self.cost = cost
            self.best = StreamChoice(
                indexes=tuple(int(o.rows[place]) for o, place in zip(self.options, chosen, strict=True)),
                latency_s=latencies,
                loads={name: float(share) for name, share in zip(RESOURCES, load, strict=True)},
                headroom=float(1 / load.max()) if load.max() > 0 else math.inf,
            )

    def _latencies(self, chosen: tuple[int, ...], load: Floats) -> tuple[float, ...]:
        squares = np.array([o.square[place] for o, place in zip(self.options, chosen, strict=True)])
        found = []
        for k, (option, place) in enumerate(zip(self.options, chosen, strict=True)):
            others = squares.sum(axis=0)
            if not self.streams[k].arrivals.is_random:
                others = others - squares[k]
            waits = others / (2 * (1 - load))
            found.append(float(option.latency_s[place] + (option.visits[place] * waits).sum()))
        return tuple(found)
