"""Job in, bundle out: prepare, weigh, classify in rounds, choose the menu, report on unseen images.

    prepare      capture and export every network, fp32 and int8                  workshop
    variants     prune, train units; within the job's limits                      variants
    drafts       every candidate there is                                         drafts
    weigh, time  bytes, coding times, segments timed as deployed                  measured
    rounds       accuracy on 250 images, then 1,000, then all; drop what is beaten  rounds
    exits        what is left of networks with exits, again with them              exits
    menu         what wins somewhere over the grid of conditions                  search.menu
    assemble     the menu's files into a bundle; accuracy on test images          here

The workshop keeps every survivor's segments and tables, so that `assemble` can make a bundle of other
plans later (a benchmark measures candidates that are on no menu).
"""

from __future__ import annotations

import datetime
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

from .. import __version__
from ..bundle import FORMAT, Ancestry, Bundle, Manifest, load_bundle, new_folder, write_manifest
from ..data import Images
from ..engine.measure import allowed_cores, pinned
from ..engine.plans import time_batches, time_plans
from ..errors import BundleError, PlanError
from ..plan import Candidate, Evidence, Plan, TensorSpec
from ..profile import Profile
from ..protocol import reply_bytes
from ..search.machines import with_profiles
from ..search.menu import menu
from ..search.planmap import built_goal, plan_map
from .drafts import Draft, all_drafts
from .evaluate import Deployed, evidence_of, loss_of, proportion_ci
from .exits import with_exits
from .job import Job, conditions_of, goal_of
from .measured import Tables, calibrate_and_weigh, store_tables
from .progress import Progress, quiet
from .rounds import (
    Answers,
    classify_splits,
    classify_wholes,
    drop_dominated,
    drop_hopeless,
    drop_outdone,
    keep_rivals,
)
from .timing import int8_ratio_of, time_segments
from .variants import add_variants
from .workshop import Workshop, prepare

# Seconds that an exchange over the link takes beyond its stages; `runtime.exchange` measures it.
Exchange = Callable[[Bundle], float]


def build(
    job: Job,
    out: Path,
    *,
    work: Path | None = None,
    progress: Progress = quiet,
    data_dir: Path | None = None,
    exchange: Exchange | None = None,
) -> Bundle:
    """Build the job's bundle at `out`; the workshop lies at `work` (default: beside it, `out`.work).

    `exchange` measures the finished bundle before it appears at `out`; without it an exchange costs nothing.

    Raises:
        CoinferError: the job, its model or its data do not fit; nothing is left at `out` then.
    """
    work = work or out.with_name(out.name + ".work")
    workshop = prepare(job, work, progress=progress, data_dir=data_dir)
    add_variants(workshop, progress=progress)
    drafts = all_drafts(workshop)
    with pinned(next(iter(allowed_cores()), None)):
        predicted = time_segments(workshop, drafts, repeats=7, progress=progress)
    tables = calibrate_and_weigh(workshop, drafts, progress=progress)
    int8_ratio = int8_ratio_of(workshop, drafts)
    log = [*workshop.notes, f"{len(drafts)} candidates", *filter(None, [predicted.note])]
    if job.build.keep_all:
        reference = _classified(workshop, drafts, tables, progress)
    else:
        reference = _rounds(workshop, drafts, tables, int8_ratio, log, progress)
    for draft in (d for d in drafts if d.dropped is None):
        store_tables(workshop, draft, tables)
    candidates = [_candidate(workshop, draft, reference.is_right) for draft in drafts]
    conditions = conditions_of(job, int8_ratio=int8_ratio)
    candidates += with_exits(
        workshop, candidates, reference.is_right, reference.truth, conditions, progress=progress
    )
    samples = np.ascontiguousarray(workshop.validation.pixels[:4])
    alive = [c.plan for c in candidates if c.dropped is None]
    workshop.keep_segments({name for plan in alive for name in plan.segments})
    candidates, profile = timed(work, candidates, samples, workshop.outputs, progress=progress)
    errors = predicted.errors({name: timing.median_s for name, timing in profile.segments.items()})
    if errors is not None:
        log.append(f"predicted times of surviving segments against measured: {errors.text}")
    goal = goal_of(job)
    chosen = menu(candidates, goal, int8_ratio=int8_ratio, base=conditions, also=(conditions,))
    main = next(c for c in candidates if c.plan.head == workshop.whole_name(workshop.main, "fp32"))
    manifest = _manifest(workshop, candidates, main, int8_ratio)
    (work / "log.txt").write_text("\n".join(log) + "\n")
    _save(work / "manifest.json", manifest)
    _save(work / "evidence.json", candidates)
    _save(work / "profile.json", profile)
    _save(work / "networks.json", {name: network.ancestry for name, network in workshop.networks.items()})
    save_file({"pixels": samples}, work / "samples.safetensors")
    numbers = sorted({candidates[index].plan.number for index in chosen} | {main.plan.number})
    images = workshop.source.drawn("test", job.build.report_images)
    return assemble(work, numbers, out, images=images, progress=progress, exchange=exchange)


def _classified(workshop: Workshop, drafts: list[Draft], tables: Tables, progress: Progress) -> Answers:
    """Every draft on all images, none dropped; what whole networks say to them."""
    for draft in drafts:
        draft.is_rival = True
    answers = classify_wholes(workshop, drafts, tables, workshop.validation, progress=progress)
    classify_splits(workshop, drafts, tables, workshop.validation, answers, progress=progress)
    return answers


def _rounds(
    workshop: Workshop,
    drafts: list[Draft],
    tables: Tables,
    int8_ratio: float,
    log: list[str],
    progress: Progress,
) -> Answers:
    images, goal = workshop.validation, workshop.job.goal
    limit, is_stream = goal.max_loss, goal.minimise == "throughput"
    keep_rivals(drafts, int8_ratio, workshop.main)
    early = drop_dominated(drafts, 0, int8_ratio, is_stream=is_stream)
    log.append(f"{early} dropped before any image")
    answers = classify_wholes(workshop, drafts, tables, images, progress=progress)
    if goal.minimise == "latency" and (goal.max_energy, goal.max_size, goal.max_memory) == (None, None, None):
        outdone = drop_outdone(drafts, answers, limit, int8_ratio)
        log.append(f"{len(images)} images: {outdone} splits outdone by device and upload")
    for count in sorted({min(n, len(images)) for n in workshop.job.build.rounds}):
        classify_splits(workshop, drafts, tables, images.pick(slice(count)), answers, progress=progress)
        hopeless = drop_hopeless(drafts, answers.is_right[:count], limit)
        beaten = drop_dominated(
            drafts,
            count,
            int8_ratio,
            reference=answers.is_right,
            max_loss_points=limit,
            max_device_bytes=math.inf if goal.max_size is None else goal.max_size,
            max_device_memory_bytes=math.inf if goal.max_memory is None else goal.max_memory,
            is_stream=is_stream,
        )
        left = sum(draft.dropped is None for draft in drafts)
        log.append(f"{count} images: {hopeless} hopeless, {beaten} beaten, {left} left")
    return answers


def timed(
    folder: Path,
    candidates: list[Candidate],
    pictures: NDArray[np.uint8],
    outputs: tuple[TensorSpec, ...],
    *,
    progress: Progress = quiet,
) -> tuple[list[Candidate], Profile]:
    """Candidates with the times of this machine, as it is now, for all that were not dropped; and its Profile.

    Args:
        folder: where the segments and tables lie.
        candidates: their evidence's times are replaced.
        pictures: (N, H, W, C), real ones, for the codecs' times.
        outputs: the network's output tensors.
    """
    alive = [c.plan for c in candidates if c.dropped is None]
    profile = time_plans(
        lambda name: folder / name,
        alive,
        pictures,
        outputs,
        core=next(iter(allowed_cores()), None),
        progress=lambda done, total, label: progress("timing", done, total, label),
    )
    return with_profiles(candidates, device=profile, edge=profile), profile


def _candidate(workshop: Workshop, draft: Draft, reference: NDArray[np.bool_]) -> Candidate:
    count = len(draft.correct)
    loss, loss_ci = loss_of(reference[:count], draft.correct) if count else (None, None)
    evidence = Evidence(
        split="validation",
        num_images=count,
        accuracy=100 * float(np.mean(draft.correct)) if count else None,
        accuracy_ci=proportion_ci(draft.correct) if count else None,
        loss_points=loss,
        loss_ci_points=loss_ci,
        payload_bytes=draft.payload_bytes,
        payload_bytes_p95=draft.payload_bytes_p95,
        payload_bytes_p50=draft.payload_bytes_p50,
        reply_bytes=0.0 if draft.plan.kind == "device" else reply_bytes(draft.plan, workshop.outputs),
        head_s=draft.head_s,
        encode_s=draft.encode_s,
        decode_s=draft.decode_s,
        tail_s=draft.tail_s,
        device_bytes=draft.device_bytes,
        device_memory_bytes=draft.device_memory_bytes,
        bytes_how="measured" if draft.bytes_how == "measured" else "estimated",
        times_how="estimated" if draft.is_time_predicted else "measured",
    )
    return Candidate(plan=draft.plan, evidence=evidence, dropped=draft.dropped)


def _manifest(workshop: Workshop, candidates: list[Candidate], main: Candidate, int8_ratio: float) -> Manifest:
    job, source = workshop.job, workshop.source
    conditions = conditions_of(job, int8_ratio=int8_ratio)
    return Manifest(
        format=FORMAT,
        coinfer=__version__,
        model=job.model.source,
        data=source.name,
        created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        input=workshop.input,
        outputs=workshop.outputs,
        preprocess=workshop.preprocess,
        classes=tuple(source.classes),
        goal=job.goal.minimise,
        max_loss_points=job.goal.max_loss,
        reference_plan=main.plan.number,
        reference_accuracy=main.evidence.accuracy or 0.0,
        is_agreement=workshop.validation.labels is None,
        int8_slowdown_ratio=int8_ratio,
        device_power_w=conditions.device_power_w,
        radio=conditions.radio,
        max_energy_j=job.goal.max_energy,
        max_device_bytes=job.goal.max_size,
        max_device_memory_bytes=job.goal.max_memory,
        holdout=job.data.holdout,
        conditions=conditions,
        cuts=tuple(cut.name for cut in workshop.whole(workshop.main, "fp32").cuts),
        weights_sha256={name: network.ancestry.weights_sha256 for name, network in workshop.networks.items()},
        menu=tuple(c.plan for c in candidates if c.dropped is None),
        files={},
    )


def assemble(
    work: Path,
    numbers: list[int],
    out: Path,
    *,
    images: Images | None = None,
    progress: Progress = quiet,
    exchange: Exchange | None = None,
) -> Bundle:
    """A bundle at `out` with these plans of a finished workshop; with `images`, accuracy on them is reported.

    `exchange`: as in `build`.

    Raises:
        BundleError: `work` is not a finished workshop.
        PlanError: a number that no surviving candidate has.
    """
    if not (work / "manifest.json").is_file():
        raise BundleError(f"{work} is not a finished workshop: run `coinfer build` first")
    manifest = msgspec.json.decode((work / "manifest.json").read_bytes(), type=Manifest)
    candidates = msgspec.json.decode((work / "evidence.json").read_bytes(), type=list[Candidate])
    survivors = {plan.number: plan for plan in manifest.menu}
    missing = [number for number in numbers if number not in survivors]
    if missing:
        raise PlanError(f"plans {missing} did not survive the build, so their files do not exist (workshop {work})")
    plans = tuple(survivors[number] for number in sorted({*numbers, manifest.reference_plan}))
    by_number = {candidate.plan.number: candidate for candidate in candidates}
    if images is not None:
        candidates = _reported(work, manifest.reference_plan, manifest.outputs, candidates, plans, images, progress)
    with new_folder(out) as folder:
        for name in sorted({n for plan in plans for n in _files_of(by_number[plan.number])}):
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(work / name, folder / name)
        _save(folder / "evidence.json", candidates)
        _save(folder / "networks.json", _ancestors(work, plans))
        for name in ("profile.json", "samples.safetensors"):
            shutil.copyfile(work / name, folder / name)
        _add_batches(folder, plans, manifest.outputs)
        manifest, base = msgspec.structs.replace(manifest, menu=plans), manifest.conditions
        if exchange is not None:
            progress("exchange", 0, 1, "loopback")
            write_manifest(folder, manifest)
            bundle = load_bundle(folder)
            exchange_s = exchange(bundle)
            _save(folder / "profile.json", msgspec.structs.replace(bundle.profile(), exchange_s=exchange_s))
            base = None if base is None else msgspec.structs.replace(base, exchange_s=exchange_s)
            progress("exchange", 1, 1, "")
        if base is not None:
            on_menu = [by_number[plan.number] for plan in plans]
            _save(folder / "map.json", plan_map(on_menu, built_goal(manifest), base))
        write_manifest(folder, manifest)
    return load_bundle(out)


def _add_batches(folder: Path, plans: Sequence[Plan], outputs: tuple[TensorSpec, ...]) -> None:
    """Time the edge's segments of the menu for whole batches, and add that to the bundle's profile."""
    profile = msgspec.json.decode((folder / "profile.json").read_bytes(), type=Profile)
    samples = load_file(folder / "samples.safetensors")["pixels"]
    core = next(iter(allowed_cores()), None)
    batches = time_batches(lambda name: folder / name, plans, samples, outputs, core=core)
    _save(folder / "profile.json", msgspec.structs.replace(profile, batches=batches))


def _files_of(candidate: Candidate) -> set[str]:
    """What a bundle needs for a plan: its segments and tables, and what its exits did to every image."""
    files = (*candidate.plan.segments, candidate.plan.tables, candidate.evidence.exit_file)
    return {name for name in files if name is not None}


def _ancestors(work: Path, plans: Sequence[Plan]) -> dict[str, Ancestry]:
    """How the networks of these plans were made, and those that they were made of."""
    known = msgspec.json.decode((work / "networks.json").read_bytes(), type=dict[str, Ancestry])
    found: dict[str, Ancestry] = {}
    for plan in plans:
        name: str | None = plan.variant
        while name is not None:
            found[name] = known[name]
            name = known[name].base
    return found


def _reported(
    work: Path,
    reference_plan: int,
    outputs: tuple[TensorSpec, ...],
    candidates: list[Candidate],
    plans: tuple[Plan, ...],
    images: Images,
    progress: Progress,
) -> list[Candidate]:
    """Candidates with accuracy on test images, for the plans of the menu."""
    wanted = {plan.number for plan in plans}
    by_number = {c.plan.number: c for c in candidates}
    reference = Deployed(work, by_number[reference_plan].plan, outputs).classify(images.pixels).classes
    result = []
    for done, candidate in enumerate(candidates):
        if candidate.plan.number in wanted:
            progress("report", done, len(candidates), candidate.plan.label)
            found = Deployed(work, candidate.plan, outputs).classify(images.pixels)
            reported = evidence_of(candidate, found, reference, images.labels)
            candidate = msgspec.structs.replace(candidate, reported=reported)
        result.append(candidate)
    return result


def _save(path: Path, value: object) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_bytes(msgspec.json.format(msgspec.json.encode(value), indent=1))
    temporary.replace(path)
