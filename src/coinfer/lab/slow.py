"""Slow machines out of a fast one, always labelled as emulated.

`SlowedDevice` runs a call, measures it, and waits for the rest of factor x its time: all of the
device's work goes through it, segments of int8 by their own factor, everything else (fp32 segments,
codecs, image encoding, serialisation) by the fp32 factor, so that encoding is never free.  With a yardstick the
device has a constant speed, though the core that stands for it has not (see `yardstick`).  A slowed x86 core is not
an ARM core; the label says so wherever a figure stands.

`CpuQuota` slows a whole process instead: by the kernel's quota (cgroup v2) where it may, else by stopping and
continuing it at a duty cycle.
"""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, TypeVar

from ..errors import PlanError
from ..profile import Slowdown
from .clock import AWAKE_S, cpu_s, now_s, sharpen_sleep, wait_awake, wait_until
from .yardstick import Work, Yardstick

T = TypeVar("T")
# Hardly a call of the device computes for less.
LEAST_CALL_S = 30e-6
# Below this factor what a call waits for memory is hardly stretched, and a rehearsal would not fit into its time.
LEAST_REHEARSED = 8.0
# A look at the yardstick, and some.
LOOK_S = 100e-6


def label(slowdown: Slowdown, *, machine: str = "x86 core") -> str:
    """How a slowed device is named beside every figure.

    >>> label(Slowdown(fp32=30, int8=60))
    'emulated: x86 core slowed 30x (fp32), 60x (int8)'
    """
    if slowdown.fp32 == slowdown.int8 == 1:
        return f"{machine}, not slowed"
    return f"emulated: {machine} slowed {slowdown.fp32:g}x (fp32), {slowdown.int8:g}x (int8)"


class _Turns:
    """A lock that serves those who wait in the order in which they came."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._next = 0
        self._served = 0

    def __enter__(self) -> None:
        with self._changed:
            mine = self._next
            self._next += 1
            while mine != self._served:
                self._changed.wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._changed:
            self._served += 1
            self._changed.notify_all()


class SlowedDevice:
    """A pace (`runtime.pace.Pace`) that makes every call take its factor times as long.

    It stands for one slow core: calls of several threads take turns, for a stream must not compute two things at once
    on a device that has one core.  An urgent call interrupts the one whose turn it is, which ends later by as much; an
    operating system lets a thread that has slept go first, too.  Calls within a call are slowed once, by their own
    factors, and run in one go: what they lag behind is waited for at the end of the outermost.  (A pause between them
    would leave the core's caches to others: after one an encoder takes four times as long, and all of it would be
    stretched.)  A factor of 1 leaves the machine as it is.  `slowdown` may be changed between calls.

    `busy_s` is how long the slow core has been computing; it stays 0 where nothing is slowed.
    `counts` says what of a call is stretched: "wall" its duration; "cpu" what the calling thread computed, so that
    other processes of the machine do not seem to be work of the device (for calls that compute in their own thread).
    With a `yardstick`, what is stretched is counted at its reference speed.

    Raises:
        PlanError: a factor is below 1; no wait makes a machine faster.
    """

    def __init__(
        self, slowdown: Slowdown, *, counts: Literal["wall", "cpu"] = "wall", yardstick: Yardstick | None = None
    ) -> None:
        self._counts_cpu = counts == "cpu"
        self._yardstick = yardstick
        self._speeds: dict[Work, float] = {"fp32": 1.0, "int8": 1.0}
        self._turns, self._urgent_turns = _Turns(), _Turns()
        self._changed = threading.Condition()
        self._num_urgent, self._interrupted_s = 0, 0.0
        self.busy_s = 0.0
        self._inner = threading.local()
        self.slowdown = slowdown

    @property
    def slowdown(self) -> Slowdown:
        """The factors."""
        return self._slowdown

    @slowdown.setter
    def slowdown(self, slowdown: Slowdown) -> None:
        if min(slowdown.fp32, slowdown.int8) < 1:
            raise PlanError(
                f"an emulated slowdown must be at least 1, got fp32 {slowdown.fp32:g}, int8 {slowdown.int8:g}"
            )
        self._slowdown = slowdown

    @property
    def label(self) -> str:
        """What to print beside figures of this device."""
        return label(self._slowdown)

    def run(
        self,
        work: Work,
        call: Callable[[], T],
        rehearsal: Callable[[], object] | None = None,
        *,
        is_urgent: bool = False,
    ) -> T:
        """The call's result, returned when `factor` times its own time has passed.

        A call that raises is not slowed.  There is a `rehearsal` before a call that is slowed much, within its time.
        """
        if self._slowdown.fp32 == self._slowdown.int8 == 1:
            return call()
        if not hasattr(self._inner, "debts"):
            self._inner.debts = None
            sharpen_sleep()
        if self._inner.debts is not None:
            return self._computed(work, call)
        with self._urgent_turns if is_urgent else self._turns, self._occupied(is_urgent) as interrupted_before_s:
            begun_s = now_s()
            try:
                # The core of a device that takes so long is computing all the while.  Ours is woken before the call,
                # and the call's own time is shortened by what passed before it.
                is_awake = begun_s - getattr(self._inner, "woken_s", -math.inf) < AWAKE_S
                wait_awake(begun_s + (0.0 if is_awake else min(AWAKE_S, (self._factor(work) - 1) * LEAST_CALL_S)))
                if rehearsal is not None and self._factor(work) >= LEAST_REHEARSED:
                    rehearsal()
                self._inner.debts, self._inner.cpu, self._inner.wall = [], 0.0, 0.0
                self._inner.before_s = now_s() - begun_s
                result = self._computed(work, call)
                end_s = now_s()
                own_s: dict[Work, float] = {"fp32": 0.0, "int8": 0.0}
                for kind, seconds in self._inner.debts:
                    own_s[kind] += seconds
                for kind, seconds in own_s.items():
                    if seconds:
                        self._look(kind, (self._factor(kind) - 1) * seconds)
                end_s += self.lag_s
                wait_awake(end_s)
                if not is_urgent:
                    self._wait_out(end_s, interrupted_before_s)
                return result
            finally:
                self._inner.debts = None

    @contextmanager
    def _occupied(self, is_urgent: bool) -> Iterator[float]:
        """Count a call's time as the core's; gives for how long calls have been interrupted so far."""
        begun_s, before_s = now_s(), self._interrupted_s
        with self._changed:
            self._num_urgent += is_urgent
        try:
            yield before_s
        finally:
            took_s = now_s() - begun_s
            with self._changed:
                # An interruption is counted once, as time of what interrupted.
                self.busy_s += took_s - (0.0 if is_urgent else min(took_s, self._interrupted_s - before_s))
                self._interrupted_s += took_s if is_urgent else 0.0
                self._num_urgent -= is_urgent
                self._changed.notify_all()

    def _wait_out(self, end_s: float, interrupted_before_s: float) -> None:
        """Wait until `end_s`, and for as long again as the call was interrupted."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: not self._num_urgent)
                left_s = end_s + self._interrupted_s - interrupted_before_s - now_s()
            if left_s <= 0:
                return
            wait_awake(now_s() + left_s)

    @property
    def lag_s(self) -> float:
        """Within a call: how much later than now the slow core would have come as far."""
        debts: list[tuple[Work, float]] | None = getattr(self._inner, "debts", None)
        if debts is None:
            return 0.0
        stretched_s = sum((self._factor(work) * self._speeds[work] - 1) * seconds for work, seconds in debts)
        return stretched_s - float(self._inner.before_s)

    def wake(self, warm_up: Callable[[], object]) -> None:
        """Make the core as one that has never done other work: awake, its caches filled by `warm_up`.

        A call of this thread right after it is not woken again.
        """
        wait_awake(now_s() + AWAKE_S)
        warm_up()
        self._inner.woken_s = now_s()

    def _factor(self, work: Work) -> float:
        return self._slowdown.int8 if work == "int8" else self._slowdown.fp32

    def _computed(self, work: Work, call: Callable[[], T]) -> T:
        """The call's result; what it computed beside the calls within it is noted as work of its kind."""
        inner = self._inner
        outside: tuple[float, float] = inner.wall, inner.cpu
        inner.wall = inner.cpu = 0.0
        start_s, start_cpu_s = now_s(), cpu_s()
        try:
            result = call()
            wall_s, computed_s = now_s() - start_s, cpu_s() - start_cpu_s
            inner.debts.append((work, computed_s - inner.cpu if self._counts_cpu else wall_s - inner.wall))
        finally:
            inner.wall, inner.cpu = outside[0] + now_s() - start_s, outside[1] + cpu_s() - start_cpu_s
        return result

    def _look(self, work: Work, spare_s: float) -> None:
        """Note the core's speed for this work, as it is now, where there is the time to look."""
        if self._yardstick is not None and spare_s > LOOK_S:
            self._speeds[work] = self._yardstick.speed(work)


class CpuQuota:
    """Holds the process `pid` to `share` (0 to 1) of one core while entered.

    `how` "cgroup" uses the kernel's quota (cgroup v2, needs the right to write there); "signals" stops and
    continues the process every `period_s`; None takes the first that works.  Either way the process's
    time comes in slices: calls much shorter than the period are not slowed one by one but on average.

    Raises:
        PlanError: `share` is out of range, or (on entering) the chosen way does not work here.
    """

    def __init__(
        self,
        pid: int,
        share: float,
        *,
        how: Literal["cgroup", "signals"] | None = None,
        period_s: float = 0.02,
        root: Path = Path("/sys/fs/cgroup"),
    ) -> None:
        if not 0 < share <= 1:
            raise PlanError(f"a CPU share must be above 0 and at most 1, got {share} (process {pid})")
        self.pid, self.share, self.how = pid, share, how
        self._period_s = period_s
        self._root = root
        self._group: Path | None = None
        self._stop = threading.Event()
        self._beat = threading.Thread(target=self._duty_cycle, name="cpu-quota", daemon=True)

    @property
    def label(self) -> str:
        """What to print beside figures of this process."""
        way = "cgroup quota" if self._group is not None else "stop and continue"
        return f"emulated: x86 core, CPU quota {self.share:.3g} ({way}, every {self._period_s * 1e3:g} ms)"

    def __enter__(self) -> Self:
        if self.how != "signals":
            try:
                self._enter_group()
                return self
            except OSError as error:
                self._leave_group()
                if self.how == "cgroup":
                    raise PlanError(
                        f"no CPU quota by cgroup here: {error.strerror or error} (process {self.pid})"
                    ) from error
        if not _is_alive(self.pid):
            raise PlanError(f"no process {self.pid} of ours to slow")
        self._beat.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave_group()
        if self._beat.is_alive():
            self._stop.set()
            self._beat.join()

    def _enter_group(self) -> None:
        if not (self._root / "cgroup.controllers").exists():
            raise FileNotFoundError(2, "cgroup v2 is not mounted")
        group = self._root / f"coinfer-{os.getpid()}-{self.pid}"
        group.mkdir()
        self._group = group
        period_us = int(self._period_s * 1e6)
        (group / "cpu.max").write_text(f"{max(int(period_us * self.share), 1000)} {period_us}")
        (group / "cgroup.procs").write_text(str(self.pid))

    def _leave_group(self) -> None:
        if self._group is None:
            return
        with suppress(OSError):  # the process may be gone, and then nothing is left to move
            (self._root / "cgroup.procs").write_text(str(self.pid))
        with suppress(OSError):
            self._group.rmdir()
        self._group = None

    def _duty_cycle(self) -> None:
        sharpen_sleep()
        deadline_s = now_s()
        with suppress(ProcessLookupError):
            while not self._stop.is_set():
                deadline_s += self._period_s * self.share
                wait_until(deadline_s)
                if self.share < 1:
                    os.kill(self.pid, signal.SIGSTOP)
                deadline_s += self._period_s * (1 - self.share)
                wait_until(deadline_s)
                os.kill(self.pid, signal.SIGCONT)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except OSError:
        return False
    return True
