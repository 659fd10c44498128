"""The pruned networks of a job: made where the job asks for it, read where it names files.

    step 1    the whole network, to each share that is asked for, each from the one before
    step 2    for each cut, ever fewer channels that cross there, from the smallest network that keeps the goal's loss

Both are tasks of a build (`spending`).  What was made lies in the workshop as weights and recipe, and is found there by
a second build; one that was killed goes on from the last epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
from torch import Tensor, nn

from ..compress.batches import Views
from ..compress.budget import Costs, choose
from ..compress.channels import Channels
from ..compress.pruned_file import Stage, load_pruned, save_pruned
from ..compress.pruning import UNITS, PruneRecipe, Pruning
from ..compress.scores import check_scales, magnitude, slimming
from ..compress.series import Member, counts_below, crossing_groups, series
from ..errors import CoinferError, CutError, DataError, JobError, ModelError
from ..model.cut import Cut
from ..model.graph import Graph, capture
from ..plan import Candidate
from ..search.goal import LOSS_TOLERANCE
from .job import Job
from .progress import Progress, of_training
from .spending import Outcome, Task, scaled
from .teachers import Teachers
from .timing import deployed_s
from .wanted import series_cuts
from .workshop import safe_name


class PrunedVariant(NamedTuple):
    """A network made from the main one.

    `base` is the name of the one that it was made of; `graph` the capture of `module`; `cuts` where it is to be divided
    (None: wherever the job admits); `macs_share` its multiply-accumulates over the main network's; `accuracy` in
    percent, of the images of choice.
    """

    name: str
    base: str
    module: nn.Module
    graph: Graph
    lineage: tuple[Stage, ...]
    cuts: tuple[str, ...] | None
    macs_share: float
    accuracy: float


class Pruner:
    """Makes the pruned networks of a job, step by step.

    Args:
        job: what is wanted.
        main: the main network's name; the teachers' graph is its capture.
        teachers: of all trainings.
        folder: where weights and checkpoints are kept.
        known: measured candidates of the main network, for what a training may gain; none where nobody asks.
        deployable: names of the main network's cuts where it can be divided as it is deployed.
        keep: is given each network as soon as it is made.
        behind: tasks that can begin when step 1 is done, given its smallest network that keeps the goal's loss.
        progress: is told each training step.

    Raises:
        WeightsError: a file is no pruned network of this one.
    """

    def __init__(
        self,
        job: Job,
        main: str,
        teachers: Teachers,
        folder: Path,
        known: Sequence[Candidate],
        *,
        deployable: Collection[str],
        keep: Callable[[PrunedVariant], object],
        behind: Callable[[PrunedVariant], list[Task]],
        progress: Progress,
    ) -> None:
        self._job, self._main, self._teachers, self._folder = job, main, teachers, folder
        self._known, self._deployable = known, deployable
        self._keep, self._behind, self._progress = keep, behind, progress
        self._views = Views(is_mirrored=job.prune.mirror, mixes=job.prune.mixes)
        self.notes: list[str] = []
        # Whether step 1 has come to the smallest network there is.
        self._is_least = False
        self._check_names()
        self._whole = [self._read(Path(file)) for file in job.prune.networks]

    def _check_names(self) -> None:
        """Refuse two networks of one name before anything is trained."""
        job = self._job.prune
        names = [f"{self._main}.k{keep:g}" for keep in job.keep]
        if len(set(names)) < len(names):
            raise JobError(f"[prune] keep must be shares that differ in six digits, got {list(job.keep)}")
        for file in job.networks:
            name = self._name_of(Path(file))
            if name in names:
                raise JobError(f'[prune] networks: two networks would be named "{name}", rename {file}')
            names.append(name)

    def _name_of(self, path: Path) -> str:
        name = path.stem if path.stem.startswith(f"{self._main}.") else f"{self._main}.{path.stem}"
        return safe_name(name)

    def tasks(self) -> list[Task]:
        """What can be made now.

        Raises:
            CutError: [prune] cuts names none.
            JobError: or a pattern that fits none.
            ModelError: nothing can be removed, the network takes one picture at a time, or a score needs labels.
        """
        job = self._job.prune
        if not (job.keep or job.cuts):
            return self._after_step1()
        self._check()
        return [self._step1(0, self.main)] if job.keep else self._after_step1()

    def _check(self) -> None:
        """Refuse what does not fit before anything is trained."""
        job, teachers = self._job.prune, self._teachers
        if teachers.graph.why_fixed_batch is not None:
            one = f"this network takes one at a time: {teachers.graph.why_fixed_batch}"
            raise ModelError(f"training needs batches, but {one}")
        images = teachers.source.drawn("train", job.images)
        if job.score == "taylor" and images.labels is None:
            instead = f'take "slimming" or "magnitude" (data "{teachers.source.name}")'
            raise ModelError(f'the score "taylor" needs labels, these pictures have none: {instead}')
        if len(images) < job.batch_size:
            count = len(images)
            raise DataError(f"[prune] batch_size must be at most the {count} training pictures, got {job.batch_size}")
        if job.latency_at is not None:
            teachers.graph.cut(job.latency_at)
        if job.sparse_epochs:
            check_scales(teachers.module)
        channels = Channels(teachers.module, _one(teachers.graph), region=job.region, ignore=job.ignore)
        scores = slimming(channels) if job.score == "slimming" else magnitude(channels)
        if job.keep and job.budget != "latency" and job.unreachable == "refuse":
            costs, kind = Costs(channels, _one(teachers.graph)), job.budget
            total = getattr(costs.of({}), kind)
            choose(
                channels, scores, lambda gone: getattr(costs.of(gone), kind), min(job.keep) * total, least=job.least,
                multiple=job.multiple, unit=UNITS[kind],
            )  # fmt: skip
        self._places(self.main, channels)

    @property
    def main(self) -> PrunedVariant:
        """The unmodified network as one of them."""
        teachers = self._teachers
        return PrunedVariant(
            self._main, self._main, teachers.module, teachers.graph, (), None, 1.0, teachers.own_accuracy
        )  # fmt: skip

    def is_good(self, variant: PrunedVariant) -> bool:
        """Whether it keeps the goal's loss on the images of choice."""
        return variant.accuracy >= self._least_accuracy

    @property
    def _least_accuracy(self) -> float:
        return self._teachers.own_accuracy - self._job.goal.max_loss - LOSS_TOLERANCE

    @property
    def _base(self) -> PrunedVariant:
        """What step 2 begins with: the smallest that keeps the goal's loss."""
        good = [variant for variant in self._whole if self.is_good(variant)]
        return min((self.main, *good), key=lambda variant: variant.macs_share)

    def _step1(self, place: int, before: PrunedVariant) -> Task:
        """The network of one share, from the one before; then the next one's, at the end what stands on them.

        Where it is not made no smaller one is, and what stands on those before begins.
        """
        job = self._job.prune
        keep, already = job.keep[place], job.keep[place - 1] if place else 1.0
        name = f"{self._main}.k{keep:g}"

        def run() -> Outcome:
            # What is kept is counted from the network before.
            recipe = msgspec.structs.replace(self._recipe(keep), keep=keep / already)
            variant = self._pruned(name, before, recipe)
            self._whole.append(variant)
            is_last = place + 1 == len(job.keep) or self._is_least
            return Outcome(
                self._prospects(variant), self._after_step1() if is_last else [self._step1(place + 1, variant)]
            )  # fmt: skip

        epochs = job.sparse_epochs + job.rounds * job.epochs + job.final_epochs
        return Task(
            f"prune to {keep:g} of {job.budget}", 1, self._seconds(epochs, (keep + already) / 2),
            lambda: scaled(self._known, time=keep, crossing=keep**0.5), run, self._after_step1,
        )  # fmt: skip

    def _recipe(self, keep: float) -> PruneRecipe:
        return self._job.prune.recipe(keep, side=self._side)

    @property
    def _side(self) -> int:
        """Of the pictures, in pixels."""
        return min(self._teachers.source.shape[:2])

    def _pruned(self, name: str, before: PrunedVariant, recipe: PruneRecipe) -> PrunedVariant:
        teacher = self._teachers.of(self._job.prune.images, self._views)
        latency_of = self._deployed_s if recipe.budget == "latency" else None
        pruning = Pruning(
            before.module, _one(before.graph), teacher, recipe,
            latency_of=latency_of, folder=self._folder, progress=of_training(self._progress, name),
        )  # fmt: skip
        pruned = pruning.run()
        # What a round refused is among them.
        self.notes += [f'{name}: channels of "{layer}" stay: {why}' for layer, why in pruning.refused.items()]
        self.notes += [f"{name}: {why}" for why in pruning.unmet]
        self._is_least = bool(pruning.unmet)
        lineage = (*before.lineage, Stage(recipe=recipe, rounds=pruned.rounds, taught=pruned.taught))
        return self._given(name, before.name, self._write(name, pruned.module, lineage), lineage)

    def _after_step1(self) -> list[Task]:
        base = self._base
        if base.name == self._main and self._whole:
            self.notes.append(f"no pruned network keeps {self._job.goal.max_loss:g} points: nothing stands on one")
        tasks = [] if base.name == self._main else self._behind(base)
        return [*tasks, *self._step2(base)]

    def _step2(self, base: PrunedVariant) -> list[Task]:
        """A series for each set of channels that cross at the job's cuts."""
        job, tasks = self._job.prune, list[Task]()
        if not job.cuts:
            return []
        try:
            channels = Channels(base.module, _one(base.graph), region=job.region, ignore=job.ignore)
        except ModelError as error:
            self._refused(base, error)
            return []
        if base.name == self._main:
            self.notes += [f'series: channels of "{layer}" stay: {why}' for layer, why in channels.refused.items()]
        for have, least, cuts in self._places(base, channels):
            counts = [count for count in counts_below(have, job.counts) if count >= least]
            if not counts or (isinstance(job.counts, tuple) and len(counts) < len(job.counts)):
                told = f"{have} channels cross there, of which {least} or more stay"
                self.notes.append(f"counts {job.counts} at {cuts[0].name}: {told}, {list(counts)} are made")
            if counts:
                tasks.append(self._fewer(base, cuts, have, counts, self._series(base, cuts[0])))
        return tasks

    def _places(self, base: PrunedVariant, channels: Channels) -> list[tuple[int, int, list[Cut]]]:
        """The job's cuts by what can be removed there: how many channels, how many stay, the cuts they cross."""
        places: dict[tuple[str, ...], list[Cut]] = {}
        for pattern in self._job.prune.cuts:
            try:
                found, reasons = series_cuts(pattern, base.graph, channels, self._deployable)
            except (CutError, JobError) as error:
                self._refused(base, error)
                continue
            self.notes += [reason for reason in reasons if reason not in self.notes]
            for cut in found:
                key = tuple(group.name for group in crossing_groups(channels, base.graph, cut))
                if cut not in places.setdefault(key, []):
                    places[key].append(cut)
        least = self._job.prune.least
        return [
            (sum(channels.group(name).size for name in key), len(key) * least, cuts) for key, cuts in places.items()
        ]

    def _refused(self, base: PrunedVariant, error: CoinferError) -> None:
        """Note why a network of step 1 has no series: what could go may be gone already; the unmodified one must."""
        if base.name == self._main:
            raise error
        self.notes.append(f"no series from {base.name}: {error}")

    def _series(self, base: PrunedVariant, cut: Cut) -> Iterator[Member]:
        job = self._job.prune
        recipe = job.cut_recipe(side=self._side)
        yield from series(
            base.module,
            _one(base.graph),
            base.graph,
            cut,
            self._teachers.of(job.images, self._views),
            recipe,
            accuracy_of=self._teachers.accuracy,
            least_accuracy=self._least_accuracy,
            counts=job.counts,
            folder=self._folder,
            progress=of_training(self._progress, f"channels at {cut.name}"),
        )

    def _fewer(
        self, base: PrunedVariant, cuts: Sequence[Cut], have: int, counts: Sequence[int], members: Iterator[Member]
    ) -> Task:
        """The next of a series; then the one after it, while the goal's loss is kept."""
        names = tuple(cut.name for cut in cuts)
        count = counts[0]

        def run() -> Outcome:
            try:
                member = next(members, None)
            except ModelError as error:
                self.notes.append(f"no {count} channels at {names[0]}: {error}")
                member = None
            if member is None:
                return Outcome([], [])
            lineage = (*base.lineage, *member.lineage)
            name = f"{base.name}.{names[0]}.f{member.num_channels}"
            module = self._write(name, member.pruned.module, lineage)
            variant = self._given(name, base.name, module, lineage, cuts=names, accuracy=member.accuracy)
            if not self.is_good(variant) or len(counts) == 1:
                return Outcome(self._prospects(variant, count / have), [])
            return Outcome(
                self._prospects(variant, count / have), [self._fewer(base, cuts, have, counts[1:], members)]
            )  # fmt: skip

        return Task(
            f"{count} of {have} channels at {names[0]}", 1, self._seconds(self._job.prune.cut_epochs, base.macs_share),
            lambda: scaled(self._known, time=base.macs_share, crossing=count / have, cuts=names), run,
        )  # fmt: skip

    def _prospects(self, variant: PrunedVariant, crossing: float | None = None) -> list[Candidate]:
        if not self.is_good(variant):
            return []
        share = variant.macs_share
        return scaled(self._known, time=share, crossing=crossing or share**0.5, cuts=variant.cuts)

    def _write(self, name: str, module: nn.Module, lineage: tuple[Stage, ...]) -> nn.Module:
        """Keep a network that is finished; gives it as it is deployed."""
        path = self._folder / f"{safe_name(name)}.safetensors"
        save_pruned(module, path, network=self._teachers.weights_sha256, lineage=lineage)
        return module.cpu().eval()

    def _read(self, path: Path) -> PrunedVariant:
        teachers = self._teachers
        read = load_pruned(path, teachers.module, _one(teachers.graph), network=teachers.weights_sha256)
        return self._given(self._name_of(path), self._main, read.module, read.lineage)

    def _given(
        self,
        name: str,
        base: str,
        module: nn.Module,
        lineage: tuple[Stage, ...],
        *,
        cuts: tuple[str, ...] | None = None,
        accuracy: float | None = None,
    ) -> PrunedVariant:
        """A network of the job: what is known of it is noted, and it is given on."""
        graph = capture(module, self._teachers.graph.example)
        share = graph.num_macs / self._teachers.graph.num_macs
        found = self._teachers.accuracy(module) if accuracy is None else accuracy
        size = f"{100 * share:.1f} % of the compute"
        before = self._teachers.own_accuracy
        self.notes.append(f"pruned {name}: {size}, top-1 {found:.2f} % (unmodified {before:.2f} %)")
        variant = PrunedVariant(safe_name(name), base, module, graph, lineage, cuts, share, found)
        self._keep(variant)
        return variant

    def _deployed_s(self, module: nn.Module) -> float:
        """Median seconds of a picture by the exported network, or its head up to `latency_at`, on one thread."""
        teachers = self._teachers
        return deployed_s(
            module, teachers.graph.example, self._job.prune.latency_at, preprocess=teachers.preprocess,
            pixels=teachers.validation.pixels[:1], folder=self._folder,
        )  # fmt: skip

    def _seconds(self, epochs: int, share: float) -> float:
        """What so many epochs of a network of this share of the compute are expected to take."""
        if self._job.build.minutes is None:
            return 0.0
        return self._teachers.seconds(share * epochs, self._job.prune.images)


def _one(graph: Graph) -> tuple[Tensor, ...]:
    """What a network is called with, a batch of 1."""
    return tuple(value[:1] for value in graph.example)
