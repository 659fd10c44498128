"""What is measured: the conditions of a cell, how much effort, and what is chosen and estimated for a cell."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from ..engine.measure import allowed_cores
from ..plan import Candidate, Value
from ..profile import Conditions, Link, Slowdown
from ..search.estimate import estimate
from ..search.goal import Goal
from ..search.solve import baselines
from ..stages import price, work_of
from .choose import CHOSEN, Picks
from .record import CellLine, EstimateLine, MenuPlan
from .slow import label


class Cell(Value, frozen=True, kw_only=True):
    """Conditions to measure under: the link, the emulated device, the edge's load."""

    link: Link
    slowdown: Slowdown = Slowdown()
    load: float = 1.0


class Effort(Value, frozen=True, kw_only=True):
    """How much is measured.

    `requests` for each plan and cell, `slow_requests` below 100 kbit/s; `calibration` requests for each plan, fewer
    (at least 5) where a plan would take longer than `calibration_s`; `timings` requests of each plan without a limit
    of rate, spread between those of a cell, whose times its estimates are made of (0, or on a trace: those of the
    calibration); `stream` pictures through the chosen plan (0: no stream); `finalists`: measure the chosen plan and
    its best rival once more.
    """

    requests: int = 30
    slow_requests: int = 10
    warmup: int = 2
    calibration: int = 15
    calibration_s: float = 5.0
    timings: int = 10
    stream: int = 0
    finalists: bool = True
    seed: int = 0
    timeout_s: float = 120.0
    cores: tuple[int, int] | None = None

    def places(self) -> tuple[int | None, int | None]:
        """The cores of device and edge: those given, else the first two allowed; one machine core serves both."""
        allowed = self.cores or allowed_cores()
        return (allowed[0], allowed[1 % len(allowed)]) if allowed else (None, None)


def menu_plan(candidate: Candidate) -> MenuPlan:
    """What the log keeps of a plan: the loss that it was chosen by, the accuracy that is reported."""
    plan, evidence = candidate.plan, candidate.reported or candidate.evidence
    return MenuPlan(
        number=plan.number,
        kind=plan.kind,
        precision=plan.precision,
        label=plan.label,
        loss_points=candidate.evidence.loss_points,
        accuracy=evidence.accuracy,
        num_images=evidence.num_images,
        split=evidence.split,
        has_exits=bool(plan.exits),
    )


def cell_line(
    cell: Cell,
    name: str,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    goal: Goal,
    picks: Picks,
    latest: Sequence[Candidate],
    latest_exchange_s: float,
) -> CellLine:
    """Choices by `candidates` and `conditions`, made before; estimates by the `latest` times and exchange."""
    by_number = {candidate.plan.number: candidate for candidate in latest}
    best = baselines(candidates, conditions, goal)
    conditions = msgspec.structs.replace(conditions, exchange_s=latest_exchange_s)
    estimates = []
    for number, roles in picks.items():
        expected = estimate(by_number[number], conditions)
        busy_s = price(work_of([by_number[number]]), conditions).busy_s
        estimates.append(
            EstimateLine(
                plan=number,
                roles=roles,
                latency_s=expected.latency_s,
                stages_s=expected.stages_s,
                busy_s={resource: float(seconds[0]) for resource, seconds in busy_s.items()},
            )
        )
    return CellLine(
        cell=name,
        link=cell.link,
        slowdown=cell.slowdown,
        load=cell.load,
        device=label(cell.slowdown),
        exchange_s=conditions.exchange_s,
        chosen=next(number for number, roles in picks.items() if CHOSEN in roles),
        baselines={kind: candidates[index].plan.number for kind, index in best.items()},
        estimates=tuple(estimates),
    )
