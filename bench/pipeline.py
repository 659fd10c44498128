"""Streams, exits and what is expected of them, over a shaped link; raw logs go to docs/results/raw/pipeline.

    python -m bench.pipeline build NAME     a bundle and its workshop under out/, of bench/jobs/NAME.toml
    python -m bench.pipeline exits NAME     each way's best plan with exits beside the same without, a request at a time
    python -m bench.pipeline streams NAME   2,000 requests by each of the ways to run a stream, in turns
    python -m bench.pipeline grid NAME      rates x arrival rates x plans: estimated, simulated and measured
    python -m bench.pipeline choices NAME   what published systems would choose, and the best rates (estimated)

`python -m bench.queueing NAME` has many devices at one edge; `python -m bench.solvers NAME` times the solvers;
`python -m bench.exits` trains the exits.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import NamedTuple

import msgspec
import numpy as np

from coinfer.build.evaluate import Deployed
from coinfer.build.make import assemble, build, timed
from coinfer.bundle import Bundle
from coinfer.lab.bench import full_window, run_cells
from coinfer.lab.cell import Cell, Effort
from coinfer.lab.choose import CHOSEN, Picks, pick_plans
from coinfer.lab.record import write_log
from coinfer.lab.streams import Contender, Setting, StreamRun, Timing, by_contender, run_streams
from coinfer.plan import Candidate, Plan, Value
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.results import write_raw
from coinfer.search.estimate import as_table, estimate
from coinfer.search.goal import Goal
from coinfer.search.published import choices
from coinfer.search.solve import WAYS, best_of_ways, price_table, search
from coinfer.simulate.arrivals import periodic
from coinfer.simulate.events import Stream, simulate

from .cells import DELAY_S, OUT, Workshop, job_of, note_commit, note_machine, pictures_of, scored, show, workshop_of
from .solvers import RAW
from .tables import MAP_RATES, MAP_SLOWDOWNS

# Fixed beforehand: the cell of the streams, and those of exits.
STREAM_CELL = (1e6, 10.0)
EXIT_CELLS = ((1e6, 3.0), (1e6, 10.0), (1e6, 30.0))
GRID_RATES_BPS = (300e3, 1e6, 3e6)
# Of what a plan can sustain by its estimate; 0: as fast as it goes.
GRID_SHARES = (0.3, 0.5, 0.8, 0.0)
REQUESTS, GRID_REQUESTS, CHUNK = 2000, 400, 200
SIMULATIONS = 5
EFFORT = Effort(calibration_s=2.0, timings=40)


class Forecast(Value, frozen=True, kw_only=True):
    """What some times of a plan's stages lead to: by the estimate, and by the simulation of as many requests."""

    throughput_hz: float
    latency_s: float
    simulated_throughput_hz: float
    simulated_p95_s: float


class Expected(Value, frozen=True, kw_only=True):
    """What was expected of a contender: by its times right before the runs, and by those of the runs themselves."""

    name: str
    rate_bps: float
    slowdown: float
    plan: int
    label: str
    before: Forecast
    own: Forecast


class Family(NamedTuple):
    """A plan without exits, and the same with exits by their thresholds, the most careful first."""

    plain: Candidate
    with_exits: tuple[Candidate, ...]


def cell_of(workshop: Workshop, rate_bps: float, slowdown: float) -> Cell:
    """A cell's conditions."""
    ratio = workshop.manifest.int8_slowdown_ratio
    link = Link(rate_bps=rate_bps, delay_s=DELAY_S)
    return Cell(link=link, slowdown=Slowdown(fp32=slowdown, int8=slowdown * ratio))


def conditions_at(cell: Cell) -> Conditions:
    """The same, for estimates."""
    return Conditions(link=cell.link, device=cell.slowdown)


def measured_times(name: str) -> Workshop:
    """The workshop with its survivors timed on the quiet machine, once."""
    workshop = workshop_of(name)
    done = workshop.folder / "timed"
    if not done.is_file():
        samples = pictures_of(name).pixels[:4]
        candidates, profile = timed(
            workshop.folder, workshop.candidates, samples, workshop.manifest.outputs, progress=show
        )
        (workshop.folder / "evidence.json").write_bytes(msgspec.json.encode(candidates))
        (workshop.folder / "profile.json").write_bytes(msgspec.json.encode(profile))
        done.touch()
    return workshop_of(name)


def families(candidates: Sequence[Candidate]) -> list[Family]:
    """Every plan that is there with exits and without."""
    alive = [candidate for candidate in candidates if candidate.dropped is None]
    with_exits: dict[tuple[object, ...], list[Candidate]] = {}
    for candidate in alive:
        if candidate.plan.exits:
            with_exits.setdefault(_apart_from_exits(candidate.plan), []).append(candidate)
    found = []
    for candidate in alive:
        own = with_exits.get(_apart_from_exits(candidate.plan), [])
        if own and not candidate.plan.exits:
            found.append(Family(candidate, tuple(sorted(own, key=lambda c: c.evidence.loss_points or 0.0))))
    return found


def _apart_from_exits(plan: Plan) -> tuple[object, ...]:
    return (plan.kind, plan.variant, plan.precision, plan.cut, plan.codec, plan.tables)


def measure_exits(name: str) -> None:
    """The best plan of each way that can have exits, with and without them, beside each other in each cell."""
    workshop = measured_times(name)
    known = families(workshop.candidates)
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    cells = [cell_of(workshop, *cell) for cell in EXIT_CELLS]
    in_cells = [_best_families(known, conditions_at(cell), goal) for cell in cells]
    numbers = {c.plan.number for found in in_cells for family in found for c in (family.plain, *family.with_exits)}
    numbers.add(workshop.manifest.reference_plan)
    bundle = assemble(workshop.folder, sorted(numbers), OUT / f"{name}.exits")
    images = pictures_of(name)

    def pick(candidates: Sequence[Candidate], conditions: Conditions, goal: Goal) -> Picks:
        best = candidates[search(candidates, conditions, goal).best].plan.number
        roles: dict[int, tuple[str, ...]] = {best: (CHOSEN,)}
        for family in _best_families(families(candidates), conditions, goal):
            roles[family.plain.plan.number] = (*roles.get(family.plain.plan.number, ()), "without exits")
            for candidate in family.with_exits:
                number = candidate.plan.number
                roles[number] = (*roles.get(number, ()), f"exits of {family.plain.plan.number}")
        return roles

    note_commit(RAW, f"{name}.exits")
    note_machine(RAW)
    log, effort = RAW / f"{name}.exits.jsonl.gz", Effort(calibration_s=2.0, requests=200, finalists=False)
    run_cells(bundle, images.pixels, images.labels, cells, log, goal=goal, pick=pick, effort=effort, tell=show)
    report_exits(name, bundle, sorted(numbers))


def _best_families(known: Sequence[Family], conditions: Conditions, goal: Goal) -> list[Family]:
    table = as_table([family.plain for family in known])
    best = best_of_ways(table, price_table(table, conditions, goal))
    return [known[index] for index in dict.fromkeys(best.values())]


def report_exits(name: str, bundle: Bundle, numbers: Sequence[int]) -> None:
    """Accuracy, bytes, and the share that each exit answers, on the test part; a line for each plan."""
    images, outputs = pictures_of(name), bundle.manifest.outputs
    assert images.labels is not None
    reference = Deployed(bundle.folder, bundle.plan(bundle.manifest.reference_plan), outputs)
    right = reference.classify(images.pixels).classes == images.labels
    lines = []
    for done, number in enumerate(numbers):
        plan = bundle.plan(number)
        show("accuracy", done, len(numbers), plan.label)
        found = Deployed(bundle.folder, plan, outputs).classify(images.pixels)
        lines.append({
            "plan": number,
            "label": plan.label,
            "exits": [exit.side for exit in plan.exits],
            "shares": [float(np.mean(found.answered_by == place)) for place in range(len(plan.exits))],
            **scored(right, found.classes == images.labels, found.num_bytes),
        })  # fmt: skip
        write_raw(RAW / f"{name}.accuracy.jsonl.gz", lines)


def measure_streams(name: str) -> None:
    """The ways to run one stream, in turns: partition a request at a time, partition, device, upload, all of them.

    Partition is of the network as it is: without exits, which the last three may have.
    """
    workshop = measured_times(name)
    cell = cell_of(workshop, *STREAM_CELL)
    bundle = _bundle(name, workshop, [cell])

    def choose(setting: Setting) -> list[Contender]:
        partition = _best(setting, "latency", "split", has_exits=False)
        lone = Contender(name="partition, one at a time", plan=partition, window=1)
        fastest = _best(setting, "throughput", "split", has_exits=False)
        streams = {"device": "device", "upload": "upload", "all": None}
        return [
            lone,
            Contender(name="the same plan, pipelined", plan=partition, window=_window(setting, partition)),
            Contender(name="partition, pipelined", plan=fastest, window=_window(setting, fastest)),
            *(
                Contender(name=f"{what}, pipelined", plan=plan, window=_window(setting, plan))
                for what, kind in streams.items()
                for plan in (_best(setting, "throughput", kind),)
            ),
        ]

    note_commit(RAW, f"{name}.streams")
    note_machine(RAW)
    _run(f"{name}.streams", bundle, cell, choose, REQUESTS)


def measure_grid(name: str) -> None:
    """Every way's plan of the highest rate, at three shares of it, over three rates of the link."""
    workshop = measured_times(name)
    cells = [cell_of(workshop, rate_bps, STREAM_CELL[1]) for rate_bps in GRID_RATES_BPS]
    bundle = _bundle(name, workshop, cells)

    def choose(setting: Setting) -> list[Contender]:
        return list(_grid_of(setting))

    note_commit(RAW, f"{name}.grid")
    note_machine(RAW)
    for cell in cells:
        _run(f"{name}.grid.{cell.link.rate_bps:g}", bundle, cell, choose, GRID_REQUESTS)


def _grid_of(setting: Setting) -> Iterator[Contender]:
    plans = {way: _best(setting, "throughput", way) for way in WAYS if _has(setting, way)}
    plans["latency"] = _best(setting, "latency", None)  # type: ignore[index]
    for plan in dict.fromkeys(plans.values()):
        for share in GRID_SHARES:
            period_s = 0.0 if share == 0 else 1 / (share * setting.estimate(plan).throughput_hz)
            window = _window(setting, plan)
            yield Contender(name=f"plan {plan} at {share:g}", plan=plan, window=window, period_s=period_s)


def _bundle(name: str, workshop: Workshop, cells: Sequence[Cell]) -> Bundle:
    """A bundle of the best plans of each way in these cells, for latency and for the rate."""
    alive = [candidate for candidate in workshop.candidates if candidate.dropped is None]
    wanted = {workshop.manifest.reference_plan}
    for cell in cells:
        for minimise in ("latency", "throughput"):
            goal = Goal(minimise=minimise, max_loss_points=workshop.manifest.max_loss_points)  # type: ignore[arg-type]
            for these in (alive, [candidate for candidate in alive if not candidate.plan.exits]):
                wanted |= set(pick_plans(each=2, random=0)(these, conditions_at(cell), goal))
    return assemble(workshop.folder, sorted(wanted), OUT / f"{name}.streams")


def _has(setting: Setting, way: str) -> bool:
    return any(candidate.plan.way == way for candidate in setting.candidates)


def _best(setting: Setting, minimise: str, way: str | None, *, has_exits: bool = True) -> int:
    """The best plan of a way, or of all, with exits or without; the limit of loss is the goal's own."""
    mine = [c for c in setting.candidates if way is None or way in (c.plan.way, c.plan.kind)]
    mine = [c for c in mine if has_exits or not c.plan.exits]
    goal = Goal(minimise=minimise)  # type: ignore[arg-type]
    return mine[search(mine, setting.conditions, goal).best].plan.number


def _window(setting: Setting, plan: int) -> int:
    expected = setting.estimate(plan)
    return full_window(expected.latency_s * expected.throughput_hz)


def _run(
    log: str, bundle: Bundle, cell: Cell, choose: Callable[[Setting], Sequence[Contender]], requests: int
) -> None:
    """Run the contenders; keep every request, and what was expected of each."""
    images = pictures_of(log.partition(".")[0])
    setting, runs = run_streams(
        bundle, images.pixels, cell, choose, requests=requests, chunk=CHUNK, effort=EFFORT, tell=show
    )
    write_log(RAW / f"{log}.jsonl.gz", runs)
    write_log(RAW / f"{log}.expected.jsonl.gz", [*expected(setting, runs, cell)])


def expected(setting: Setting, runs: Sequence[StreamRun], cell: Cell) -> Iterator[Expected]:
    """What was expected of each contender."""
    for these in by_contender(runs).values():
        contender, count = these[0].contender, len(these[0].requests)
        own = [Timing(busy_s=run.busy_s, requests=run.requests) for run in these]
        yield Expected(
            name=contender.name,
            rate_bps=setting.conditions.link.rate_bps,
            slowdown=setting.conditions.device.fp32,
            plan=contender.plan,
            label=setting.candidate(contender.plan).plan.label,
            before=_forecast(setting, contender, [run.timing for run in these], cell, count),
            own=_forecast(setting, contender, own, cell, count),
        )


def _forecast(
    setting: Setting, contender: Contender, timings: Sequence[Timing], cell: Cell, count: int
) -> Forecast:
    """By these times; of the simulation the means over several runs by chance, each of `count` requests."""
    setting = setting.latest(contender.plan, timings, cell)
    found, spread = setting.estimate(contender.plan), setting.spread(contender.plan, timings)
    alone_hz = found.throughput_hz if contender.window > 1 else 1 / found.latency_s
    simulated = []
    for seed in range(SIMULATIONS):
        stream = Stream(
            plan=setting.candidate(contender.plan).plan,
            courses=setting.courses(contender.plan),
            arrivals_s=periodic(contender.period_s, count),
            conditions=setting.conditions,
            window=contender.window,
            seed=seed,
            spread=spread,
        )
        outcomes = simulate([stream], spans=False).outcomes
        makespan_s = max(outcome.end_s for outcome in outcomes) - min(outcome.start_s for outcome in outcomes)
        p95_s = float(np.percentile([outcome.end_s - outcome.start_s for outcome in outcomes], 95))
        simulated.append((count / makespan_s, p95_s))
    throughput_hz, p95_s = (float(x) for x in np.mean(simulated, axis=0))
    return Forecast(
        throughput_hz=min(alone_hz, 1 / contender.period_s) if contender.period_s else alone_hz,
        latency_s=found.latency_s,
        simulated_throughput_hz=throughput_hz,
        simulated_p95_s=p95_s,
    )


def choices_of(name: str) -> None:
    """What each system chooses, and the highest rate of each way, over the map; nothing is measured."""
    workshop = measured_times(name)
    main_name = next(c.plan.variant for c in workshop.candidates if c.plan.number == workshop.manifest.reference_plan)
    alive = [candidate for candidate in workshop.candidates if candidate.dropped is None]
    table, lines = as_table(alive), list[dict[str, object]]()
    latency, rate = (
        Goal(minimise=minimise, max_loss_points=workshop.manifest.max_loss_points)  # type: ignore[arg-type]
        for minimise in ("latency", "throughput")
    )
    for slowdown, rate_bps in product(MAP_SLOWDOWNS, MAP_RATES):
        conditions = conditions_at(cell_of(workshop, rate_bps, slowdown))
        cell = {"rate_bps": rate_bps, "slowdown": slowdown}
        for system, chosen in choices(workshop.candidates, main_name, conditions, latency).items():
            found = estimate(chosen, conditions)
            lines.append({
                **cell, "system": system, "label": chosen.plan.label, "way": chosen.plan.way,
                "latency_s": found.latency_s, "loss_points": chosen.evidence.loss_points,
            })  # fmt: skip
        priced = price_table(table, conditions, rate)
        for way, index in best_of_ways(table, priced).items():
            lines.append({**cell, "fastest": way, "throughput_hz": estimate(alive[index], conditions).throughput_hz})
    note_commit(RAW, f"{name}.choices")
    note_machine(RAW)
    write_raw(RAW / f"{name}.choices.jsonl.gz", lines)


def main(words: list[str]) -> None:
    """Run one step."""
    steps: dict[str, Callable[[str], object]] = {
        "build": lambda name: build(job_of(name), OUT / name, progress=show),
        "exits": measure_exits,
        "streams": measure_streams,
        "grid": measure_grid,
        "choices": choices_of,
    }
    if len(words) != 2 or words[0] not in steps:
        raise SystemExit(f"usage: python -m bench.pipeline {'|'.join(steps)} NAME")
    steps[words[0]](words[1])


if __name__ == "__main__":
    main(sys.argv[1:])
