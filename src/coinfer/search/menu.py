"""Which plans a bundle carries, and where each kind of plan wins.

A menu is the union of the winners over a grid of conditions (rate x device slowdown x edge load), and
of the best plan of each way at a few of them, so that every bundle can always fall back to device-only
and always has its honest rivals beside it. The regime map is the same grid at one load, kept cell by cell.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np

from ..errors import PlanError
from ..plan import Candidate, Kind, Value
from ..profile import Conditions, Link, Slowdown
from .estimate import Table, as_table
from .goal import Goal
from .solve import best_first, best_of_kinds, best_of_ways, price_table, search

RATES_BPS: tuple[float, ...] = tuple(float(f"{rate:.3g}") for rate in np.geomspace(1e4, 1e9, 21))
SLOWDOWNS: tuple[float, ...] = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300)
LOADS: tuple[float, ...] = (1, 2, 4, 8)
# Where the best of every way is kept, winner or not.
RIVAL_RATES_BPS: tuple[float, ...] = (1e5, 1e6, 1e7, 1e8)
RIVAL_SLOWDOWNS: tuple[float, ...] = (1, 10, 100)
# What a grid does not vary: the delay, the exchange, the powers.
BASE = Conditions(link=Link(rate_bps=1e6, delay_s=0.005))


def menu(
    candidates: Sequence[Candidate] | Table,
    goal: Goal,
    *,
    int8_ratio: float = 2.0,
    base: Conditions = BASE,
    rates_bps: Sequence[float] = RATES_BPS,
    slowdowns: Sequence[float] = SLOWDOWNS,
    loads: Sequence[float] = LOADS,
    also: Sequence[Conditions] = (),
) -> tuple[int, ...]:
    """Indexes of the candidates that a bundle needs, sorted.

    The winners over the grid, the best of each way at a few rates and slowdowns, and the best of each
    kind under each of `also` (the conditions that a job names). `int8_ratio` is the int8 slowdown over
    the fp32 slowdown; delay, exchange and powers are those of `base`. Grid points where nothing is
    feasible add nothing.

    Raises:
        Infeasible: nothing is feasible anywhere; the message is that of the first condition.
        PlanError: no candidates, or an empty grid.
    """
    table = as_table(candidates)
    grid = [
        at(base, rate_bps, slowdown, load, int8_ratio=int8_ratio)
        for rate_bps, slowdown, load in product(rates_bps, slowdowns, loads)
    ]
    if not grid:
        raise PlanError("a menu needs at least one rate, slowdown and load, got an empty grid")
    rivals = [
        at(base, rate_bps, slowdown, 1.0, int8_ratio=int8_ratio)
        for rate_bps, slowdown in product(RIVAL_RATES_BPS, RIVAL_SLOWDOWNS)
    ]
    chosen: set[int] = set()
    for conditions in grid:
        priced = price_table(table, conditions, goal)
        best = best_of_ways(table, priced).values()
        chosen.update(best_first(table, priced, best)[:1])
    for conditions in (*rivals, *also):
        chosen.update(best_of_ways(table, price_table(table, conditions, goal)).values())
    if not chosen:
        search(table, grid[0], goal)
    return tuple(sorted(chosen))


def at(base: Conditions, rate_bps: float, slowdown: float, edge_load: float, *, int8_ratio: float) -> Conditions:
    """The conditions of one grid point: `base` with another rate, slowdown and load."""
    return msgspec.structs.replace(
        base,
        link=msgspec.structs.replace(base.link, rate_bps=rate_bps, trace=None),
        device=Slowdown(fp32=slowdown, int8=slowdown * int8_ratio),
        edge_load=edge_load,
    )


class Cell(Value, frozen=True, kw_only=True):
    """One point of a regime map.

    `best` maps each way that is feasible here to the index of its best candidate, and `latencies_s` and
    `objectives` to that candidate's latency and objective (the goal's, least is best). `kind` and
    `index` are the winner's, None where nothing is feasible. `ratio` is the objective of the best plan
    of another kind over the winner's (at least 1): None where there is no other kind, or the
    winner's objective is 0.
    """

    rate_bps: float
    slowdown: float
    kind: Kind | None
    index: int | None
    ratio: float | None
    best: dict[Kind, int]
    latencies_s: dict[Kind, float]
    objectives: dict[Kind, float]

    @property
    def latency_s(self) -> float | None:
        """The winner's latency."""
        return None if self.kind is None else self.latencies_s[self.kind]

    @property
    def runner_up(self) -> Kind | None:
        """The best kind after the winner's."""
        others = [kind for kind in self.objectives if kind != self.kind]
        return min(others, key=lambda kind: self.objectives[kind], default=None)


class RegimeMap(Value, frozen=True, kw_only=True):
    """Which kind of plan wins over link rate and device slowdown: `cells[slowdown][rate]`."""

    goal: Goal
    rates_bps: tuple[float, ...]
    slowdowns: tuple[float, ...]
    int8_ratio: float
    delay_s: float
    edge_load: float
    cells: tuple[tuple[Cell, ...], ...]


def regime_map(
    candidates: Sequence[Candidate] | Table,
    rates_bps: Sequence[float],
    slowdowns: Sequence[float],
    goal: Goal,
    *,
    int8_ratio: float = 2.0,
    base: Conditions = BASE,
) -> RegimeMap:
    """The winner and the best of each way at every rate and slowdown, at the edge load of `base`.

    Raises:
        PlanError: no candidates, or an empty grid.
    """
    table = as_table(candidates)
    if not rates_bps or not slowdowns:
        raise PlanError("a regime map needs at least one rate and one slowdown, got an empty grid")
    return RegimeMap(
        goal=goal,
        rates_bps=tuple(rates_bps),
        slowdowns=tuple(slowdowns),
        int8_ratio=int8_ratio,
        delay_s=base.link.delay_s,
        edge_load=base.edge_load,
        cells=tuple(
            tuple(_cell(table, base, rate_bps, slowdown, goal, int8_ratio) for rate_bps in rates_bps)
            for slowdown in slowdowns
        ),
    )


def _cell(table: Table, base: Conditions, rate_bps: float, slowdown: float, goal: Goal, int8_ratio: float) -> Cell:
    priced = price_table(table, at(base, rate_bps, slowdown, base.edge_load, int8_ratio=int8_ratio), goal)
    best = best_of_kinds(table, priced)
    objectives = {kind: float(priced.objective[index]) for kind, index in best.items()}
    order = best_first(table, priced, best.values())
    kind = next((kind for kind in best if order and best[kind] == order[0]), None)
    ratio = None
    if len(order) > 1 and priced.objective[order[0]] > 0:
        ratio = float(priced.objective[order[1]] / priced.objective[order[0]])
    return Cell(
        rate_bps=rate_bps,
        slowdown=slowdown,
        kind=kind,
        index=order[0] if order else None,
        ratio=ratio,
        best=best,
        latencies_s={kind: float(priced.latency_s[index]) for kind, index in best.items()},
        objectives=objectives,
    )
