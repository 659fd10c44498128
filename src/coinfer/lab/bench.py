"""The harness: the chosen plan beside every baseline, over a shaped link, in one interleaved run.

    this process                    core of the edge             core of the device
    ShapedLink  <---------------->  EdgeProcess
        ^-------------------------------------------------->     WorkerProcess (SlowedDevice)

For each emulated device and edge load the two processes are started once and calibrated: every plan of the menu
runs a few times without a limit of rate, which gives the times that plans are chosen by (as
`coinfer profile` would on a real device).  Then comes one cell after another:

    pick the plans by estimate -> warm up
    -> rounds: each round is one picture through every plan, in a random order; between the rounds, rounds without
       a limit of rate, whose times the cell's estimates are made of: a machine drifts from one minute to the next
    -> the chosen plan and its best rival once more -> a stream by the chosen plan

Nothing is skipped: a request that fails is a line of the log.  The log is written anew, whole, after each cell.
"""

from __future__ import annotations

import datetime
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import groupby
from math import inf, isfinite
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from numpy.typing import NDArray

from .. import __version__
from ..bundle import Bundle
from ..engine.measure import describe_machine, pinned
from ..errors import PlanError
from ..plan import Candidate
from ..profile import Conditions, Link, Slowdown
from ..runtime.spawn import EdgeProcess
from ..search.goal import LOSS_TOLERANCE, Goal
from .cell import Cell, Effort, cell_line, menu_plan
from .choose import Pick, calibrated, menu_candidates, pick_images, pick_plans
from .record import (
    CalibrationLine,
    CellLine,
    Header,
    Line,
    MemoryLine,
    Phase,
    RequestLine,
    write_log,
)
from .shape import ShapedLink
from .slow import label
from .spawn import WorkerProcess
from .summary import OverheadRow, Summary, summarise, typical
from .worker import Command, Request
from .yardstick import measure_loops

# Stage of work, how much of it is done, of how much, and what is at hand: as in build.
Progress = Callable[[str, int, int, str], None]
SLOW_BPS = 100e3
LEAST_CALIBRATION = 5


def run_cells(
    bundle: Bundle,
    pixels: NDArray[Any],
    labels: NDArray[Any] | None,
    cells: Sequence[Cell],
    log: Path,
    *,
    goal: Goal | None = None,
    pick: Pick | None = None,
    effort: Effort | None = None,
    tell: Progress | None = None,
) -> Summary:
    """Measure every cell, write the raw log, and give its rows.

    Args:
        bundle: whose menu competes.
        pixels: pictures (N, H, W, C) uint8 that no choice has seen.
        labels: their classes (N,), or None.
        cells: conditions; cells of one device and load are measured together.
        log: where the raw log goes (.jsonl.gz).
        goal: what the chosen plan is chosen by; least latency at 1 point of loss by default.
        pick: who is measured in a cell; `pick_plans()` by default.
        effort: how much is measured.
        tell: is told of the progress.

    Raises:
        PlanError: no cells, or evidence is missing.
        LinkError: a process did not start, or ended.
    """
    if not cells:
        raise PlanError("a benchmark needs at least one cell, got none")
    if not all(isfinite(cell.link.rate_bps) for cell in cells):
        raise PlanError("a cell's rate must be finite: take 1 Gbit/s and more for a link that does not limit")
    bench = Bench(bundle, pixels, labels, goal or Goal(), pick or pick_plans(), effort or Effort(), tell or silent)
    numbered = list(enumerate(cells))
    groups = groupby(sorted(numbered, key=lambda pair: _group(pair[1])), key=lambda pair: _group(pair[1]))
    done = 0
    for place, (_, group) in enumerate(groups):
        members = list(group)
        with bench.machines(members[0][1]) as (link, worker):
            delay_s = members[0][1].link.delay_s
            candidates, exchange_s = bench.calibrate(link, worker, members[0][1], f"calibration-{place}", delay_s)
            for number, cell in members:
                bench.tell("cells", done, len(cells), f"{cell.link.rate_bps:g} bit/s, {label(cell.slowdown)}")
                bench.measure(link, worker, cell, f"{number}", candidates, exchange_s)
                write_log(log, bench.lines)
                done += 1
    bench.tell("cells", done, len(cells), "done")
    return summarise(bench.lines)


def measure_overhead(
    bundle: Bundle,
    pixels: NDArray[Any],
    log: Path,
    *,
    effort: Effort | None = None,
) -> OverheadRow:
    """What a request takes beyond head, encode, decode and tail over plain loopback, unslowed and unshaped.

    Each plan runs `effort.requests` pictures one after another, as on a device that has one plan; the log has every
    request.

    Raises:
        LinkError: a process did not start, or ended.
    """
    bench = Bench(bundle, pixels, None, Goal(), pick_plans(), effort or Effort(), silent)
    name, warmup = "direct", bench.effort.warmup
    with bench.machines(Cell(link=unlimited()), is_direct=True) as (_, worker):
        bench.lines.append(CalibrationLine(cell=name, slowdown=Slowdown(), load=1.0, delay_s=0.0, is_direct=True))
        for plan in (c.plan for c in bench.candidates if c.plan.kind != "device"):
            images = bench.images[:warmup] + bench.images[: bench.effort.requests]
            for number, request in enumerate(worker.run(Command(plan=plan.number, images=images))):
                phase: Phase = "warmup" if number < warmup else "calibrate"
                bench.log(name, phase, number, request)
    write_log(log, bench.lines)
    return summarise(bench.lines).overheads[0]


def _group(cell: Cell) -> tuple[float, float, float, float]:
    return (cell.slowdown.fp32, cell.slowdown.int8, cell.load, cell.link.delay_s)


def unlimited(delay_s: float = 0.0) -> Link:
    """A link that does not limit the rate."""
    return Link(rate_bps=inf, delay_s=delay_s)


def silent(stage: str, done: int, total: int, text: str) -> None:
    """Tell nobody."""


class Bench:
    """One run: what is measured, by which processes, and the lines so far."""

    def __init__(
        self,
        bundle: Bundle,
        pixels: NDArray[Any],
        labels: NDArray[Any] | None,
        goal: Goal,
        pick: Pick,
        effort: Effort,
        tell: Progress,
    ) -> None:
        self.bundle = bundle
        self.candidates = menu_candidates(bundle)
        # Of each segment, for plans whose requests take several courses.
        has_exits = any(candidate.plan.exits for candidate in self.candidates)
        segments = bundle.profile().segments if has_exits else {}
        self.seconds = {name: timing.median_s for name, timing in segments.items()}
        self.pixels, self.labels = pixels, labels
        self.goal, self.pick, self.effort, self.tell = goal, pick, effort, tell
        self.lines: list[Line] = []
        self.images = pick_images(pixels, max(effort.requests, effort.calibration, 1), seed=effort.seed)
        self.chance = np.random.default_rng(effort.seed)
        with pinned(effort.places()[0]):
            self.yardstick = measure_loops()

    @contextmanager
    def machines(self, cell: Cell, *, is_direct: bool = False) -> Iterator[tuple[ShapedLink, WorkerProcess]]:
        """Edge, link and device, each in its place; all gone afterwards."""
        device_core, edge_core = self.effort.places()
        with tempfile.TemporaryDirectory(prefix="coinfer-bench-") as folder:
            pictures = Path(folder) / "pixels.npy"
            np.save(pictures, self.pixels, allow_pickle=False)
            with EdgeProcess(self.bundle.folder, core=edge_core, load=cell.load) as edge:
                at = urlsplit(edge.url)
                with ShapedLink((at.hostname or "", at.port or 0), link=unlimited()) as link:
                    url = edge.url if is_direct else f"ws://{link.host}:{link.port}"
                    with WorkerProcess(
                        self.bundle.folder,
                        pictures,
                        edge=url,
                        core=device_core,
                        timeout_s=self.effort.timeout_s,
                        yardstick=self.yardstick,
                    ) as worker:
                        if not self.lines:
                            self.lines.append(self._header(worker))
                        yield link, worker

    def _header(self, worker: WorkerProcess) -> Header:
        manifest = self.bundle.manifest
        return Header(
            coinfer=__version__,
            bundle=self.bundle.digest,
            model=manifest.model,
            data=manifest.data,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=describe_machine(),
            cores=self.effort.places(),
            seed=self.effort.seed,
            max_loss_points=self.goal.max_loss_points,
            menu=tuple(menu_plan(candidate) for candidate in self.candidates),
            ready=worker.ready,
            start_s=worker.start_s,
            yardstick=self.yardstick,
        )

    def calibrate(
        self, link: ShapedLink, worker: WorkerProcess, cell: Cell, name: str, delay_s: float
    ) -> tuple[list[Candidate], float]:
        """The menu with the times measured here, and the seconds of an exchange beyond its stages."""
        link.set(unlimited(delay_s))
        self.lines.append(CalibrationLine(cell=name, slowdown=cell.slowdown, load=cell.load, delay_s=delay_s))
        seen: dict[int, list[Request]] = {c.plan.number: [] for c in self.candidates}
        self._round(worker, cell, name, "warmup", 0, list(seen))
        for number in range(self.effort.calibration):
            self.tell("calibration", number, self.effort.calibration, label(cell.slowdown))
            going = [plan for plan, requests in seen.items() if self._wants_more(requests)]
            for request in self._round(worker, cell, name, "calibrate", number, going):
                seen[request.plan].append(request)
        candidates = [self._calibrated(c, seen[c.plan.number], cell) for c in self.candidates]
        return candidates, _exchange_s(seen, delay_s)

    def conditions(self, cell: Cell, exchange_s: float) -> Conditions:
        """What is estimated for a cell, at the powers of the bundle."""
        manifest = self.bundle.manifest
        return Conditions(
            link=cell.link,
            device=cell.slowdown,
            edge_load=cell.load,
            exchange_s=exchange_s,
            device_power_w=manifest.device_power_w,
            radio=manifest.radio,
        )

    def _calibrated(self, candidate: Candidate, requests: Sequence[Request], cell: Cell) -> Candidate:
        return calibrated(candidate, requests, cell.slowdown, cell.load, self.seconds)

    def _wants_more(self, requests: Sequence[Request]) -> bool:
        took_s = sum(request.latency_s for request in requests)
        return len(requests) < LEAST_CALIBRATION or took_s < self.effort.calibration_s

    def measure(
        self,
        link: ShapedLink,
        worker: WorkerProcess,
        cell: Cell,
        name: str,
        candidates: Sequence[Candidate],
        exchange_s: float,
    ) -> None:
        """All of one cell: who is measured, their requests with their timing in between, the finalists, a stream."""
        conditions, effort = self.conditions(cell, exchange_s), self.effort
        picks = self.pick(candidates, conditions, self.goal)
        plans = list(picks)
        rounds = effort.requests if cell.link.rate_bps >= SLOW_BPS else effort.slow_requests
        link.set(cell.link)
        for number in range(effort.warmup):
            self._round(worker, cell, name, "warmup", number, plans)
        timings: dict[int, list[Request]] = {plan: [] for plan in plans}
        seen: dict[int, list[float]] = {plan: [] for plan in plans}
        # A trace that is playing is not interrupted: its estimates are made of the calibration.
        num_timings = 0 if cell.link.trace is not None else effort.timings
        for number in range(rounds):
            if number * num_timings // rounds < (number + 1) * num_timings // rounds:
                link.set(unlimited(cell.link.delay_s))
                for request in self._round(worker, cell, name, "calibrate", number, plans):
                    timings[request.plan].append(request)
                link.set(cell.link)
            for request in self._round(worker, cell, name, "main", number, plans):
                if request.error is None:
                    seen[request.plan].append(request.latency_s)
        latest = [self._calibrated(c, timings.get(c.plan.number, []), cell) for c in candidates]
        exchange_s = _exchange_s(timings, cell.link.delay_s) or exchange_s
        line = cell_line(cell, name, candidates, conditions, self.goal, picks, latest, exchange_s)
        self.lines.append(line)
        finalists = _finalists(line.chosen, seen, candidates, self.goal)
        if effort.finalists and len(finalists) > 1:
            for number in range(rounds):
                self._round(worker, cell, name, "final", number, finalists)
        if effort.stream:
            self._stream(worker, cell, name, line)
        busy_s = worker.busy_s if effort.stream else None
        self.lines.append(MemoryLine(cell=name, rss_bytes=worker.rss_bytes, stream_busy_s=busy_s))

    def _round(
        self, worker: WorkerProcess, cell: Cell, name: str, phase: Phase, number: int, plans: Sequence[int]
    ) -> list[Request]:
        """One picture through each plan, in a random order."""
        image = self.images[number % len(self.images)]
        requests = []
        for plan in self.chance.permutation(list(plans)):
            command = Command(plan=int(plan), images=(image,), slowdown=cell.slowdown)
            requests += worker.run(command)
            self.log(name, phase, number, requests[-1])
        return requests

    def _stream(self, worker: WorkerProcess, cell: Cell, name: str, line: CellLine) -> None:
        """Many pictures through the chosen plan, overlapping."""
        expected = next(e for e in line.estimates if e.plan == line.chosen)
        period_s = max(expected.busy_s.values())
        window = full_window(expected.latency_s / period_s) if period_s > 0 else 8
        images = tuple(int(row) for row in self.chance.integers(len(self.pixels), size=self.effort.stream))
        command = Command(plan=line.chosen, images=images, slowdown=cell.slowdown, mode="stream", window=window)
        for number, request in enumerate(worker.run(command)):
            self.log(name, "stream", number, request)

    def log(self, name: str, phase: Phase, number: int, request: Request) -> None:
        """Keep one request's line."""
        truth = None if self.labels is None else int(self.labels[request.image])
        self.lines.append(RequestLine(cell=name, phase=phase, round=number, request=request, label=truth))


def full_window(under_way: float) -> int:
    """Of a stream that keeps its slowest resource busy, with so many requests under way in the mean.

    Twice what keeps that resource from ever waiting, since answers come in bursts; the edge takes 32.
    """
    return min(32, max(4, 2 * int(under_way) + 3))


def _exchange_s(seen: Mapping[int, Sequence[Request]], delay_s: float) -> float:
    """Seconds of an exchange beyond decode, tail and the delays: the median over plans; 0 where none exchanges."""
    beyond_s = [
        median(r.exchange_s - r.decode_s - r.tail_s - 2 * delay_s for r in done)
        for requests in seen.values()
        if (done := [r for r in requests if r.error is None and r.answered == "edge"])
    ]
    return max(0.0, median(beyond_s)) if beyond_s else 0.0


def _finalists(chosen: int, seen: dict[int, list[float]], candidates: Sequence[Candidate], goal: Goal) -> list[int]:
    """The chosen plan and the fastest other that keeps the accuracy limit."""
    limit = goal.max_loss_points + LOSS_TOLERANCE
    loss = {candidate.plan.number: candidate.evidence.loss_points for candidate in candidates}
    has_exits = {candidate.plan.number: bool(candidate.plan.exits) for candidate in candidates}
    rivals = {
        plan: typical(latencies, has_exits[plan])
        for plan, latencies in seen.items()
        if plan != chosen and latencies and (points := loss[plan]) is not None and points <= limit
    }
    return [chosen, min(rivals, key=lambda plan: rivals[plan])] if rivals else [chosen]
