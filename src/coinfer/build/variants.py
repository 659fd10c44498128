"""The networks that a job makes of the main one: pruned ones, networks with units, networks with exits.

They are tasks (`spending`): without limits each is done in turn, with limits those that promise most.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from pathlib import Path

import msgspec

from ..compress.exits import check_cuts
from ..compress.pruning import VERSIONS as PRUNING_VERSIONS
from ..compress.unit_file import load_unit, network_of
from ..compress.unit_training import VERSIONS as UNIT_VERSIONS
from ..errors import CutError, DataError, ModelError, WeightsError
from ..model.graph import Graph
from ..plan import Candidate, Evidence
from .bottlenecks import UnitTrainer
from .drafts import Draft, all_drafts
from .exits import train_exits_of
from .job import conditions_of, goal_of
from .measured import calibrate_and_weigh
from .progress import Progress
from .pruned import PrunedVariant, Pruner
from .spending import Gains, Ledger, Limits, Task, spend
from .teachers import Teachers
from .timing import int8_ratio_of, time_segments
from .wanted import is_pattern, wanted_units
from .workshop import Workshop

# Bits from which a plain split counts as one that loses nothing, before anything was classified.
_FINE_BITS = 6
REPEATS = 5


def add_variants(workshop: Workshop, *, progress: Progress) -> None:
    """Make what the job asks for, within its limits, and add it to the workshop's networks.

    Raises:
        CoinferError: something does not fit the network, or a training fails.
    """
    job = workshop.job
    units, prune = job.bottleneck, job.prune
    has_exits = bool(job.exits.cuts or job.exits.files)
    if not (units.cuts or units.units or prune.keep or prune.cuts or prune.networks or has_exits):
        return
    if has_exits:
        # What does not fit is refused before anything else is trained.
        check_cuts(workshop.graph, ())
    known: list[Candidate] = []
    gains = None
    if job.build.minutes is not None or job.build.trainings is not None:
        known, gains = _known(workshop, progress)
    ledger = Ledger(workshop.folder / "spent.json", _key(workshop))
    progress = ledger.ticking(progress)
    teachers = Teachers(
        workshop.module, workshop.graph, workshop.source, workshop.preprocess, workshop.validation,
        progress=progress, folder=workshop.folder,
    )  # fmt: skip
    trainers: list[tuple[str, UnitTrainer]] = []
    graphs = {workshop.main: workshop.graph}

    def keep(variant: PrunedVariant) -> None:
        network = workshop.add(
            variant.name, variant.module, base=variant.base, stages=variant.lineage, cuts=variant.cuts
        )  # fmt: skip
        if variant.cuts is None:
            graphs[network.name] = variant.graph

    def unit_tasks(name: str, graph: Graph, macs_share: float = 1.0) -> list[Task]:
        folder = workshop.folder / "units"
        network = workshop.networks[name].ancestry.weights_sha256
        trainer = UnitTrainer(job, graph, network, teachers, folder, known, macs_share=macs_share, progress=progress)
        trainers.append((name, trainer))
        return trainer.tasks()

    def behind(base: PrunedVariant) -> list[Task]:
        if units.base == "main" or not units.cuts:
            return []
        try:
            return unit_tasks(base.name, base.graph, base.macs_share)
        except (CutError, ModelError) as error:
            # What fits the unmodified network may not fit one of fewer channels.
            workshop.notes.append(f"no units in {base.name}: {error}")
            return []

    if units.cuts:
        # What does not fit is refused before anything is trained.
        wanted = list(wanted_units(units, workshop.graph))
        count, least = len(workshop.source.drawn("train", units.images)), max(w.recipe.batch_size for w in wanted)
        if count < least:
            raise DataError(f'training a unit needs at least {least} pictures, got {count} (data "{job.data.source}")')
    main = workshop.networks[workshop.main]
    pruner = Pruner(
        job, workshop.main, teachers, workshop.folder / "pruned", known,
        deployable={cut.name for whole in main.wholes.values() for cut in whole.cuts},
        keep=keep, behind=behind, progress=progress,
    )  # fmt: skip
    tasks = pruner.tasks()
    if units.cuts and (units.base != "pruned" or not (prune.keep or prune.networks)):
        tasks += unit_tasks(workshop.main, workshop.graph)
    limits = Limits(None if job.build.minutes is None else 60 * job.build.minutes, job.build.trainings)
    admitted = {cut.name for precision in main.wholes for cut in workshop.cuts(main.name, precision)}
    own = [candidate for candidate in known if candidate.plan.cut is None or candidate.plan.cut in admitted]
    notes = spend(tasks, limits, ledger, own, gains, progress=progress)
    for file in units.units:
        _add_file(workshop, Path(file), graphs)
    for name, trainer in trainers:
        for unit in trainer.units:
            workshop.add_unit(name, unit)
    if has_exits:
        train_exits_of(workshop, teachers, progress=progress)
    workshop.notes += [*pruner.notes, *(trainer.text for _, trainer in trainers if trainer.num_cells), *notes]


def _add_file(workshop: Workshop, path: Path, graphs: Mapping[str, Graph]) -> None:
    """A unit that was trained before, in the network that it was trained for."""
    network = network_of(path)
    known = {name: workshop.networks[name].ancestry.weights_sha256 for name in graphs}
    for name, sha256 in known.items():
        if sha256 == network:
            workshop.add_unit(name, load_unit(path, graphs[name], network=network))
            return
    have = ", ".join(f"{sha256[:12]} ({name})" for name, sha256 in known.items())
    raise WeightsError(f"unit {path} was trained for another network: weights {network[:12]}, these are {have}")


def _key(workshop: Workshop) -> str:
    """All that the tasks of a job depend on, but for its limits."""
    job = workshop.job
    given = (
        PRUNING_VERSIONS, UNIT_VERSIONS, job.prune, job.bottleneck, job.goal, job.data, job.build.rounds,
        workshop.main_sha256, workshop.source.name, workshop.preprocess, job.build.precisions,
    )  # fmt: skip
    return hashlib.sha256(msgspec.json.encode(given)).hexdigest()


def _known(workshop: Workshop, progress: Progress) -> tuple[list[Candidate], Gains]:
    """The main network's candidates that lose little, measured, and how gains are counted.

    Its splits at cuts for which something is to be trained are among them, whether they are candidates or not.
    """
    job, wide = workshop.job, copy.copy(workshop)
    trained = (*job.prune.cuts, *job.bottleneck.cuts)
    named = (name if is_pattern(name) else workshop.graph.cut(name).name for name in trained)
    cuts = (*job.build.cuts, *named)
    wide.job = msgspec.structs.replace(job, build=msgspec.structs.replace(job.build, cuts=cuts))
    drafts = [draft for draft in all_drafts(wide) if draft.plan.variant == workshop.main and _is_fine(draft)]
    time_segments(wide, drafts, repeats=REPEATS, progress=progress)
    calibrate_and_weigh(wide, drafts, progress=progress)
    ratio = int8_ratio_of(wide, drafts)
    own = conditions_of(job, int8_ratio=ratio)
    return [_as_candidate(draft) for draft in drafts], Gains(goal_of(job), own, int8_ratio=ratio)


def _is_fine(draft: Draft) -> bool:
    codec = draft.plan.codec
    return codec is None or draft.is_exact or (codec.transform == "uniform" and codec.bits >= _FINE_BITS)


def _as_candidate(draft: Draft) -> Candidate:
    evidence = Evidence(
        split="validation",
        num_images=0,
        accuracy=None,
        accuracy_ci=None,
        loss_points=0.0,
        loss_ci_points=None,
        payload_bytes=draft.payload_bytes,
        payload_bytes_p95=draft.payload_bytes_p95,
        reply_bytes=0.0,
        head_s=draft.head_s,
        encode_s=draft.encode_s,
        decode_s=draft.decode_s,
        tail_s=draft.tail_s,
        device_bytes=draft.device_bytes,
        device_memory_bytes=draft.device_memory_bytes,
    )
    return Candidate(plan=draft.plan, evidence=evidence)
