"""Streams side by side: several ways to run one, in turns over one shaped link, each request a line of the log.

    calibrate -> rounds: each round is `chunk` pictures through every contender, in a random order

Right before each of these runs, a few of its pictures go the same way without a limit of the link's rate: what is
expected of the run is made of their times, since the machine's speed has changed since the calibration.

A contender is a plan, how many requests it may have under way (1: one at a time, nothing overlaps), and when they come.
What its resources were busy for is taken from the same requests: the device's core by the worker, the link by bytes,
the edge by its own durations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import PlanError
from ..plan import Candidate, Value
from ..profile import Conditions
from ..search.estimate import Estimate, estimate
from ..search.goal import Goal
from ..stages import Course, Resource, courses_of, price
from .bench import Bench, Progress, silent, unlimited
from .cell import Cell, Effort
from .choose import calibrated, mean_of, pick_plans
from .record import read_lines
from .shape import ShapedLink
from .spawn import WorkerProcess
from .worker import Command, Request


class Contender(Value, frozen=True, kw_only=True):
    """One way to run a stream: by a plan, with so many requests under way at most.

    `period_s`: a request every so often; 0: as fast as they are taken.

    Raises:
        PlanError: a window below 1 or a period below 0.
    """

    name: str
    plan: int
    window: int = 8
    period_s: float = 0.0

    def __post_init__(self) -> None:
        if self.window < 1 or not self.period_s >= 0:
            given = f"window {self.window}, period {self.period_s}"
            raise PlanError(f"a stream needs a window of 1 or more and a period of 0 s or more, got {given}")


class Timing(Value, frozen=True, kw_only=True):
    """Requests of a stream that its times are taken from, and how long the slowed core computed for them."""

    busy_s: float = 0.0
    requests: tuple[Request, ...] = ()


class StreamRun(Value, frozen=True, kw_only=True):
    """One contender's requests of one round, how long the slowed core computed for them, and the timing before."""

    contender: Contender
    round: int
    busy_s: float
    requests: tuple[Request, ...]
    timing: Timing = Timing()

    @property
    def makespan_s(self) -> float:
        """From the first request to the last answer; 0 where nothing was answered."""
        done = [request for request in self.requests if request.error is None]
        if not done:
            return 0.0
        return max(request.end_s for request in done) - min(request.start_s for request in done)


class Measured(NamedTuple):
    """What came of one contender's runs.

    `busy_s` of each resource, for all requests together; `makespan_s` from each run's first request to its last answer.
    """

    contender: Contender
    n: int
    failed: int
    makespan_s: float
    busy_s: dict[str, float]
    latencies_s: NDArray[np.float64]

    @property
    def throughput_hz(self) -> float:
        """Answers a second, filling and draining included."""
        return self.n / self.makespan_s if self.makespan_s > 0 else 0.0

    @property
    def critical(self) -> str:
        """The resource that was busy for longest."""
        return max(self.busy_s, key=lambda name: self.busy_s[name])

    @property
    def efficiency(self) -> float:
        """Share of the time that the busiest resource worked."""
        return self.busy_s[self.critical] / self.makespan_s if self.makespan_s > 0 else 0.0


class Setting(NamedTuple):
    """What contenders are chosen by: the menu with the times that were measured here, and the conditions."""

    candidates: Sequence[Candidate]
    conditions: Conditions
    seconds: Mapping[str, float]

    def estimate(self, plan: int) -> Estimate:
        """What is expected of a plan."""
        return estimate(self.candidate(plan), self.conditions)

    def candidate(self, plan: int) -> Candidate:
        """The candidate of that plan.

        Raises:
            PlanError: it is not on the menu.
        """
        for candidate in self.candidates:
            if candidate.plan.number == plan:
                return candidate
        raise PlanError(f"plan {plan} is not on the menu")

    def latest(self, plan: int, timings: Sequence[Timing], cell: Cell) -> Setting:
        """The same with a plan's times as they are in these; as it is where there are none.

        The edge's are medians.  The device's keep their proportions, and are together what the core was busy for.
        """
        timed = _answered(timings)
        if not timed:
            return self
        before = self.candidate(plan)
        after = calibrated(before, timed, cell.slowdown, cell.load, self.seconds)
        device_s = self._device_s(plan)
        expected_s = sum(device_s[request.exit] for request in timed)
        busy_s = sum(timing.busy_s for timing in timings)
        factor = busy_s / expected_s if busy_s and expected_s else 1.0
        device = {name: factor * getattr(before.evidence, name) for name in ("head_s", "exit_s", "encode_s")}
        now = msgspec.structs.replace(after, evidence=msgspec.structs.replace(after.evidence, **device))
        return self._replace(candidates=[now if c.plan.number == plan else c for c in self.candidates])

    def spread(self, plan: int, timings: Sequence[Timing]) -> dict[Resource, NDArray[np.float64]]:
        """How much more or less than usual single requests took of each resource in these; for `simulate`.

        Of the device and the uplink by their mean, of the edge by the median of those that crossed.
        """
        timed, device_s = _answered(timings), self._device_s(plan)
        crossed = [request for request in timed if request.answered == "edge"]
        own = [(r.head_s + r.exit_s + r.encode_s) / device_s[r.exit] for r in timed if device_s[r.exit] > 0]
        factors: dict[Resource, NDArray[np.float64]] = {}
        if own:
            factors["device"] = np.array(own) / np.mean(own)
        if crossed:
            num_bytes = np.array([request.wire_bytes for request in crossed])
            edge_s = np.array([request.decode_s + request.tail_s for request in crossed])
            factors |= {"uplink": num_bytes / np.mean(num_bytes), "edge": edge_s / np.median(edge_s)}
        return factors

    def _device_s(self, plan: int) -> dict[int | None, float]:
        """What each course is expected to take of the device."""
        courses = self.courses(plan)
        return {course.exit: float(price(course.work, self.conditions).busy_s["device"]) for course in courses}

    def courses(self, plan: int) -> tuple[Course, ...]:
        """The courses of a plan's requests with the times that were measured here."""
        candidate = self.candidate(plan)
        found = courses_of(candidate, self.seconds)
        if not candidate.plan.exits:
            return found
        factors = {}
        for name in ("head_s", "exit_s", "tail_s"):
            expected_s = mean_of(found, name)
            factors[name] = getattr(candidate.evidence, name) / expected_s if expected_s > 0 else 1.0
        return tuple(
            course._replace(
                work=course.work._replace(
                    **{name: getattr(course.work, name) * factor for name, factor in factors.items()}
                )
            )
            for course in found
        )


Choose = Callable[[Setting], Sequence[Contender]]


def run_streams(
    bundle: Bundle,
    pixels: NDArray[Any],
    cell: Cell,
    choose: Choose,
    *,
    requests: int = 2000,
    chunk: int = 200,
    effort: Effort | None = None,
    tell: Progress | None = None,
) -> tuple[Setting, list[StreamRun]]:
    """Run every contender for `requests` pictures, `chunk` of them in a round; all see the same pictures.

    Args:
        bundle: whose plans run.
        pixels: pictures (N, H, W, C) uint8.
        cell: the link, the device, the edge's load.
        choose: names the contenders, given the times that were measured here.
        requests, chunk: of each contender in all, and in a round.
        effort: of the calibration, and how many are timed before each run.
        tell: is told of the progress.

    Raises:
        PlanError: no contenders, or a plan that is not on the menu.
        LinkError: a process did not start, or ended.
    """
    bench = Bench(bundle, pixels, None, Goal(), pick_plans(), effort or Effort(), tell or silent)
    runs = list[StreamRun]()
    with bench.machines(cell) as (link, worker):
        candidates, exchange_s = bench.calibrate(link, worker, cell, "calibration", cell.link.delay_s)
        setting = Setting(candidates, bench.conditions(cell, exchange_s), bench.seconds)
        # Requests alone do not take quite what those of a stream take.
        images = tuple(int(row) for row in bench.chance.integers(len(pixels), size=bench.effort.timings))
        for place, candidate in enumerate(candidates):
            bench.tell("timing", place, len(candidates), candidate.plan.label)
            contender = Contender(name="timing", plan=candidate.plan.number)
            timing = _timing(link, worker, cell, contender, images)
            setting = setting.latest(contender.plan, [timing], cell)
        contenders = list(choose(setting))
        if not contenders:
            raise PlanError("streams need at least one contender, got none")
        for contender in contenders:
            setting.candidate(contender.plan)
        link.set(cell.link)
        rounds = math.ceil(requests / chunk)
        for number in range(rounds):
            size = min(chunk, requests - number * chunk)
            images = tuple(int(row) for row in bench.chance.integers(len(pixels), size=size))
            for place in bench.chance.permutation(len(contenders)):
                contender = contenders[place]
                bench.tell("streams", number, rounds, contender.name)
                # A trace that is playing is not interrupted.
                timing = Timing()
                if cell.link.trace is None:
                    timing = _timing(link, worker, cell, contender, images[: bench.effort.timings])
                    link.set(cell.link)
                found, busy_s = _run(worker, cell, contender, images)
                runs.append(
                    StreamRun(contender=contender, round=number, busy_s=busy_s, requests=tuple(found), timing=timing)
                )
    bench.tell("streams", rounds, rounds, "done")
    return setting, runs


def _timing(
    link: ShapedLink, worker: WorkerProcess, cell: Cell, contender: Contender, images: tuple[int, ...]
) -> Timing:
    """A contender's pictures as fast as they are taken, over a link without a limit; it stays so."""
    if not images:
        return Timing()
    link.set(unlimited(cell.link.delay_s))
    found, busy_s = _run(worker, cell, msgspec.structs.replace(contender, period_s=0.0), images)
    return Timing(busy_s=busy_s, requests=tuple(found))


def _answered(timings: Sequence[Timing]) -> list[Request]:
    return [request for timing in timings for request in timing.requests if request.error is None]


def _run(
    worker: WorkerProcess, cell: Cell, contender: Contender, images: tuple[int, ...]
) -> tuple[list[Request], float]:
    """What came of these pictures, and how long the slowed core was busy."""
    arrivals_s = tuple(contender.period_s * place for place in range(len(images))) if contender.period_s else ()
    command = Command(
        plan=contender.plan, images=images, slowdown=cell.slowdown, mode="stream", window=contender.window,
        arrivals_s=arrivals_s,
    )  # fmt: skip
    return worker.run(command), worker.busy_s


def measured(runs: Sequence[StreamRun], cell: Cell) -> list[Measured]:
    """Each contender's runs together, in the order in which they first appear; a link with a trace is never busy."""
    return [_together(found, cell) for found in by_contender(runs).values()]


def by_contender(runs: Sequence[StreamRun]) -> dict[str, list[StreamRun]]:
    """The runs of each contender, by name, in the order in which they first appear."""
    found: dict[str, list[StreamRun]] = {}
    for run in runs:
        found.setdefault(run.contender.name, []).append(run)
    return found


def _together(runs: Sequence[StreamRun], cell: Cell) -> Measured:
    all_of = [request for run in runs for request in run.requests]
    done = [request for request in all_of if request.error is None]
    busy_s = {"device": sum(run.busy_s for run in runs)}
    if cell.slowdown.fp32 == cell.slowdown.int8 == 1:
        # A device that is not slowed is not watched: what it says of its stages.
        busy_s["device"] = sum(r.head_s + r.exit_s + r.encode_s + r.finish_s for r in done)
    busy_s["edge"] = sum(request.decode_s + request.tail_s for request in done)
    if cell.link.trace is None:
        down_bps = cell.link.rate_bps if cell.link.down_rate_bps is None else cell.link.down_rate_bps
        busy_s["uplink"] = sum(request.wire_bytes for request in done) * 8 / cell.link.rate_bps
        busy_s["downlink"] = sum(request.reply_wire_bytes for request in done) * 8 / down_bps
    return Measured(
        contender=runs[0].contender,
        n=len(done),
        failed=len(all_of) - len(done),
        makespan_s=sum(run.makespan_s for run in runs),
        busy_s=busy_s,
        latencies_s=np.array([request.latency_s for request in done]),
    )


def read_runs(path: Path) -> list[StreamRun]:
    """The runs of a log that `record.write_log` wrote, in order.

    Raises:
        DataError: no such file, or not such a log.
    """
    return read_lines(path, msgspec.json.Decoder(StreamRun))
