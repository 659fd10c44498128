"""What one machine computes of a plan: its segments and, between them, its exits.

    values --> first segment --> value --> classifier --> sure enough? --> its logits are the answer
                                   |                           | no
                                   '----------> rest ----------'--> next exit, or the end of the side

A side without exits is its one segment.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

from numpy.typing import NDArray

from ..exits import is_sure
from ..plan import Plan, Precision, Side
from .segments import Segments

Array = NDArray[Any]
Values = Sequence[Array]


class SideResult(NamedTuple):
    """What came of one request on one side.

    `values` are what crosses, or the network's outputs; where exit `exit` of the plan answered, its logits alone.
    """

    values: Values
    exit: int | None = None


def run_now(precision: Precision, call: Callable[[], Values]) -> Values:
    """As fast as it goes."""
    return call()


def run_side(
    plan: Plan,
    side: Side,
    segments: Segments,
    values: Values,
    *,
    run: Callable[[Precision, Callable[[], Values]], Values] = run_now,
    mark: Callable[[str], None] = lambda stage: None,
) -> SideResult:
    """What one machine makes of one request.

    Args:
        plan: that has a segment on this side.
        side: which machine.
        segments: where its sessions are.
        values: the picture, or what crossed, each (1, *shape).
        run: runs each segment with the plan's precision, each classifier as fp32.
        mark: is told "head" or "tail" behind each segment, "exit" behind each classifier.

    Raises:
        BundleError: a segment does not fit the plan.
        EngineError: it does not load or run.
    """
    stage = "head" if side == "device" else "tail"
    for part in segments.parts(plan, side):
        given = run(plan.precision if part.exit is None else "fp32", partial(part.segment.run, values))
        mark(stage if part.exit is None else "exit")
        if part.exit is None:
            values = given
        elif is_sure(given[0], plan.exits[part.exit].rule)[0]:
            return SideResult(given, part.exit)
    return SideResult(values)
