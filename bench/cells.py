"""Cells of link rate and device slowdown: build a network's bundle, measure its plans side by side, keep the raw logs.

A NAME is a job file in bench/jobs.  What is measured in a cell: the chosen plan, the best of each way, the best split
of the unmodified network, the three best estimates of each way, and three at random among all that survived the build.
So the bundle that is measured holds many more plans than the menu.
"""

from __future__ import annotations

import datetime
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from coinfer.build.evaluate import Deployed, loss_of, proportion_ci
from coinfer.build.job import Job, load_job
from coinfer.build.make import assemble, timed
from coinfer.bundle import Bundle, Manifest
from coinfer.data import Images, load_source
from coinfer.engine.measure import describe_machine
from coinfer.lab.bench import run_cells
from coinfer.lab.cell import Cell, Effort
from coinfer.lab.choose import pick_plans
from coinfer.lab.record import read_log
from coinfer.lab.summary import summarise
from coinfer.plan import Candidate
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.results import read_raw, write_raw
from coinfer.search.goal import Goal
from coinfer.search.menu import at

OUT = Path("out")
DELAY_S = 0.005
RANDOM_PLANS = 12


class Study(NamedTuple):
    """One network to be measured: its job file's name, (rate, slowdown) of its cells, where its raw logs go."""

    name: str
    cells: tuple[tuple[float, float], ...]
    raw: Path
    requests: int = 30


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


def unmodified(manifest: Manifest) -> str:
    """The unmodified network's name."""
    return next(plan.variant for plan in manifest.menu if plan.number == manifest.reference_plan)


def contenders(study: Study, workshop: Workshop) -> list[int]:
    """Plans to measure somewhere: the best estimates of every way in every cell, and some at random."""
    alive = [c for c in workshop.candidates if c.dropped is None]
    pick = pick_plans(each=3, random=0, networks=[unmodified(workshop.manifest)])
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    chosen: set[int] = set()
    for rate_bps, slowdown in study.cells:
        chosen.update(pick(alive, conditions_of(workshop.manifest, rate_bps, slowdown), goal))
    rest = [c.plan.number for c in alive if c.plan.number not in chosen]
    drawn = np.random.default_rng(0).permutation(np.array(rest, dtype=np.int64))[:RANDOM_PLANS]
    return sorted(chosen | {int(number) for number in drawn})


def measure(study: Study) -> None:
    """Time the survivors on the quiet machine, then cells and reported accuracy."""
    name, raw = study.name, study.raw
    workshop = workshop_of(name)
    samples = pictures_of(name).pixels[:4]
    candidates, profile = timed(workshop.folder, workshop.candidates, samples, workshop.manifest.outputs, progress=show)
    (workshop.folder / "evidence.json").write_bytes(msgspec.json.encode(candidates))
    (workshop.folder / "profile.json").write_bytes(msgspec.json.encode(profile))
    workshop = workshop_of(name)
    numbers = contenders(study, workshop)
    print(f"{name}: {len(numbers)} plans to measure of {len(workshop.manifest.menu)} survivors", flush=True)
    bundle = assemble(workshop.folder, numbers, OUT / f"{name}.bench")
    note_commit(raw, name)
    write_raw(raw / f"{name}.candidates.jsonl.gz", [_evidence_line(c) for c in candidates if c.dropped is None])
    images = pictures_of(name)
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    ratio = workshop.manifest.int8_slowdown_ratio
    cells = [
        Cell(link=Link(rate_bps=rate_bps, delay_s=DELAY_S), slowdown=Slowdown(fp32=slow, int8=slow * ratio))
        for rate_bps, slow in study.cells
    ]
    effort = Effort(calibration_s=2.0, requests=study.requests)
    log = raw / f"{name}.cells.jsonl.gz"
    pick = pick_plans(networks=[unmodified(workshop.manifest)])
    run_cells(bundle, images.pixels, images.labels, cells, log, goal=goal, pick=pick, effort=effort, tell=show)
    report_accuracy(study, bundle, images)


def report_accuracy(study: Study, bundle: Bundle, images: Images) -> None:
    """Accuracy on the test part of every plan that a cell chose or held as a baseline, one line a plan."""
    summary = summarise(read_log(study.raw / f"{study.name}.cells.jsonl.gz"))
    wanted = {bundle.manifest.reference_plan}
    for cell in summary.cells:
        wanted |= {cell.chosen.plan, cell.best, *cell.baselines.values()}
    outputs = bundle.manifest.outputs
    own = Deployed(bundle.folder, bundle.plan(bundle.manifest.reference_plan), outputs)
    reference = own.classify(images.pixels).classes
    truth = reference if images.labels is None else images.labels
    lines: list[dict[str, Any]] = []
    for number in sorted(wanted):
        plan = bundle.plan(number)
        show("accuracy", len(lines), len(wanted), plan.label)
        classes, num_bytes, _ = Deployed(bundle.folder, plan, outputs).classify(images.pixels)
        named = {"plan": number, "label": plan.label, "is_agreement": images.labels is None}
        lines.append(named | scored(reference == truth, classes == truth, num_bytes))
    write_raw(study.raw / f"{study.name}.accuracy.jsonl.gz", lines)


def scored(reference: NDArray[np.bool_], right: NDArray[np.bool_], num_bytes: NDArray[np.int64]) -> dict[str, Any]:
    """Accuracy, loss and payload bytes of one plan, from which pictures it and the unmodified network get right."""
    loss, loss_ci = loss_of(reference, right)
    return {
        "n": len(right),
        "accuracy": 100 * float(np.mean(right)),
        "accuracy_ci": proportion_ci(right),
        "loss_points": loss,
        "loss_ci_points": loss_ci,
        "payload_bytes": float(np.mean(num_bytes)),
        "payload_bytes_p95": float(np.percentile(num_bytes, 95)),
    }


def note_commit(raw: Path, name: str) -> None:
    """Keep which commit measured what is logged under this name."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    path = raw / "commits.json"
    known = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.is_file() else {}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(msgspec.json.format(msgspec.json.encode(known | {name: commit}), indent=1) + b"\n")


def note_machine(raw: Path, of: str = "") -> None:
    """Keep when and on what machine the latest was measured of what is logged there, `of` one part of it."""
    path = raw / "machine.jsonl.gz"
    machine = describe_machine()
    today = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    what = f"{machine.processor}, {machine.cores} cores, {machine.system}"
    others = [line for line in (read_raw(path) if of and path.is_file() else []) if line["of"] != of]
    write_raw(path, [*others, {"of": of, "date": today, "machine": what}])


def _evidence_line(candidate: Candidate) -> dict[str, Any]:
    return dict(msgspec.to_builtins(candidate))
