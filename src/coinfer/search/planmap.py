"""The best plan for every rate, edge load and device load, computed once and looked up on the device.

A PlanMap is the configuration map of Edgent (Li et al., 2019, arXiv:1910.05316) over three axes in place of one.  It
holds numbers of plans alone: a look-up is three searches in short sorted lists.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from itertools import product

import msgspec
import numpy as np

from ..bundle import Bundle, Manifest
from ..errors import BundleError, PlanError
from ..plan import Candidate, Value
from ..profile import Conditions, Slowdown
from .estimate import Table, as_table
from .goal import Goal
from .solve import best_first, best_of_ways, price_table

RATES_BPS: tuple[float, ...] = tuple(float(f"{rate:.3g}") for rate in np.geomspace(1e4, 1e9, 50))
LOADS: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0, 16.0)
# No plan of the menu meets the goal there.
NONE = -1


class PlanMap(Value, frozen=True, kw_only=True):
    """Numbers of the best plans: `plans[(rate x edge loads + edge load) x device loads + device load]`.

    `base` is what the axes vary: the link's rate, the edge's load, and the device's slowdown, which its load
    multiplies.
    """

    goal: Goal
    base: Conditions
    rates_bps: tuple[float, ...]
    edge_loads: tuple[float, ...]
    device_loads: tuple[float, ...]
    plans: tuple[int, ...]

    def __post_init__(self) -> None:
        axes = (self.rates_bps, self.edge_loads, self.device_loads)
        for name, axis in zip(("rates_bps", "edge_loads", "device_loads"), axes, strict=True):
            if not axis or not all(0 < value < math.inf for value in axis) or list(axis) != sorted(set(axis)):
                raise PlanError(f"the map's {name} must be numbers above 0 that rise, got {list(axis)}")
        if len(self.plans) != math.prod(map(len, axes)):
            raise PlanError(f"a map of {[len(axis) for axis in axes]} points has as many plans, got {len(self.plans)}")

    def at(self, rate_bps: float, *, edge_load: float = 1.0, device_load: float = 1.0) -> int | None:
        """The number of the best plan at the nearest point of the map, by ratio; None where none meets the goal.

        Raises:
            PlanError: a rate or load of 0 or below.
        """
        places = [
            _nearest(axis, value)
            for axis, value in (
                (self.rates_bps, rate_bps), (self.edge_loads, edge_load), (self.device_loads, device_load),
            )
        ]  # fmt: skip
        row = (places[0] * len(self.edge_loads) + places[1]) * len(self.device_loads) + places[2]
        number = self.plans[row]
        return None if number == NONE else number


def _nearest(axis: Sequence[float], value: float) -> int:
    if not value > 0:
        raise PlanError(f"a rate or load must be above 0, got {value}")
    above = bisect.bisect_left(axis, value)
    if above == 0 or above == len(axis):
        return min(above, len(axis) - 1)
    # The nearer one by ratio: value / below < above / value.
    return above - (value * value < axis[above - 1] * axis[above])


def plan_map(
    candidates: Sequence[Candidate] | Table,
    goal: Goal,
    base: Conditions,
    *,
    rates_bps: Sequence[float] = RATES_BPS,
    edge_loads: Sequence[float] = LOADS,
    device_loads: Sequence[float] = LOADS,
) -> PlanMap:
    """The map of these candidates, the same choice at each point as `search` would make there.

    Raises:
        PlanError: no candidates, an axis that is none, or a goal of energies without powers.
    """
    table = as_table(candidates)
    plans = []
    for rate_bps, edge_load, device_load in product(rates_bps, edge_loads, device_loads):
        priced = price_table(table, loaded(base, rate_bps, edge_load, device_load), goal)
        best = best_first(table, priced, best_of_ways(table, priced).values())
        plans.append(int(table.numbers[best[0]]) if best else NONE)
    return PlanMap(
        goal=goal,
        base=base,
        rates_bps=tuple(rates_bps),
        edge_loads=tuple(edge_loads),
        device_loads=tuple(device_loads),
        plans=tuple(plans),
    )


def built_goal(manifest: Manifest) -> Goal:
    """What a bundle was built for."""
    return Goal(
        minimise=manifest.goal,  # type: ignore[arg-type]
        max_loss_points=manifest.max_loss_points,
        max_energy_j=manifest.max_energy_j,
        max_device_bytes=manifest.max_device_bytes,
        max_device_memory_bytes=manifest.max_device_memory_bytes,
    )


def load_map(bundle: Bundle) -> PlanMap:
    """The map of a bundle's menu.

    Raises:
        BundleError: the bundle has none, or it holds something else.
    """
    try:
        return msgspec.json.decode(bundle.path("map.json").read_bytes(), type=PlanMap)
    except (msgspec.MsgspecError, PlanError) as error:
        raise BundleError(f"map.json cannot be read: {error} (bundle {bundle.folder})") from error


def loaded(base: Conditions, rate_bps: float, edge_load: float, device_load: float) -> Conditions:
    """`base` at another rate, with both machines' times multiplied by their loads."""
    device = Slowdown(fp32=base.device.fp32 * device_load, int8=base.device.int8 * device_load)
    link = msgspec.structs.replace(base.link, rate_bps=rate_bps, trace=None)
    return msgspec.structs.replace(base, link=link, device=device, edge_load=base.edge_load * edge_load)
