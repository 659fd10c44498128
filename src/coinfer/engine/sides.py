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

import numpy as np
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


# Runs a segment of that precision; is told the stage that has just ended.
Run = Callable[[Precision, Callable[[], Values]], Values]
Mark = Callable[[str], None]


def run_now(precision: Precision, call: Callable[[], Values]) -> Values:
    """As fast as it goes."""
    return call()


def unmarked(stage: str) -> None:
    """Nobody is told."""


def run_side(
    plan: Plan,
    side: Side,
    segments: Segments,
    values: Values,
    *,
    run: Run = run_now,
    mark: Mark = unmarked,
) -> SideResult:
    """What one machine makes of one request, whose values are each (1, *shape).  The rest as `run_batch`."""
    (found,) = run_batch(plan, side, segments, values, run=run, mark=mark)
    return found


def run_batch(
    plan: Plan,
    side: Side,
    segments: Segments,
    values: Values,
    *,
    run: Run = run_now,
    mark: Mark = unmarked,
) -> list[SideResult]:
    """What one machine makes of N requests together; those that an exit answers go no further.

    Args:
        plan: that has a segment on this side.
        side: which machine.
        segments: where its sessions are.
        values: the pictures, or what crossed, each (N, *shape).
        run: runs each segment with the plan's precision, each classifier as fp32.
        mark: is told "head" or "tail" behind each segment, "exit" behind each classifier.

    Raises:
        BundleError: a segment does not fit the plan.
        EngineError: it does not load or run.
    """
    stage = "head" if side == "device" else "tail"
    found: dict[int, SideResult] = {}
    left = list(range(len(values[0])))
    for part in segments.parts(plan, side):
        given = run(plan.precision if part.exit is None else "fp32", partial(part.segment.run, values))
        mark(stage if part.exit is None else "exit")
        if part.exit is None:
            values = given
            continue
        sure = is_sure(given[0], plan.exits[part.exit].rule)
        if sure.any():
            found |= {left[row]: SideResult(_row(given, row), part.exit) for row in map(int, np.flatnonzero(sure))}
            left = [request for request, is_out in zip(left, sure, strict=True) if not is_out]
            values = [array[~sure] for array in values]
        if not left:
            break
    found |= {request: SideResult(_row(values, row)) for row, request in enumerate(left)}
    return [found[request] for request in sorted(found)]


def _row(values: Values, row: int) -> Values:
    """One request's part of the values of several."""
    return values if len(values[0]) == 1 else [array[row : row + 1] for array in values]
