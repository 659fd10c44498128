"""How fast a machine works: every computation of device and edge is run by a `Pace`.

    result = pace.run("int8", lambda: session.run(arrays))

The usual pace is `AsFastAsItGoes`.  A lab's slow device is another pace: it runs the call, then waits for as
long as a slower machine would have taken, by one factor for int8 segments and one for everything else.
What does not compute (waiting for the link, for the other machine) never goes through a pace.  Calls within a call
are of one go: a slow machine would not pause between them, so what they lag behind is waited for at the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, Protocol, TypeVar

from ..errors import PlanError

Work = Literal["fp32", "int8"]
T = TypeVar("T")
SPIN_S = 150e-6


class Pace(Protocol):
    """Runs a machine's computations; safe to call from several threads."""

    @property
    def lag_s(self) -> float:
        """Within a call: how much later than now this machine would have come as far."""
        ...

    def run(
        self,
        work: Work,
        call: Callable[[], T],
        rehearsal: Callable[[], object] | None = None,
        *,
        is_urgent: bool = False,
    ) -> T:
        """The call's result, when this machine would have it; `work` is the kind of arithmetic.

        `rehearsal` does the same for nothing and changes nothing: an emulation may fill its caches by it.  What
        `is_urgent` goes before whatever the machine computes, as a thread does that has slept.
        """
        ...


class AsFastAsItGoes:
    """The machine as it is."""

    lag_s = 0.0

    def run(
        self,
        work: Work,
        call: Callable[[], T],
        rehearsal: Callable[[], object] | None = None,
        *,
        is_urgent: bool = False,
    ) -> T:
        """The call's result."""
        return call()


class Loaded:
    """A machine that others keep busy too: everything takes `load` times as long.

    Raises:
        PlanError: `load` is below 1.
    """

    lag_s = 0.0

    def __init__(self, load: float) -> None:
        if not load >= 1:
            raise PlanError(f"an emulated load must be at least 1, got {load} (edge)")
        self.load = load

    def run(
        self,
        work: Work,
        call: Callable[[], T],
        rehearsal: Callable[[], object] | None = None,
        *,
        is_urgent: bool = False,
    ) -> T:
        """The call's result, `load` times as late."""
        start_s = time.perf_counter()
        result = call()
        end_s = start_s + self.load * (time.perf_counter() - start_s)
        while (rest_s := end_s - time.perf_counter()) > 0:
            # A sleep ends late by up to SPIN_S; the last of it is waited for in steps of a yield.
            time.sleep(max(0.0, rest_s - SPIN_S))
        return result
