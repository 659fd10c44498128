"""What to make best, subject to what, and what to say when that is impossible.

The accuracy constraint is on the point estimate: `loss_points <= max_loss_points` on the validation
images, not its confidence bound, which would refuse lossless plans wherever images are few.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import PlanError
from ..plan import SEVERAL, Plan, Side, Value
from ..units import format_bytes, format_duration
from .estimate import Table

Objective = Literal["latency", "throughput", "bytes", "energy", "accuracy"]
OBJECTIVES: tuple[Objective, ...] = ("latency", "throughput", "bytes", "energy", "accuracy")
# How the name of a pin's constraint begins.
PIN = "pin "
# Losses are differences of percentages; the last bits of a double must not reject "exactly 1 point".
LOSS_TOLERANCE = 1e-9


class Pin(Value, frozen=True, kw_only=True):
    """Layers that must run on one machine: those whose cuts fit `pattern`.

    `cuts` are where a network may be divided so that they do: behind the last of them for the device, before the first
    for the edge.
    """

    pattern: str
    side: Side
    cuts: tuple[str, ...]

    @property
    def name(self) -> str:
        """As it is given: `layer1.*=device`."""
        return f"{self.pattern}={self.side}"

    def is_kept(self, plan: Plan) -> bool:
        """Whether a plan runs these layers there."""
        return plan.cut in self.cuts if plan.kind == "split" else (plan.kind == "device") == (self.side == "device")


def pin_of(text: str, cuts: Sequence[str]) -> Pin:
    """The pin that a text such as `layer1.*=device` asks for, of a network whose cuts are these, in order.

    Divisions that several values cross, whose names do not say which layers lie before them, are left out.

    Raises:
        PlanError: no such form, or no cut fits the pattern.
    """
    pattern, _, side = text.rpartition("=")
    if side not in ("device", "edge") or not pattern:
        raise PlanError(f'a pin must be PATTERN=device or PATTERN=edge, got "{text}"')
    cuts = [name for name in cuts if SEVERAL not in name]
    places = [place for place, name in enumerate(cuts) if fnmatch.fnmatchcase(name.partition("#")[0], pattern)]
    if not places:
        near = ", ".join(cuts[:: max(1, len(cuts) // 4)][:4]) or "none at all"
        raise PlanError(f'no layer with a cut behind it fits the pin "{text}"; cuts are such as {near}')
    allowed = cuts[places[-1] :] if side == "device" else cuts[: places[0]]
    return Pin(pattern=pattern, side="device" if side == "device" else "edge", cuts=tuple(allowed))


class Goal(Value, frozen=True, kw_only=True):
    """What to make least (or, for throughput and accuracy, most), subject to what.

    `max_loss_points` is top-1 points against the unmodified fp32 network; `max_bytes` is uplink bytes
    of one request on the wire; `max_energy_j` the device's energy for one request; `max_device_bytes` the size of the
    files that the device needs, `max_device_memory_bytes` the memory of its segments; `pins` layers that must run on
    one machine.
    """

    minimise: Objective = "latency"
    max_loss_points: float = 1.0
    max_latency_s: float | None = None
    min_throughput_hz: float | None = None
    max_energy_j: float | None = None
    max_bytes: float | None = None
    max_device_bytes: float | None = None
    max_device_memory_bytes: float | None = None
    pins: tuple[Pin, ...] = ()

    def __post_init__(self) -> None:
        if self.minimise not in OBJECTIVES:
            raise PlanError(f'a goal must be one of {", ".join(OBJECTIVES)}, got "{self.minimise}" (goal)')
        if math.isnan(self.max_loss_points):
            raise PlanError("max_loss_points must be a number, got nan (goal)")
        names = ("max_latency_s", "min_throughput_hz", "max_energy_j", "max_bytes")
        for name in (*names, "max_device_bytes", "max_device_memory_bytes"):
            limit = getattr(self, name)
            if limit is not None and not limit >= 0:
                raise PlanError(f"{name} must be at least 0, got {limit} (goal)")
        if len({pin.side for pin in self.pins}) == 2 and not set.intersection(*(set(pin.cuts) for pin in self.pins)):
            given = " and ".join(pin.name for pin in self.pins)
            raise PlanError(
                f"the pins {given} contradict each other: no cut keeps them all, divisions of several values aside; "
                f"drop one (goal)"
            )


class Constraint(NamedTuple):
    """One limit of a goal beside the column that it limits; `is_floor`: values must be at least the limit.

    A pin's column is 1 where it is broken.
    """

    name: str
    limit: float
    values: NDArray[np.float64]
    is_floor: bool = False

    @property
    def is_met(self) -> NDArray[np.bool_]:
        """Which rows meet it; an unmeasured value (NaN) never does."""
        if self.is_floor:
            return self.values >= self.limit
        return self.values <= self.limit + (LOSS_TOLERANCE if self.name == "max_loss_points" else 0.0)

    @property
    def excess(self) -> NDArray[np.float64]:
        """How far each row misses it, relative to the limit (losses: to 1 point at least); 0 where met."""
        scale = max(abs(self.limit), 1.0 if self.name == "max_loss_points" else 1e-12)
        distance = (self.limit - self.values) if self.is_floor else (self.values - self.limit)
        return np.where(self.is_met, 0.0, distance / scale)

    def broken_text(self, index: int) -> str:
        """How one row breaks it, as `loss 1.8 > 1 points`."""
        return broken_text(self.name, float(self.values[index]), self.limit)


def broken_text(name: str, value: float, limit: float) -> str:
    """A broken constraint in few words, with as many digits as tell the two numbers apart.

    >>> broken_text("max_loss_points", 1.8, 1.0)
    'loss 1.8 > 1 points'
    >>> broken_text("min_throughput_hz", 3.2, 5.0)
    'throughput 3.2 < 5 a second'
    >>> broken_text("max_latency_s", 0.0200004, 0.02)
    'latency 20.0004 ms > 20 ms'
    """
    if name.startswith(PIN):
        return f"not {name.removeprefix(PIN)}"
    if math.isnan(value):
        return "loss not measured"
    for digits in range(3, 18):
        shown, wanted = _quantity(name, value, digits), _quantity(name, limit, digits)
        if shown != wanted:
            break
    noun, sign, unit = {
        "max_loss_points": ("loss ", ">", " points"),
        "max_latency_s": ("latency ", ">", ""),
        "min_throughput_hz": ("throughput ", "<", " a second"),
        "max_energy_j": ("energy ", ">", " J"),
        "max_bytes": ("", ">", " on the wire"),
        "max_device_bytes": ("", ">", " on the device"),
        "max_device_memory_bytes": ("", ">", " of the device's memory"),
    }[name]
    return f"{noun}{shown} {sign} {wanted}{unit}"


def _quantity(name: str, value: float, digits: int) -> str:
    if name == "max_latency_s":
        return format_duration(value, digits=digits)
    if name in ("max_bytes", "max_device_bytes", "max_device_memory_bytes"):
        return format_bytes(value, digits=digits)
    return f"{value:.{digits}g}"


def nearest_miss(table: Table, constraints: Sequence[Constraint]) -> str:
    """One line for `Infeasible`: the candidate that misses least, what to relax, and to what.

    "Least" is the fewest broken constraints, then the smallest sum of relative excesses. Each other
    constraint that would do when relaxed alone is named with the value it needs.
    """
    rows = np.flatnonzero(~table.is_dropped & ~np.isnan(table.loss_points))
    if not rows.size:
        return f"no candidate has a measured accuracy: all {len(table)} were dropped before"
    rows = rows[~np.isnan([constraint.values[rows] for constraint in constraints]).any(axis=0)]
    if not rows.size:
        return "no candidate's size is known: build the bundle again for limits of the device's files or memory"
    excess = np.array([constraint.excess[rows] for constraint in constraints])
    place = int(np.lexsort((excess.sum(axis=0), (excess > 0).sum(axis=0)))[0])
    nearest = int(rows[place])
    broken = [c for c, e in zip(constraints, excess[:, place], strict=True) if e > 0]
    plan = table.candidates[nearest].plan
    misses = ", ".join(c.broken_text(nearest) for c in broken)
    relax = " and ".join(_relaxing(c, nearest) for c in broken)
    return (
        f"no candidate meets the goal; the nearest miss is plan {plan.number} ({plan.label}) with {misses}: "
        f"relax {relax}{_relaxed_alone(constraints, rows, excess, broken)}"
    )


def rate_miss(table: Table, constraints: Sequence[Constraint], rate_hz: float, highest_hz: float, index: int) -> str:
    """One line for `Infeasible` where requests come too fast: the highest rate with all else kept, and other ways out.

    Args:
        table, constraints: at the rate at which they come.
        rate_hz, highest_hz: that rate, and the highest one that row `index` holds.
    """
    rows = np.flatnonzero(~table.is_dropped & ~np.isnan(table.loss_points))
    excess = np.array([constraint.excess[rows] for constraint in constraints])
    is_served = np.isfinite(excess).all(axis=0)
    broken = [constraint for constraint in constraints if constraint.name == "min_throughput_hz"]
    ways = _relaxed_alone(constraints, rows[is_served], excess[:, is_served], broken)
    plan = table.candidates[index].plan
    limit = float(Context(prec=3, rounding=ROUND_FLOOR).create_decimal(Decimal(highest_hz)))
    return (
        f"no candidate meets the goal at {rate_hz:g} requests a second; plan {plan.number} ({plan.label}) holds most "
        f"with the other limits kept: relax min_throughput_hz from {rate_hz:g} to {limit:.15g}{ways}"
    )


def _relaxed_alone(
    constraints: Sequence[Constraint],
    rows: NDArray[np.int64],
    excess: NDArray[np.float64],
    broken: Sequence[Constraint],
) -> str:
    """The other ways out: constraints that suffice when relaxed alone."""
    ways: list[str] = []
    for k, constraint in enumerate(constraints):
        is_named = len(broken) == 1 and broken[0].name == constraint.name
        others = np.delete(excess, k, axis=0).sum(axis=0)
        allowed = np.flatnonzero(others == 0)
        if not is_named and allowed.size:
            least = int(rows[allowed[np.argmin(excess[k][allowed])]])
            is_pin = constraint.name.startswith(PIN)
            ways.append(f"{constraint.name} alone" + ("" if is_pin else f" to {_relaxed(constraint, least)}"))
    return "".join(f", or {way}" for way in ways)


def _relaxing(constraint: Constraint, index: int) -> str:
    if constraint.name.startswith(PIN):
        return f"the {constraint.name}"
    return f"{constraint.name} from {constraint.limit:g} to {_relaxed(constraint, index)}"


def _relaxed(constraint: Constraint, index: int) -> str:
    """The limit that lets one row in, in three digits, rounded to the side that lets it in."""
    value = float(constraint.values[index])
    limit = float(f"{value:.3g}")
    if (limit > value) if constraint.is_floor else (limit < value):
        rounding = ROUND_FLOOR if constraint.is_floor else ROUND_CEILING
        limit = float(Context(prec=3, rounding=rounding).create_decimal(Decimal(value)))
    return f"{limit:.15g}"
