"""The units of a job: trained where the job asks for it, read where it names files.

The papers train every (cut, width, stride) to its end.  Here the cells of one cut share the features of its frozen
head, begin from the next wider one that was trained, widest first, and run their first phase (the unit alone) only;
what is then dominated at every rate by another cell of the cut is dropped, and the rest go on to the second phase.

With `bits = "search"` each cell takes the fewest bits whose accuracy is near that of 8 (BBNet's accuracy-aware
training): by halving, three more first phases in place of seven.

A finished unit lies in the workshop, keyed by all that its training depends on, so that a second build finds it; a
build that was killed goes on from the last epoch.
"""

from __future__ import annotations

import fnmatch
import hashlib
import shutil
from collections.abc import Iterator
from itertools import groupby, product
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor

from ..compress.batches import Views, seen_by
from ..compress.bottleneck import Unit, UnitSpec, check_unit
from ..compress.divided import several_cross
from ..compress.encoder import width_for
from ..compress.train import Step
from ..compress.unit_file import Trained, load_unit, save_unit
from ..compress.unit_training import (
    VERSIONS,
    RatePoint,
    Teacher,
    UnitRecipe,
    UnitTraining,
    is_cached,
    rates_of,
    teacher_of,
)
from ..compress.unit_training import Progress as StepProgress
from ..data import Images, Source
from ..errors import CutError, JobError, ModelError
from ..files import write_atomically
from ..model.cut import Cut, split
from ..model.graph import Graph
from ..plan import Preprocess, Value
from .job import BottleneckJob, Job
from .progress import Progress

# Steps of neighbouring rates differ by this factor at first: a price four times as high.
GAIN = 2.0
# Validation pictures that a cell must win something on after its first phase.
SELECTION_PICTURES = 1000


class Wanted(NamedTuple):
    """One unit that the job asks for; `bits_loss`: it takes the fewest bits that lose no more points against 8."""

    cut: Cut
    spec: UnitSpec
    recipe: UnitRecipe
    bits_loss: float | None = None


class Grid(NamedTuple):
    """The units of a job, and what they took.

    `num_cells` trainings are in the papers' grid, each to its end; `num_begun` ran their first phase, `num_finished` to
    their end, now or in an earlier build.
    """

    units: list[Trained]
    num_cells: int = 0
    num_begun: int = 0
    num_finished: int = 0

    @property
    def text(self) -> str:
        """One line for people."""
        ran = f"{self.num_begun} ran their first phase, {self.num_finished} to their end"
        return f"units: of {self.num_cells} trainings of the whole grid {ran}"


def units_of(
    job: Job, graph: Graph, network: str, source: Source, preprocess: Preprocess, folder: Path, *, progress: Progress
) -> Grid:
    """Every unit of the job, trained or read; `network` is the sha256 of the unmodified network's weights.

    Raises:
        CoinferError: a unit does not fit the network, or its training fails.
    """
    units = [load_unit(Path(file), graph, network=network) for file in job.bottleneck.units]
    wanted = list(wanted_units(job.bottleneck, graph))
    if not wanted:
        return Grid(units)
    images = source.drawn("train", job.bottleneck.images)
    workbench = _Workbench(job, graph, network, preprocess, folder / "units", images, source, progress)
    num_given = len(units)
    for _, cells in groupby(wanted, key=lambda unit: (unit.cut.name, unit.spec.head_width > 0)):
        units += workbench.finished(list(cells))
    num_cells = sum(1 if unit.bits_loss is None else unit.spec.bits for unit in wanted)
    grid = Grid(units, num_cells, workbench.num_begun, len(units) - num_given)
    progress(grid.text, 1, 1, "")
    return grid


class Done(Value, frozen=True, kw_only=True):
    """What was kept of the cells of one cut: files of units, and how many first phases it took."""

    names: list[str]
    num_begun: int


class _Workbench:
    """Trains the cells of one cut after the other; what they share is computed when it is first needed."""

    def __init__(
        self,
        job: Job,
        graph: Graph,
        network: str,
        preprocess: Preprocess,
        folder: Path,
        images: Images,
        source: Source,
        progress: Progress,
    ) -> None:
        self._job, self._graph, self._network, self._folder = job, graph, network, folder
        self._preprocess, self._images, self._source, self._progress = preprocess, images, source, progress
        self._views = Views(is_mirrored=job.bottleneck.mirror, mixes=job.bottleneck.mixes)
        self._validation = source.drawn("validation", SELECTION_PICTURES)
        # All that the trainings of all cells, and the choice among them, depend on.
        self._given = (VERSIONS, network, images.digest, self._validation.digest, preprocess, self._views)
        self._teacher: Teacher | None = None
        self._checkpoints: list[Path] = []
        self.num_begun = 0

    def finished(self, cells: list[Wanted]) -> list[Trained]:
        """The units of one cut's cells that no other dominates, from their files or trained now."""
        key = hashlib.sha256(msgspec.json.encode([self._given, *(_named(cell) for cell in cells)]))
        done = self._folder / f"{key.hexdigest()[:12]}.json"
        found = msgspec.json.decode(done.read_bytes(), type=Done) if done.is_file() else None
        # Where somebody removed a unit's file, the cells are trained again.
        if found is not None and all((self._folder / name).is_file() for name in found.names):
            self.num_begun += found.num_begun
            return [load_unit(self._folder / name, self._graph, network=self._network) for name in found.names]
        begun_before = self.num_begun
        if self._teacher is None:
            self._progress("the network's own answers", 0, 1, f"{len(self._images)} pictures")
            self._teacher = teacher_of(self._graph, self._images, self._preprocess, self._views)
            self._progress("the network's own answers", 1, 1, "")
        trainings = self._begun(cells)
        places = [place for place, is_kept in enumerate(self._kept(trainings)) if is_kept]
        names = []
        for place in places:
            cell = cells[place]
            trainings[place].together()
            trainings[place].whole()
            trainings[place].anew()
            digest = hashlib.sha256(key.digest() + msgspec.json.encode(_named(cell))).hexdigest()
            names.append(f"{trainings[place].divided.unit.spec.name}.{digest[:12]}.safetensors")
            save_unit(
                trainings[place].divided, self._graph, cell.cut, self._folder / names[-1],
                network=self._network, recipe=cell.recipe,
            )  # fmt: skip
        write_atomically(done, msgspec.json.encode(Done(names=names, num_begun=self.num_begun - begun_before)))
        for folder in self._checkpoints:
            shutil.rmtree(folder, ignore_errors=True)
        return [load_unit(self._folder / name, self._graph, network=self._network) for name in names]

    def _begun(self, cells: list[Wanted]) -> list[UnitTraining]:
        """The first phase of every cell, the widest of each stride first."""
        assert self._teacher is not None
        features: Tensor | None = None
        is_light = cells[0].spec.head_width > 0
        if is_cached(cells[0].spec, cells[0].recipe):
            self._progress(f"features at {cells[0].cut.name}", 0, 1, f"{len(self._images)} pictures")
            head, _ = split(self._graph, cells[0].cut)
            features = seen_by(head, self._images.pixels, self._preprocess, self._views)
            self._progress(f"features at {cells[0].cut.name}", 1, 1, "")
        trainings: dict[int, UnitTraining] = {}
        wider: dict[int, Unit] = {}
        for place in sorted(range(len(cells)), key=lambda k: -cells[k].spec.width):
            cell = cells[place]
            training = self._alone(cell, cell.spec, features, None if is_light else wider.get(cell.spec.stride))
            if cell.bits_loss is not None:
                training = self._with_fewest_bits(cell, training, features)
            wider[cell.spec.stride] = training.divided.unit
            trainings[place] = training
        return [trainings[place] for place in range(len(cells))]

    def _alone(self, cell: Wanted, spec: UnitSpec, features: Tensor | None, start: Unit | None) -> UnitTraining:
        """The first phase of a cell, of its own spec or of another number of bits."""
        assert self._teacher is not None
        training = UnitTraining(
            self._graph, cell.cut, spec, self._teacher, cell.recipe,
            features=features,
            wider=start,
            checkpoints=self._folder,
            progress=_shown(self._progress, f"unit {cell.cut.name} {spec.name}"),
        )  # fmt: skip
        assert training.checkpoints is not None
        self._checkpoints.append(training.checkpoints)
        training.alone()
        self.num_begun += 1
        return training

    def _with_fewest_bits(self, cell: Wanted, widest: UnitTraining, features: Tensor | None) -> UnitTraining:
        """The first phase with the fewest bits that keep the finest rate's accuracy, begun from `widest`."""
        assert cell.bits_loss is not None
        least = self._points(widest)[0].accuracy - cell.bits_loss
        best, low, high = widest, 1, cell.spec.bits
        while low < high:
            bits = (low + high) // 2
            spec = msgspec.structs.replace(cell.spec, bits=bits)
            start = None if cell.spec.head_width else widest.divided.unit
            training = self._alone(cell, spec, features, start)
            if self._points(training)[0].accuracy >= least:
                best, high = training, bits
            else:
                low = bits + 1
        return best

    def _points(self, training: UnitTraining) -> tuple[RatePoint, ...]:
        """What a unit sends and keeps on validation pictures."""
        if self._validation.labels is None:
            pixels = self._validation.pixels
            logits = seen_by(self._graph.module, pixels, self._preprocess, Views(is_mirrored=False))[0]
            self._validation = Images(pixels, logits.argmax(1).numpy())
        return rates_of(training.divided, self._validation, self._preprocess)

    def _kept(self, trainings: list[UnitTraining]) -> list[bool]:
        """Which cells have a rate that no other cell beats: fewer bytes at no less accuracy."""
        if len(trainings) == 1:
            return [True]
        points = [self._points(training) for training in trainings]
        return [
            any(
                not any(
                    other.num_bytes < mine.num_bytes and other.accuracy >= mine.accuracy
                    for k, others in enumerate(points)
                    if k != place
                    for other in others
                )
                for mine in own
            )
            for place, own in enumerate(points)
        ]


def _named(cell: Wanted) -> tuple[str, UnitSpec, UnitRecipe, float | None]:
    return cell.cut.name, cell.spec, cell.recipe, cell.bits_loss


def wanted_units(job: BottleneckJob, graph: Graph) -> Iterator[Wanted]:
    """Cut by cut, width by width: what the job's section asks for.

    Raises:
        CutError: no such cut, one that several tensors cross, or one that the unit does not fit.
        JobError: a pattern that fits no cut where one tensor crosses and units of all widths and strides fit.
    """
    gains = tuple(GAIN**k for k in range(len(job.prices)))
    if job.cuts and graph.why_fixed_batch is not None:
        raise ModelError(f"training needs batches, but this network takes one at a time: {graph.why_fixed_batch}")
    for cut in _cuts(job, graph):
        (crossing,) = cut.specs
        is_rectified = _is_rectified(graph, cut)
        for share in job.light or (0.0,):
            for stride, width in product(job.strides, job.widths):
                spec = UnitSpec(
                    width=width,
                    stride=stride,
                    bits=8 if job.bits == "search" else job.bits,
                    gains=gains,
                    prepare=job.prepare,
                    refine=job.refine,
                    is_rectified=is_rectified,
                )
                check_unit(crossing, spec)
                if share:
                    spec = msgspec.structs.replace(spec, head_width=light_width(cut, graph, spec, share))
                alone, together, whole, anew = (*job.epochs, 0, 0, 0, 0)[:4]
                recipe = UnitRecipe(
                    alone=alone, together=together, whole=whole, anew=anew,
                    prices=job.prices, label_share=job.labels, seed=job.seed,
                )  # fmt: skip
                yield Wanted(cut, spec, recipe, job.bits_loss if job.bits == "search" else None)


def light_width(cut: Cut, graph: Graph, spec: UnitSpec, share: float) -> int:
    """Channels of the widest light head that takes, with the unit, at most `share` of the network's compute.

    Raises:
        CutError: what crosses is no map.
        ModelError: not even the smallest head is so light, or none ends at the code's size.
    """
    if len(cut.specs[0].shape) != 3:
        raise CutError(f'a light head ends in a map (C, H, W), at "{cut.name}" crosses {cut.specs[0].shape}')
    _, height, wide = cut.specs[0].shape
    picture, code = graph.inputs[0].shape, (height // spec.stride, wide // spec.stride)
    # Each of the blocks behind the reduction has two convolutions of 3 x 3.
    prepare = spec.prepare * 2 * 9 * spec.width**2 * code[0] * code[1]
    try:
        return width_for(picture, code, share * graph.num_macs - prepare, sent=spec.width)
    except ModelError as error:
        raise ModelError(f'{error} (cut "{cut.name}", {100 * share:g} % of {graph.num_macs})') from error


def _is_rectified(graph: Graph, cut: Cut) -> bool:
    """Whether nothing below 0 crosses, even of noise."""
    head, _ = split(graph, cut)
    with torch.no_grad():
        (features,) = head(*graph.example)
    return bool((features >= 0).all())


def _cuts(job: BottleneckJob, graph: Graph) -> list[Cut]:
    single = {cut.name: cut for cut in graph.cuts() if len(cut.specs) == 1}
    found: dict[str, Cut] = {}
    for pattern in job.cuts:
        names = fnmatch.filter(single, pattern)
        if "*" in pattern or "?" in pattern:
            fitting = {name: single[name] for name in names if _is_fit(single[name], job)}
            if not fitting:
                where = f"{len(single)} cuts that one tensor crosses where widths and strides fit"
                raise JobError(f'[bottleneck] cuts "{pattern}" fits none of the {where}')
            found |= fitting
        elif names:
            found |= {name: single[name] for name in names}
        else:
            # The name of a cut by another name, or of one that several tensors cross: that is refused with the nearest.
            cut = graph.cut(pattern)
            if len(cut.specs) != 1:
                raise several_cross(graph, cut)
            found[cut.name] = cut
    return list(found.values())


def _is_fit(cut: Cut, job: BottleneckJob) -> bool:
    """Whether a unit of every width and stride fits there: a pattern passes over the cuts where one does not."""
    try:
        for width, stride in product(job.widths, job.strides):
            check_unit(cut.specs[0], UnitSpec(width=width, stride=stride, head_width=1 if job.light else 0))
    except (CutError, ModelError):
        return False
    return True


def _shown(progress: Progress, stage: str) -> StepProgress:
    """Training's steps as a build's progress: a stage for each phase, loss, accuracy and bytes as its detail."""

    def show(phase: str, step: Step) -> None:
        accuracy = "" if step.accuracy is None else f", {100 * step.accuracy:.1f} % right"
        num_bytes = "" if step.num_bytes is None else f", {step.num_bytes:.0f} B"
        progress(f"{stage}: {phase}", step.step, step.steps, f"loss {step.loss:.3f}{accuracy}{num_bytes}")

    return show
