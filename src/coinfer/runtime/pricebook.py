"""What a device knows of its menu's prices: the map to look plans up in, and a line for each plan.

Both are drawn for a round trip and the device's time for each plan, and drawn anew where these turn out to be others.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import copy

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
# The device is another than it was taken for where a plan's time is off by a third, and by as much as can matter.
_OWN_IS_OTHER, _OWN_MATTERS_S = math.log(4 / 3), 0.001


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
        # How many times as long as the bundle says the device takes for each plan; and the same beside that when the
        # map was drawn.
        self._scale = np.ones(len(self._table))
        self._drawn_loads: Mapping[int, float] = {}
        self._drawn_other = 1.0
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
        scale = self._scale[[candidate.plan.kind == "device" for candidate in self._table.candidates]]
        try:
            return alone[search(Table(alone).on_device(scale), self.base, self.goal).best].plan, True
        except Infeasible:
            # Better an answer that loses more than none.
            return min(alone, key=_loss).plan, False

    def is_other(self, base_s: float, own_loads: Mapping[int, float]) -> bool:
        """Whether another map is needed: the round trip is `base_s`, a plan takes the device so many times as long."""
        drawn_s = 2 * self.base.link.delay_s
        is_far = abs(base_s - drawn_s) >= max(0.002, 0.2 * drawn_s)
        return is_far or any(self._is_off(number, load) for number, load in own_loads.items())

    def _is_off(self, number: int, load: float) -> bool:
        drawn = self._drawn_loads.get(number, self._drawn_other)
        is_off = abs(math.log(load / drawn)) >= _OWN_IS_OTHER
        return is_off and abs(load - drawn) * self.line(number).device_s >= _OWN_MATTERS_S

    def drawn_for(self, base_s: float, own_loads: Mapping[int, float], other_load: float) -> PriceBook:
        """The same book with a map for them; `other_load` is of plans that are not named.  Some tenths of a second."""
        fresh, link = copy(self), msgspec.structs.replace(self.base.link, delay_s=base_s / 2)
        fresh.base = msgspec.structs.replace(self.base, link=link)
        fresh._drawn_loads, fresh._drawn_other = own_loads, other_load
        fresh._map = fresh._drawn(fresh.base)
        return fresh

    def timed(self, base_s: float, own_s: Mapping[int, float]) -> PriceBook:
        """A book that says of plans what they took the device; of others as many times as long as of these together."""
        said_s = {number: self.line(number).device_s for number in own_s if self.line(number).device_s > 0}
        other = sum(own_s[number] for number in said_s) / sum(said_s.values()) if said_s else 1.0
        loads = {number: own_s[number] / seconds for number, seconds in said_s.items()}
        scale = np.array([loads.get(int(number), other) for number in self._table.numbers])
        fresh = copy(self)
        fresh._table, fresh._scale = self._table.on_device(scale), self._scale * scale
        fresh._lines = lines_of(fresh._table, self.base)
        return fresh.drawn_for(base_s, {}, 1.0)

    def _drawn(self, base: Conditions) -> PlanMap:
        loads = [self._drawn_loads.get(int(number), self._drawn_other) for number in self._table.numbers]
        return plan_map(self._table.on_device(np.array(loads)), self.goal, base, device_loads=(1.0,))


def _menu(bundle: Bundle) -> Sequence[Candidate]:
    on_menu = {plan.number for plan in bundle.manifest.menu}
    found = [candidate for candidate in bundle.candidates() if candidate.plan.number in on_menu]
    if not found:
        raise PlanError(f"no plan of the menu has evidence, so none can be chosen (bundle {bundle.folder})")
    return found


def _loss(candidate: Candidate) -> float:
    loss = candidate.evidence.loss_points
    return math.inf if loss is None else loss
