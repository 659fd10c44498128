"""The main job's tables: build, measure over a shaped link, report on images that no choice has seen.

    python -m bench.main_job build NAME     a bundle and its workshop under out/
    python -m bench.main_job measure NAME   cells, reported accuracy; raw logs under docs/results/raw/main-job/
    python -m bench.main_job streams NAME   streams and overhead of a network that was measured
    python -m bench.main_job all            every NAME; then `python -m bench.results` makes the tables

A NAME is a job file in bench/jobs.  What is measured in a cell: the chosen plan, the best of each kind, the
three best estimates of each kind, and three at random among all that survived the build.  So the bundle that is
measured holds many more plans than the menu.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.build.evaluate import Deployed, loss_of, proportion_ci
from coinfer.build.job import Job, load_job
from coinfer.build.make import assemble, build, timed
from coinfer.bundle import Bundle, Manifest, load_bundle
from coinfer.data import Images, load_source
from coinfer.lab.bench import measure_overhead, run_cells
from coinfer.lab.cell import Cell, Effort
from coinfer.lab.choose import fixed_plans, pick_plans
from coinfer.lab.record import read_log
from coinfer.lab.summary import summarise
from coinfer.plan import Candidate
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.results import write_raw
from coinfer.search.goal import Goal
from coinfer.search.menu import at
from coinfer.search.solve import baselines

RAW = Path("docs/results/raw/main-job")
OUT = Path("out")
RATES_BPS = (30e3, 100e3, 300e3, 1e6, 3e6, 10e6, 30e6, 100e6)
SLOWDOWNS = (3.0, 30.0, 100.0)
MAP_CELLS = (
    *((rate, 3.0) for rate in (300e3, 1e6, 10e6, 100e6)),
    *((rate, 10.0) for rate in (1e6, 10e6, 30e6, 100e6)),
    *((rate, 30.0) for rate in (1e6, 3e6, 10e6, 30e6)),
)
CELLS: dict[str, tuple[tuple[float, float], ...]] = {
    "scenes": tuple((rate, slowdown) for slowdown in SLOWDOWNS for rate in RATES_BPS),
    "resnet20": tuple((rate, slowdown) for slowdown in SLOWDOWNS for rate in RATES_BPS),
    "resnet56": tuple((rate, slowdown) for slowdown in SLOWDOWNS for rate in RATES_BPS),
    "mobilenetv2": MAP_CELLS,
}
# Larger pictures take seconds each on the slow links.
REQUESTS = {"mobilenetv2": 12, "scenes": 15}
DELAY_S = 0.005
RANDOM_PLANS = 12
STREAM = 500


class Workshop(msgspec.Struct):
    """What a finished build left: its candidates, the manifest of all survivors, its folder."""

    folder: Path
    candidates: list[Candidate]
    manifest: Manifest


def job_of(name: str) -> Job:
    """The job file of that name."""
    return load_job(Path(__file__).parent / "jobs" / f"{name}.toml")


def workshop_of(name: str) -> Workshop:
    """The workshop of a finished build."""
    folder = OUT / f"{name}.work"
    return Workshop(
        folder,
        msgspec.json.decode((folder / "evidence.json").read_bytes(), type=list[Candidate]),
        msgspec.json.decode((folder / "manifest.json").read_bytes(), type=Manifest),
    )


def pictures_of(name: str) -> Images:
    """The test part, without its labels where the job does without."""
    data = job_of(name).data
    return load_source(data.source, size=data.size, holdout=data.holdout, labels=data.labels).images("test")


def show(stage: str, done: int, total: int, detail: str, *, last: list[Any] = ["", 0.0]) -> None:  # noqa: B006
    """Progress: a line for each stage, and one every quarter of a minute."""
    if stage != last[0] or done == total or time.monotonic() > last[1] + 15:
        print(f"{time.strftime('%H:%M:%S')} {stage} {done}/{total} {detail}", flush=True)
        last[:] = stage, time.monotonic()


def conditions_of(manifest: Manifest, rate_bps: float, slowdown: float) -> Conditions:
    """A cell's conditions."""
    base = Conditions(link=Link(rate_bps=rate_bps, delay_s=DELAY_S))
    return at(base, rate_bps, slowdown, 1.0, int8_ratio=manifest.int8_slowdown_ratio)


def contenders(name: str, workshop: Workshop) -> list[int]:
    """Plans to measure somewhere: the best estimates of every kind in every cell, and some at random."""
    alive = [c for c in workshop.candidates if c.dropped is None]
    pick = pick_plans(each=3, random=0)
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    chosen: set[int] = set()
    for rate_bps, slowdown in CELLS[name]:
        chosen.update(pick(alive, conditions_of(workshop.manifest, rate_bps, slowdown), goal))
    rest = [c.plan.number for c in alive if c.plan.number not in chosen]
    drawn = np.random.default_rng(0).permutation(np.array(rest, dtype=np.int64))[:RANDOM_PLANS]
    return sorted(chosen | {int(number) for number in drawn})


def measure(name: str) -> None:
    """Time the survivors on the quiet machine, then cells and reported accuracy."""
    workshop = workshop_of(name)
    samples = pictures_of(name).pixels[:4]
    candidates, profile = timed(
        workshop.folder, workshop.candidates, samples, workshop.manifest.outputs, progress=show
    )
    (workshop.folder / "evidence.json").write_bytes(msgspec.json.encode(candidates))
    (workshop.folder / "profile.json").write_bytes(msgspec.json.encode(profile))
    workshop = workshop_of(name)
    numbers = contenders(name, workshop)
    print(f"{name}: {len(numbers)} plans to measure of {len(workshop.manifest.menu)} survivors", flush=True)
    bundle = assemble(workshop.folder, numbers, OUT / f"{name}.bench")
    _note_commit(name)
    write_raw(RAW / f"{name}.candidates.jsonl.gz", [_evidence_line(c) for c in candidates if c.dropped is None])
    images = pictures_of(name)
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    ratio = workshop.manifest.int8_slowdown_ratio
    cells = [
        Cell(link=Link(rate_bps=rate_bps, delay_s=DELAY_S), slowdown=Slowdown(fp32=slow, int8=slow * ratio))
        for rate_bps, slow in CELLS[name]
    ]
    effort = Effort(calibration_s=2.0, requests=REQUESTS.get(name, 30))
    log = RAW / f"{name}.cells.jsonl.gz"
    run_cells(bundle, images.pixels, images.labels, cells, log, goal=goal, effort=effort, tell=show)
    report_accuracy(name, bundle, images)


def streams_and_overhead(name: str) -> None:
    """Streams, and what a request takes beyond its stages, of a network that was measured."""
    images, bundle = pictures_of(name), load_bundle(OUT / f"{name}.bench")
    streams(workshop_of(name), bundle, images)
    measure_overhead(bundle, images.pixels, RAW / "overhead.jsonl.gz")


def streams(workshop: Workshop, bundle: Bundle, images: Images) -> None:
    """500 pictures in a device-bound, a link-bound and an unslowed edge-bound cell.

    Each by a bundle of that one plan, so that its times are calibrated as warm as the stream runs.
    """
    ratio = bundle.manifest.int8_slowdown_ratio
    goal = Goal(max_loss_points=bundle.manifest.max_loss_points)
    alive = {c.plan.number: c for c in bundle.candidates()}
    candidates = [alive[plan.number] for plan in bundle.manifest.menu]
    cells = {"device": (100e6, 30.0, "split"), "link": (300e3, 3.0, "upload"), "edge": (1e9, 1.0, "upload")}
    for bound, (rate_bps, slowdown, kind) in cells.items():
        conditions = conditions_of(bundle.manifest, rate_bps, slowdown)
        best = candidates[baselines(candidates, conditions, goal)[kind]].plan.number  # type: ignore[index]
        device = Slowdown() if slowdown == 1 else Slowdown(fp32=slowdown, int8=slowdown * ratio)
        cell = Cell(link=conditions.link, slowdown=device)
        log = RAW / f"stream-{bound}.jsonl.gz"
        effort = Effort(stream=STREAM, requests=10, slow_requests=10, finalists=False)
        pick = fixed_plans(best)
        alone = assemble(workshop.folder, [best], OUT / f"stream-{bound}")
        run_cells(alone, images.pixels, images.labels, [cell], log, goal=goal, pick=pick, effort=effort, tell=show)


def report_accuracy(name: str, bundle: Bundle, images: Images) -> None:
    """Accuracy on the test part of every plan that a cell chose or held as a baseline, one line a plan."""
    summary = summarise(read_log(RAW / f"{name}.cells.jsonl.gz"))
    wanted = {bundle.manifest.reference_plan}
    for cell in summary.cells:
        wanted |= {cell.chosen.plan, cell.best, *cell.baselines.values()}
    reference, _ = Deployed(bundle.folder, bundle.plan(bundle.manifest.reference_plan)).classify(images.pixels)
    truth = reference if images.labels is None else images.labels
    lines: list[dict[str, Any]] = []
    for number in sorted(wanted):
        plan = bundle.plan(number)
        show("accuracy", len(lines), len(wanted), plan.label)
        classes, num_bytes = Deployed(bundle.folder, plan).classify(images.pixels)
        loss, loss_ci = loss_of(reference == truth, classes == truth)
        lines.append(
            {
                "plan": number,
                "label": plan.label,
                "n": len(classes),
                "is_agreement": images.labels is None,
                "accuracy": 100 * float(np.mean(classes == truth)),
                "accuracy_ci": proportion_ci(classes == truth),
                "loss_points": loss,
                "loss_ci_points": loss_ci,
                "payload_bytes": float(np.mean(num_bytes)),
                "payload_bytes_p95": float(np.percentile(num_bytes, 95)),
            }
        )
    write_raw(RAW / f"{name}.accuracy.jsonl.gz", lines)


def _note_commit(name: str) -> None:
    """Keep which commit measured this network."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    path = RAW / "commits.json"
    known = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(known | {name: commit}), indent=1) + b"\n")


def _evidence_line(candidate: Candidate) -> dict[str, Any]:
    return dict(msgspec.to_builtins(candidate))


def main(words: list[str]) -> None:
    """Run one step."""
    steps: dict[str, Callable[[str], object]] = {
        "build": lambda name: build(job_of(name), OUT / name, progress=show),
        "measure": measure,
        "streams": streams_and_overhead,
    }
    if words == ["all"]:
        for step in ("build", "measure"):
            for name in CELLS:
                steps[step](name)
        steps["streams"]("resnet56")
        return
    if len(words) != 2 or words[0] not in steps or words[1] not in CELLS:
        raise SystemExit(f"usage: python -m bench.main_job build|measure|streams {'|'.join(CELLS)}, or all")
    steps[words[0]](words[1])


if __name__ == "__main__":
    main(sys.argv[1:])
