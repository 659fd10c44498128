"""Prices of candidates under conditions: of one, stage by stage, or of a table of many.

A `Table` is read from its candidates once; pricing it again under other conditions is a few array
operations, so a search over 10,000 candidates takes about a millisecond.  All prices come from
`stages`; this module only arranges them.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import cast

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..plan import Candidate, Value
from ..profile import Conditions
from ..stages import RESOURCES, Resource, Work, cost, price, row_of, sharers, stages, work_of


class Table:
    """Many candidates as columns, in the order given.

    `loss_points`, `wire_bytes` (the mean request's uplink bytes, frames included; 0 for device plans), `numbers`,
    `device_bytes` (the device's files) and `device_memory_bytes` are arrays of one row per candidate; `kinds` holds
    "device", "upload" or "split", `ways` the same with "unit" for a split through a trained unit. What was not measured
    is NaN.
    """

    def __init__(self, candidates: Sequence[Candidate]) -> None:
        self.candidates = tuple(candidates)
        if not self.candidates:
            raise PlanError("a search needs at least one candidate, got none")
        self.work: Work = work_of(list(self.candidates))
        self.kinds = np.array([c.plan.kind for c in self.candidates])
        self.ways = np.array([c.plan.way for c in self.candidates])
        self.numbers = np.array([c.plan.number for c in self.candidates], dtype=np.int64)
        losses = (c.evidence.loss_points for c in self.candidates)
        self.loss_points = np.array([np.nan if x is None else x for x in losses], dtype=np.float64)
        sizes = (c.evidence.device_bytes for c in self.candidates)
        self.device_bytes = np.array([np.nan if x is None else x for x in sizes], dtype=np.float64)
        memory = (c.evidence.device_memory_bytes for c in self.candidates)
        self.device_memory_bytes = np.array([np.nan if x is None else x for x in memory], dtype=np.float64)
        self.is_dropped = np.array([c.dropped is not None for c in self.candidates])
        send = next(stage for stage in stages(self.work) if stage.name == "send")
        self.wire_bytes: NDArray[np.float64] = np.asarray(send.num_bytes * send.share, dtype=np.float64)

    def __len__(self) -> int:
        return len(self.candidates)

    def on_device(self, loads: NDArray[np.float64]) -> Table:
        """The same table where the device takes so many times as long for its side of each candidate."""
        fresh, work = copy(self), self.work
        fresh.work = work._replace(
            head_s=work.head_s * loads, encode_s=work.encode_s * loads, exit_s=work.exit_s * loads
        )
        return fresh


def as_table(candidates: Sequence[Candidate] | Table) -> Table:
    """The table of the candidates, or the table itself.

    Raises:
        PlanError: `candidates` is empty.
    """
    return candidates if isinstance(candidates, Table) else Table(candidates)


class Estimate(Value, frozen=True, kw_only=True):
    """What one candidate costs under given conditions.

    `stages_s` maps each stage's name to the seconds that it adds to one request's latency (delays
    included); stages that the plan does not have are left out, and "exchange" is the fixed cost of a
    request over the link, "wait" what it waits for others where requests arrive.  Their sum is `latency_s`.
    `critical` is the resource that bounds a stream.  `energy_j` is None where the conditions name no powers.
    """

    latency_s: float
    throughput_hz: float
    energy_j: float | None
    wire_bytes: float
    stages_s: dict[str, float]
    critical: Resource


def estimate(candidate: Candidate, conditions: Conditions) -> Estimate:
    """One candidate's price, stage by stage."""
    return estimate_row(row_of(work_of([candidate]), 0), conditions)


def estimate_row(work: Work, conditions: Conditions) -> Estimate:
    """The price of one plan's amounts (scalars), stage by stage."""
    total = price(work, conditions)
    stages_s: dict[str, float] = {}
    wire_bytes = 0.0
    for typical, mean in zip(stages(work, is_typical=True), stages(work), strict=True):
        stage_cost = cost(typical, conditions)
        seconds = float(typical.share * (stage_cost.busy_s + stage_cost.delay_s))
        if seconds > 0:
            stages_s[typical.name] = seconds
        if mean.name == "send":
            wire_bytes = float(mean.num_bytes * mean.share)
    exchange_s = float(work.remote_share * conditions.exchange_s)
    if exchange_s > 0:
        stages_s["exchange"] = exchange_s
    if total.wait_s > 0:
        stages_s["wait"] = float(total.wait_s)
    period_s, energy_j = float(total.period_s), float(total.energy_j)
    return Estimate(
        latency_s=float(total.latency_s),
        throughput_hz=1.0 / period_s if period_s > 0 else float("inf"),
        energy_j=None if np.isnan(energy_j) else energy_j,
        wire_bytes=wire_bytes,
        stages_s=stages_s,
        critical=max(RESOURCES, key=lambda name: float(cast(float, total.busy_s[name])) * sharers(name, conditions)),
    )
