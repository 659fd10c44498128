"""What a device knows of its menu's prices: the map to look plans up in, and a line for each plan.

Both are drawn for a round trip and the device's time for each plan, and drawn anew where these turn out to be others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import msgspec
import numpy as np

from ..bundle import Bundle
from ..errors import Infeasible, PlanError
from ..plan import Candidate, Plan
from ..profile import Conditions, Link
from ..search.estimate import Table
from ..search.goal import Goal
from ..search.line import Line, lines_of
from ..search.planmap import PlanMap, built_goal, load_map, plan_map
from ..search.solve import search

# What a bundle was built for where it does not say so.
_ASSUMED = Conditions(link=Link(rate_bps=1e6, delay_s=0.005))
_UNKNOWN = Line(device_s=0.0, up_bits=0.0, down_bits=0.0, edge_s=0.0, share=1.0, exchange_s=0.0)
_LEAST_LOAD = 1e-3
# The device is another than it was taken for where a plan's time is off by a third.
_OWN_IS_OTHER = math.log(4 / 3)


class PriceBook:
    """Prices of a bundle's menu.

    Args:
        bundle: with evidence, and a map of plans; without a map one is drawn.
        goal: what to make best; what the bundle was built for by default.
        conditions: rate, round trip and device as assumed; what the bundle was built for by default.

    Raises:
        PlanError: no plan of the menu has evidence, or the goal needs powers that the conditions do not name.
        BundleError: evidence or map cannot be read.
    """

    def __init__(self, bundle: Bundle, *, goal: Goal | None = None, conditions: Conditions | None = None) -> None:
        built = load_map(bundle) if "map.json" in bundle.manifest.files else None
        self._bundle = bundle
        self.goal = goal or (built.goal if built is not None else built_goal(bundle.manifest))
        self.base = conditions or (built.base if built is not None else bundle.manifest.conditions) or _ASSUMED
        self._table = Table(_menu(bundle))
        self._lines = lines_of(self._table, self.base)
        is_as_built = built is not None and goal is None and conditions is None
        self._map: PlanMap = built if built is not None and is_as_built else self._drawn(self.base)

    def best_at(self, rate_bps: float, edge_load: float) -> int | None:
        """The number of the best plan, by look-up; None where none keeps the goal."""
        return self._map.at(rate_bps, edge_load=max(edge_load, _LEAST_LOAD))

    def plans(self) -> list[int]:
        """The numbers of all plans that are priced; those that are the best most often come first."""
        often = Counter(self._map.plans)
        return sorted(map(int, self._table.numbers), key=lambda number: (-often[number], number))

    def line(self, number: int) -> Line:
        """A plan's line; of one without evidence nothing is known."""
        return self._lines.get(number, _UNKNOWN)

    def fallback(self, number: int | None = None) -> tuple[Plan, bool]:
        """What the device does alone (the plan of that number, else the best), and whether that keeps the goal.

        Raises:
            PlanError: the plan needs an edge, or none does without.
            BundleError: there is no such plan.
        """
        if number is not None:
            plan = self._bundle.plan(number)
            if plan.kind != "device":
                raise PlanError(f"a fallback must run on the device alone, plan {number} is {plan.label}")
            return plan, True
        alone = [candidate for candidate in self._table.candidates if candidate.plan.kind == "device"]
        if not alone:
            raise PlanError(
                f"no plan of the menu runs on the device alone, so nothing answers where the link is lost: build it "
                f"anew, or run one plan with --strict, a bare Device (bundle {self._bundle.folder})"
            )
        try:
            return alone[search(alone, self.base, self.goal).best].plan, True
        except Infeasible:
            # Better an answer that loses more than none.
            return min(alone, key=_loss).plan, False

    def is_other(self, base_s: float, own_loads: Mapping[int, float]) -> bool:
        """Whether another map is needed: the round trip is `base_s`, a plan takes the device so many times as long."""
        drawn_s = 2 * self.base.link.delay_s
        is_far = abs(base_s - drawn_s) >= max(0.002, 0.2 * drawn_s)
        return is_far or any(abs(math.log(load)) >= _OWN_IS_OTHER for load in own_loads.values())

    def drawn_for(self, base_s: float, own_loads: Mapping[int, float], other_load: float) -> PriceBook:
        """The same book for them, `other_load` for plans that `own_loads` does not name: some tenths of a second."""
        loads = np.array([own_loads.get(int(number), other_load) for number in self._table.numbers])
        link = msgspec.structs.replace(self.base.link, delay_s=base_s / 2)
        fresh = PriceBook.__new__(PriceBook)
        fresh._bundle, fresh.goal, fresh._table = self._bundle, self.goal, self._table.on_device(loads)
        fresh.base = msgspec.structs.replace(self.base, link=link)
        fresh._lines, fresh._map = lines_of(fresh._table, fresh.base), fresh._drawn(fresh.base)
        return fresh

    def _drawn(self, base: Conditions) -> PlanMap:
        return plan_map(self._table, self.goal, base, device_loads=(1.0,))


def _menu(bundle: Bundle) -> Sequence[Candidate]:
    on_menu = {plan.number for plan in bundle.manifest.menu}
    found = [candidate for candidate in bundle.candidates() if candidate.plan.number in on_menu]
    if not found:
        raise PlanError(f"no plan of the menu has evidence, so none can be chosen (bundle {bundle.folder})")
    return found


def _loss(candidate: Candidate) -> float:
    loss = candidate.evidence.loss_points
    return math.inf if loss is None else loss
