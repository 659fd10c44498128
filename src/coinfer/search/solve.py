"""The best plan under given conditions: exhaustive, vectorised, and with its reasons.

A candidate is feasible where it was measured to the end (not dropped) and meets every constraint of
the `Goal`. Of the feasible ones the least objective wins; ties go to fewer bytes on the wire, then
lower latency, then the lower plan number, so that equal input gives an equal answer everywhere.

    ranking = search(candidates, Conditions(link=Link(rate_bps=1e6)), Goal(max_loss_points=1.0))
    ranking.best, ranking.reason, ranking.rows[0].latency_s
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..errors import Infeasible, PlanError
from ..plan import Candidate, Kind, Value, Way
from ..profile import Conditions
from ..stages import price, row_of
from ..units import format_bytes, format_duration
from .estimate import Estimate, Table, as_table, estimate_row
from .goal import PIN, Constraint, Goal, Objective, nearest_miss, rate_miss

__all__ = [
    "KINDS",
    "WAYS",
    "ConstraintCost",
    "Goal",
    "Priced",
    "Ranking",
    "RankingRow",
    "baselines",
    "best_first",
    "best_of_kinds",
    "best_of_ways",
    "price_table",
    "search",
]

KINDS: tuple[Kind, ...] = ("device", "upload", "split")
WAYS: tuple[Way, ...] = (*KINDS, "unit")
Name = TypeVar("Name", bound=str)
# Where no plan holds a rate, the highest is looked for from one in two weeks on, and this near.
LEAST_HZ, RATE_TOLERANCE = 1e-6, 1e-4


class RankingRow(Value, frozen=True, kw_only=True):
    """One candidate's place: `index` into the candidates given; `rejected` None, or why in few words.

    `energy_j` is None where the conditions name no powers.
    """

    index: int
    latency_s: float
    throughput_hz: float
    energy_j: float | None
    wire_bytes: float
    loss_points: float | None
    rejected: str | None


class ConstraintCost(Value, frozen=True, kw_only=True):
    """What one constraint cost: the objective of the winner with it, and of the winner without it.

    Objectives are in the goal's own unit: s for latency, requests a second for throughput, bytes, J.
    """

    name: str
    limit: float
    objective: float
    objective_without: float
    index_without: int


@dataclass(frozen=True)
class Ranking:
    """The answer of a search: every candidate in order, the feasible ones first.

    `order` holds indexes into the candidates; the first `num_feasible` are feasible, best first.
    """

    table: Table
    conditions: Conditions
    goal: Goal
    priced: Priced
    order: NDArray[np.int64]
    num_feasible: int

    @property
    def best(self) -> int:
        """Index of the chosen candidate."""
        return int(self.order[0])

    @cached_property
    def rows(self) -> tuple[RankingRow, ...]:
        """One row per candidate, best first, rejected ones last with the reason."""
        return tuple(
            self._row(int(index), is_feasible=place < self.num_feasible) for place, index in enumerate(self.order)
        )

    def _row(self, index: int, *, is_feasible: bool) -> RankingRow:
        priced, energy_j = self.priced, float(self.priced.energy_j[index])
        return RankingRow(
            index=index,
            latency_s=float(priced.latency_s[index]),
            throughput_hz=float(priced.throughput_hz[index]),
            energy_j=None if math.isnan(energy_j) else energy_j,
            wire_bytes=float(self.table.wire_bytes[index]),
            loss_points=self.table.candidates[index].evidence.loss_points,
            rejected=None if is_feasible else self._rejected(index),
        )

    def _rejected(self, index: int) -> str:
        dropped = self.table.candidates[index].dropped
        if dropped is not None:
            return dropped
        broken = [c for c in self.priced.constraints if not c.is_met[index]]
        return ", ".join(c.broken_text(index) for c in broken)

    @cached_property
    def reason(self) -> str:
        """Why the first won against the best of each other way, and which stage dominates each."""
        best_of = _first_of_ways(self.table, self.order[: self.num_feasible])
        won = self.table.ways[self.best]
        sentences = [f"The best plan is {self._plan_text(self.best)}."]
        for way in WAYS:
            if way == won:
                continue
            name = "split with a unit" if way == "unit" else f"{way} plan"
            if way in best_of:
                sentences.append(f"The best {name} is {self._plan_text(best_of[way])}.")
            elif (self.table.ways == way).any():
                sentences.append(f"No {name} meets the constraints.")
        return " ".join(sentences)

    def _plan_text(self, index: int) -> str:
        plan = self.table.candidates[index].plan
        estimate = estimate_row(row_of(self.table.work, index), self.conditions)
        loss = self.table.loss_points[index]
        lost = f"loses {loss:.2f} points and " if self.goal.minimise == "accuracy" else ""
        return f"{plan.number} ({plan.label}), which {lost}{achievement(estimate, self.goal.minimise)}"

    @cached_property
    def constraint_costs(self) -> tuple[ConstraintCost, ...]:
        """For each constraint, the objective with it and without it."""
        return tuple(self._cost_of(constraint) for constraint in self.priced.constraints)

    def _cost_of(self, constraint: Constraint) -> ConstraintCost:
        others = [c for c in self.priced.constraints if c.name != constraint.name]
        allowed = np.flatnonzero(_feasible(self.table, others))
        without = int(_sorted(self.table, self.priced, allowed)[0])
        return ConstraintCost(
            name=constraint.name,
            limit=constraint.limit,
            objective=self.priced.in_unit(self.best),
            objective_without=self.priced.in_unit(without),
            index_without=without,
        )


@dataclass(frozen=True)
class Priced:
    """A table under given conditions: prices, the objective (least is best), the constraints."""

    minimise: Objective
    latency_s: NDArray[np.float64]
    throughput_hz: NDArray[np.float64]
    energy_j: NDArray[np.float64]
    objective: NDArray[np.float64]
    constraints: tuple[Constraint, ...]

    def in_unit(self, index: int) -> float:
        """The objective of one row in the goal's own unit (throughput: requests a second)."""
        chosen = self.throughput_hz if self.minimise == "throughput" else self.objective
        return float(chosen[index])


def search(candidates: Sequence[Candidate] | Table, conditions: Conditions, goal: Goal) -> Ranking:
    """Every candidate ranked under these conditions.

    Give a `Table` when the same candidates are searched again and again.

    Raises:
        Infeasible: no candidate meets the constraints; the message names the nearest miss.
        PlanError: no candidates, or the goal needs energies that the conditions do not give.
    """
    table = as_table(candidates)
    priced = price_table(table, conditions, goal)
    is_feasible = _feasible(table, priced.constraints)
    if not is_feasible.any():
        raise Infeasible(_why_none(table, priced, conditions, goal))
    feasible = _sorted(table, priced, np.flatnonzero(is_feasible))
    rejected = _sorted(table, priced, np.flatnonzero(~is_feasible))
    order = np.concatenate([feasible, rejected])
    return Ranking(table, conditions, goal, priced, order, len(feasible))


def _why_none(table: Table, priced: Priced, conditions: Conditions, goal: Goal) -> str:
    """What to relax: the rate, where all else could be kept at a lower one; else whatever is missed by least."""
    if conditions.arrivals is None:
        return nearest_miss(table, priced.constraints)
    arrivals = conditions.arrivals

    def priced_at(rate_hz: float) -> Priced:
        slower = msgspec.structs.replace(arrivals, rate_hz=rate_hz)
        return price_table(table, msgspec.structs.replace(conditions, arrivals=slower), goal)

    def best_at(rate_hz: float) -> int | None:
        at_rate = priced_at(rate_hz)
        rows = np.flatnonzero(_feasible(table, at_rate.constraints))
        return int(_sorted(table, at_rate, rows)[0]) if rows.size else None

    low_hz, high_hz = min(LEAST_HZ, arrivals.rate_hz), arrivals.rate_hz
    index = best_at(low_hz)
    if index is None:
        return nearest_miss(table, priced_at(low_hz).constraints)
    while high_hz / low_hz > 1 + RATE_TOLERANCE:
        middle_hz = math.sqrt(low_hz * high_hz)
        found = best_at(middle_hz)
        if found is None:
            high_hz = middle_hz
        else:
            low_hz, index = middle_hz, found
    return rate_miss(table, priced.constraints, arrivals.rate_hz, low_hz, index)


def baselines(candidates: Sequence[Candidate] | Table, conditions: Conditions, goal: Goal) -> dict[Way, int]:
    """Index of the best feasible candidate of each way; a way without one is left out.

    Raises:
        PlanError: as `search`.
    """
    table = as_table(candidates)
    return best_of_ways(table, price_table(table, conditions, goal))


def best_of_ways(table: Table, priced: Priced) -> dict[Way, int]:
    """Index of the best feasible row of each way, for a table already priced."""
    return _best_of(table, priced, table.ways, WAYS)


def best_of_kinds(table: Table, priced: Priced) -> dict[Kind, int]:
    """Index of the best feasible row of each way, for a table already priced."""
    return _best_of(table, priced, table.kinds, KINDS)


def _best_of(table: Table, priced: Priced, column: NDArray[np.str_], names: Iterable[Name]) -> dict[Name, int]:
    feasible = np.flatnonzero(_feasible(table, priced.constraints))
    found: dict[Name, int] = {}
    for name in names:
        rows = feasible[column[feasible] == name]
        if rows.size:
            # Only the ties need sorting.
            least = rows[priced.objective[rows] == priced.objective[rows].min()]
            found[name] = int(_sorted(table, priced, least)[0])
    return found


def best_first(table: Table, priced: Priced, rows: Iterable[int]) -> list[int]:
    """Those rows, best first, by the same rule as a ranking (feasible or not)."""
    return [int(row) for row in _sorted(table, priced, np.array(list(rows), dtype=np.int64))]


def price_table(table: Table, conditions: Conditions, goal: Goal) -> Priced:
    """The table's prices under these conditions, and the goal's constraints as columns.

    Raises:
        PlanError: the goal needs energies and the conditions name no powers.
    """
    total = price(table.work, conditions)
    needs_energy = goal.minimise == "energy" or goal.max_energy_j is not None
    if needs_energy and np.isnan(total.energy_j).any():
        raise PlanError("an energy goal needs the device's power and a radio, got conditions without them")
    with np.errstate(divide="ignore"):
        throughput_hz = 1.0 / total.period_s
    objective = {
        "latency": total.latency_s,
        "throughput": total.period_s,
        "bytes": table.wire_bytes,
        "energy": total.energy_j,
        "accuracy": table.loss_points,
    }[goal.minimise]
    # What arrives must be served.
    asked_hz = None if conditions.arrivals is None else conditions.arrivals.rate_hz
    least_hz = max((rate for rate in (goal.min_throughput_hz, asked_hz) if rate is not None), default=None)
    limits = (
        ("max_loss_points", goal.max_loss_points, table.loss_points),
        ("max_latency_s", goal.max_latency_s, total.latency_s),
        ("min_throughput_hz", least_hz, throughput_hz),
        ("max_energy_j", goal.max_energy_j, total.energy_j),
        ("max_bytes", goal.max_bytes, table.wire_bytes),
        ("max_device_bytes", goal.max_device_bytes, table.device_bytes),
        ("max_device_memory_bytes", goal.max_device_memory_bytes, table.device_memory_bytes),
    )
    constraints = tuple(
        Constraint(name, limit, values, is_floor=name.startswith("min_"))
        for name, limit, values in limits
        if limit is not None
    ) + tuple(
        Constraint(f"{PIN}{pin.name}", 0.0, np.array([float(not pin.is_kept(c.plan)) for c in table.candidates]))
        for pin in goal.pins
    )
    return Priced(goal.minimise, total.latency_s, throughput_hz, total.energy_j, objective, constraints)


def _feasible(table: Table, constraints: Sequence[Constraint]) -> NDArray[np.bool_]:
    is_feasible = ~table.is_dropped
    for constraint in constraints:
        is_feasible = is_feasible & constraint.is_met
    return is_feasible


def _sorted(table: Table, priced: Priced, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Those rows, best first: objective, then wire bytes, latency, plan number, place in the list."""
    keys = (table.numbers[rows], priced.latency_s[rows], table.wire_bytes[rows], priced.objective[rows])
    return rows[np.lexsort((rows, *keys))]


def _first_of_ways(table: Table, ordered: NDArray[np.int64]) -> dict[Way, int]:
    """The first of each way in an order that is best first."""
    found: dict[Way, int] = {}
    for way in WAYS:
        places = np.flatnonzero(table.ways[ordered] == way)
        if places.size:
            found[way] = int(ordered[places[0]])
    return found


def achievement(estimate: Estimate, minimise: Objective) -> str:
    """What a plan reaches of the objective, and what dominates it.

    `answers in 21.3 ms, 61 % of it send`, `sustains 40 a second, bound by the uplink`.
    """
    if minimise == "latency":
        stage = max(estimate.stages_s, key=lambda name: estimate.stages_s[name], default="")
        share = f", {estimate.stages_s[stage] / estimate.latency_s:.0%} of it {stage}" if stage else ""
        return f"answers in {format_duration(estimate.latency_s)}{share.replace('%', ' %')}"
    if minimise == "throughput":
        return f"sustains {estimate.throughput_hz:.3g} a second, bound by the {estimate.critical}"
    if minimise == "bytes":
        sent = f"{format_bytes(estimate.wire_bytes)} a request" if estimate.wire_bytes else "nothing"
        return f"sends {sent} and answers in {format_duration(estimate.latency_s)}"
    if minimise == "accuracy":
        return f"answers in {format_duration(estimate.latency_s)}"
    spent_j = float("nan") if estimate.energy_j is None else estimate.energy_j
    return f"spends {spent_j:.3g} J of the device and answers in {format_duration(estimate.latency_s)}"
