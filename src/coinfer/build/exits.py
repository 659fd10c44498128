"""Exits of a job: trained at cuts, tried with every plan that is left, each with thresholds for so much loss.

    train_exits_of    classifiers at the job's cuts; with joint epochs the network trained with them as one more network
    with_exits        plans that survived, again with exits: thresholds looked up in what every image did at every exit

What a plan does at its exits is found out once, image by image, in its deployed form: the trial plan has exits that
never answer.  Accuracy, shares and bytes of any thresholds are then looked up (`exits.ExitEvidence`), never run again.
"""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ..compress.batches import Views
from ..compress.exit_file import TrainedExits, load_exits, save_exits
from ..compress.exits import (
    VERSIONS,
    ExitRecipe,
    ExitSpec,
    WithExits,
    check_cuts,
    temperature_of,
    train_exits,
    train_jointly,
)
from ..engine.measure import allowed_cores
from ..engine.plans import time_plans
from ..errors import Infeasible, JobError, ModelError
from ..exits import NEVER, ExitEvidence, certainty, choose, save_evidence
from ..model.cut import Cut
from ..model.graph import TOLERANCE, Graph, first_of
from ..model.onnx_memory import memory_of_all
from ..plan import SEVERAL, Candidate, Evidence, Exit, ExitRule, Plan, Side
from ..profile import Conditions
from ..search.goal import Objective
from ..stages import RESOURCES, Work, courses_of, price
from .evaluate import Deployed, loss_of, proportion_ci
from .progress import Progress, of_training
from .sections import ExitsJob, usual_shift
from .teachers import Teachers
from .workshop import Workshop

_TIMED = 10


def train_exits_of(workshop: Workshop, teachers: Teachers, *, progress: Progress) -> None:
    """Train the exits that the job asks for, or find them trained, and give them to the workshop's networks.

    Raises:
        JobError: a cut pattern fits nothing.
        CutError, ModelError: there can be no exit, see `check_cuts`.
    """
    job, graph = workshop.job.exits, workshop.graph
    for file in job.files:
        _give(workshop, load_exits(Path(file), graph, network=workshop.main_sha256))
    if not job.cuts:
        return
    cuts = _cuts(job, graph)
    check_cuts(graph, cuts)
    spec, recipe = ExitSpec(width=job.width, depth=job.depth), _recipe(job, graph)
    views = Views(is_mirrored=job.mirror, mixes=job.mixes)
    given = (VERSIONS, workshop.main_sha256, workshop.source.name, [cut.name for cut in cuts], spec, recipe, views)
    digest = hashlib.sha256(msgspec.json.encode((*given, job.images, workshop.preprocess))).hexdigest()
    path = workshop.folder / "exits" / f"{workshop.main}.{digest[:12]}.safetensors"
    if not path.is_file():
        teacher = teachers.of(job.images, views)
        folder, show = path.parent, of_training(progress, "exits")
        heads = train_exits(graph, cuts, spec, teacher, recipe, checkpoints=folder, progress=show)
        network: dict[str, torch.Tensor] = {}
        if recipe.joint_epochs:
            joint = train_jointly(graph, cuts, heads, teacher, recipe, checkpoints=folder, progress=show)
            heads, network = joint.classifiers, _weights_of(joint, workshop.module, graph)
        path.parent.mkdir(exist_ok=True)
        save_exits(TrainedExits(cuts, heads, spec, recipe, network), path, network=workshop.main_sha256)
        for checkpoint in folder.glob("*.exit.safetensors"):
            checkpoint.unlink()
        for checkpoint in folder.glob("*.joint.safetensors"):
            checkpoint.unlink()
    _give(workshop, load_exits(path, graph, network=workshop.main_sha256))


def _recipe(job: ExitsJob, graph: Graph) -> ExitRecipe:
    return ExitRecipe(
        epochs=job.epochs, joint_epochs=job.joint_epochs, label_share=job.labels, weights=job.weights,
        shift=usual_shift(min(graph.inputs[0].shape[1:])), seed=job.seed,
    )  # fmt: skip


def _cuts(job: ExitsJob, graph: Graph) -> tuple[Cut, ...]:
    """The cuts of the job's patterns, in the order in which the network runs."""
    single = {cut.name: cut for cut in graph.cuts() if len(cut.specs) == 1 and len(cut.specs[0].shape) in (1, 2, 3)}
    wanted: set[str] = set()
    for pattern in job.cuts:
        names = fnmatch.filter(single, pattern)
        # A name that is no pattern may be another name of a cut, or one where there can be no exit: that is refused.
        wanted |= set(names) if names else {graph.cut(pattern).name}
    cuts = [cut for cut in graph.cuts() if cut.name in wanted]
    if len(cuts) > job.most:
        raise JobError(f"[exits] cuts fit {len(cuts)} cuts of the network, more than most = {job.most}")
    return tuple(cuts)


def _weights_of(joint: WithExits, module: nn.Module, graph: Graph) -> dict[str, torch.Tensor]:
    """The network's weights after joint training, by the names of the user's own module.

    Raises:
        ModelError: they have other names there.
    """
    state = module.state_dict()
    found = {name: tensor.cpu() for part in joint.parts for name, tensor in part.state_dict().items() if name in state}
    again = copy.deepcopy(module)
    again.load_state_dict(found, strict=False)
    with torch.no_grad():
        want = joint.cpu().eval()(*graph.example)[-1]
        got = first_of(again.eval()(*graph.example))
    if not torch.allclose(got, want, rtol=TOLERANCE, atol=TOLERANCE * float(want.abs().max())):
        raise ModelError("the network cannot be trained with its exits: captured, its weights have other names")
    return {name: tensor for name, tensor in found.items() if not torch.equal(tensor, state[name].cpu())}


def _give(workshop: Workshop, trained: TrainedExits) -> None:
    """Exits for the network that they were trained in: the unmodified one, or one more."""
    name = workshop.main
    if trained.network:
        module = copy.deepcopy(workshop.module)
        module.load_state_dict(trained.network, strict=False)
        workshop.graph  # noqa: B018 - captured before the copy shares its tensors
        name = workshop.add(f"{workshop.main}.joint", module.eval(), base=workshop.main).name
    classifiers = {cut.name: head for cut, head in zip(trained.cuts, trained.heads, strict=True)}
    workshop.networks[name] = dataclasses.replace(workshop.networks[name], classifiers=classifiers)


class Tried(NamedTuple):
    """A plan with every exit that it can have, and what each image of those that choices are made on did at each."""

    plan: Plan
    evidence: ExitEvidence
    temperatures: tuple[float, ...]


def with_exits(
    workshop: Workshop,
    candidates: Sequence[Candidate],
    reference: NDArray[np.bool_],
    truth: NDArray[np.int64],
    conditions: Conditions,
    *,
    progress: Progress,
) -> list[Candidate]:
    """More candidates: those that are left of networks with exits, again with them, for each loss that the job names.

    Args:
        workshop: with segments and tables of what is left.
        candidates: all.
        reference: which of the images that choices are made on the unmodified network gets right.
        truth: what is right there.
        conditions: under which thresholds are chosen.
    """
    job = workshop.job
    alive = [c for c in candidates if c.dropped is None and workshop.networks[c.plan.variant].classifiers]
    found: list[Candidate] = []
    seen: set[Plan] = set()
    for done, candidate in enumerate(alive):
        progress("exits", done, len(alive), candidate.plan.label)
        trial = _trial(workshop, candidate.plan)
        if not trial.exits:
            continue
        tried = _tried(workshop, trial, truth)
        timed = _timed(workshop, candidate, trial)
        for loss in job.exits.losses:
            least = 100 * float(reference.mean())
            try:
                costs = _costs(timed, conditions, job.goal.minimise)
                thresholds = choose(tried.evidence, costs, max_loss=loss, reference=least).thresholds
            except Infeasible:
                continue
            made = _made(workshop, candidate, tried, thresholds, reference, number=len(candidates) + len(found))
            if made is not None and (same := msgspec.structs.replace(made.plan, number=0)) not in seen:
                seen.add(same)
                found.append(made)
    progress("exits", len(alive), len(alive), "")
    return found


def _trial(workshop: Workshop, plan: Plan) -> Plan:
    """A plan with an exit at every place where it can have one, none of which ever answers."""
    job = workshop.job.exits
    if plan.cut is not None and SEVERAL in plan.cut:
        # No prefix of the layers ends there: an exit of the device might need what the edge computes.
        return plan
    rules = {cut: ExitRule(threshold=NEVER, rule=job.rule) for cut in workshop.networks[plan.variant].classifiers}
    return _with(workshop, plan, rules)


def _with(workshop: Workshop, plan: Plan, rules: dict[str, ExitRule]) -> Plan:
    """A plan with exits at these cuts, on the side where each lies; their segments are cut where they are not there."""
    network, precision = plan.variant, plan.precision
    order = [cut.name for cut in workshop.whole(network, precision).cuts]
    single = {cut.name: cut.specs[0] for cut in workshop.whole(network, precision).cuts if len(cut.specs) == 1}
    names = [name for name in order if name in rules and name in single]
    here = {"device": len(order), "upload": -1, "split": order.index(plan.cut) if plan.cut in order else -1}[plan.kind]
    exits: list[Exit] = []
    sides: tuple[tuple[Side, list[str], str | None], ...] = (
        ("device", [name for name in names if order.index(name) <= here], plan.cut),
        ("edge", [name for name in names if order.index(name) > here], None),
    )
    firsts: dict[Side, str | None] = {"device": plan.head, "edge": plan.tail}
    for side, own, end in sides:
        if not own:
            continue
        firsts[side] = workshop.between(network, precision, plan.cut if side == "edge" else None, own[0])
        for name, after in zip(own, [*own[1:], end], strict=True):
            exits.append(
                Exit(
                    side=side,
                    cut=name,
                    value=single[name],
                    classifier=workshop.classifier(network, precision, name),
                    rest=None if name == after else workshop.between(network, precision, name, after),
                    rule=rules[name],
                )
            )
    return msgspec.structs.replace(plan, head=firsts["device"], tail=firsts["edge"], exits=tuple(exits))


def _tried(workshop: Workshop, trial: Plan, truth: NDArray[np.int64]) -> Tried:
    pixels = workshop.validation.pixels
    deployed = Deployed(workshop.folder, trial, workshop.outputs)
    answers = deployed.at_exits(pixels)
    temperatures = tuple(temperature_of(logits, truth) for logits in answers.logits)
    rule = workshop.job.exits.rule
    sure = [certainty(logits, rule, t) for logits, t in zip(answers.logits, temperatures, strict=True)]
    evidence = ExitEvidence(
        certainty=np.stack(sure),
        is_right=np.stack([logits.argmax(1) == truth for logits in answers.logits]),
        is_right_at_end=answers.classes == truth,
        payload_bytes=answers.num_bytes.astype(np.float64),
        is_on_device=tuple(exit.side == "device" for exit in trial.exits),
    )
    return Tried(trial, evidence, temperatures)


def _timed(workshop: Workshop, candidate: Candidate, trial: Plan) -> list[Work]:
    """What a request costs on this machine that each exit in turn answers, at last of one that none does."""
    profile = time_plans(
        lambda name: workshop.folder / name,
        [trial],
        workshop.validation.pixels[:4],
        workshop.outputs,
        repeats=_TIMED,
        core=next(iter(allowed_cores()), None),
    )
    seconds = {name: timing.median_s for name, timing in profile.segments.items()}
    evidence = msgspec.structs.replace(candidate.evidence, exit_shares=(0.0,) * len(trial.exits))
    return [course.work for course in courses_of(Candidate(plan=trial, evidence=evidence), seconds)]


def _costs(courses: list[Work], conditions: Conditions, minimise: Objective) -> list[list[float]] | None:
    """What each course of a request costs, for `choose`: for a rate, of each resource."""
    if minimise == "bytes":
        return None
    prices = [price(work, conditions) for work in courses]
    if minimise == "throughput":
        return [[float(total.busy_s[resource]) for total in prices] for resource in RESOURCES]
    return [[float(total.energy_j if minimise == "energy" else total.latency_s) for total in prices]]


def _made(
    workshop: Workshop,
    candidate: Candidate,
    tried: Tried,
    thresholds: Sequence[float],
    reference: NDArray[np.bool_],
    *,
    number: int,
) -> Candidate | None:
    """A candidate with those of the exits that answer at all; None where none does."""
    rows = [place for place, threshold in enumerate(thresholds) if threshold < NEVER]
    if not rows:
        return None
    trial = tried.plan
    rules = {
        trial.exits[place].cut: ExitRule(
            threshold=thresholds[place], temperature=tried.temperatures[place], rule=trial.exits[place].rule.rule
        )
        for place in rows
    }
    plan = msgspec.structs.replace(_with(workshop, candidate.plan, rules), number=number)
    evidence = tried.evidence.of(rows)
    chosen = [thresholds[place] for place in rows]
    name = f"exits/{number}.safetensors"
    save_evidence(evidence, workshop.folder / name)
    return Candidate(plan=plan, evidence=_evidence(workshop, candidate, plan, evidence, chosen, reference, name))


def _evidence(
    workshop: Workshop,
    candidate: Candidate,
    plan: Plan,
    evidence: ExitEvidence,
    thresholds: Sequence[float],
    reference: NDArray[np.bool_],
    name: str,
) -> Evidence:
    by, shares = evidence.answered_by(thresholds), evidence.at(thresholds).shares
    right = evidence.right_at(thresholds)
    crosses = ~np.isin(by, np.flatnonzero(evidence.is_on_device))
    sizes = evidence.payload_bytes[crosses] if crosses.any() else np.zeros(1)
    loss, loss_ci = loss_of(reference, right)
    files = [workshop.folder / file for file in (*plan.segments_on("device"), plan.tables) if file is not None]
    return msgspec.structs.replace(
        candidate.evidence,
        num_images=len(right),
        accuracy=100 * float(right.mean()),
        accuracy_ci=proportion_ci(right),
        loss_points=loss,
        loss_ci_points=loss_ci,
        payload_bytes=float(sizes.mean()),
        payload_bytes_p50=float(np.median(sizes)),
        payload_bytes_p95=float(np.percentile(sizes, 95)),
        exit_shares=shares[:-1],
        exit_file=name,
        device_bytes=float(sum(file.stat().st_size for file in files)) if plan.kind != "upload" else 0.0,
        device_memory_bytes=float(memory_of_all([workshop.folder / name for name in plan.segments_on("device")])),
    )


