"""The units of a job, trained where it asks for them.

The papers train every (cut, width, stride) to its end.  Here the cells of one cut share the features of its frozen
head, begin from the next wider one that was trained, widest first, and run their first phase (the unit alone) only;
what is then dominated at every rate by another cell of the cut is dropped, and the rest go on to the second phase.

With `bits = "search"` each cell takes the fewest bits whose accuracy is near that of 8 (BBNet's accuracy-aware
training): by halving, three more first phases in place of seven.

A finished unit lies in the workshop, keyed by all that its training depends on, so that a second build finds it; a
build that was killed goes on from the last epoch.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Any

import msgspec
from torch import Tensor

from ..compress.batches import Views, seen_by
from ..compress.bottleneck import Unit, UnitSpec
from ..compress.unit_file import Trained, load_unit, save_unit
from ..compress.unit_training import VERSIONS, RatePoint, Teacher, UnitRecipe, UnitTraining, is_cached, rates_of
from ..data import Images
from ..files import write_atomically
from ..model.cut import Cut, split
from ..model.graph import Graph
from ..plan import Candidate, Value
from ..search.goal import LOSS_TOLERANCE
from .job import Job
from .progress import Progress, of_training
from .spending import Outcome, Task, scaled
from .teachers import Teachers
from .wanted import Wanted, wanted_units

# Validation pictures that a cell must win something on after its first phase.
SELECTION_PICTURES = 1000
# Of a code's bits, what its coder leaves: a guess before any training.
_CODED = 0.4


class Done(Value, frozen=True, kw_only=True):
    """What was kept of the cells of one cut: files of units, and how many first phases it took."""

    names: list[str]
    num_begun: int


class UnitTrainer:
    """Trains the units that a job asks for in one network; `units` are those that there are so far.

    Of the papers' grid, each training to its end, `num_cells` are asked for; `num_begun` ran their first phase,
    `num_finished` to their end, now or in an earlier build.

    Args:
        job: what is wanted.
        graph: the network that gets the units: the unmodified one, or one that was pruned.
        network: the sha256 of its weights.
        teachers: of all trainings.
        folder: where units and checkpoints are kept.
        known: measured candidates of the unmodified network, for what a training may gain; none where nobody asks.
        macs_share: the network's multiply-accumulates over the unmodified one's.
        progress: is told each training step.

    Raises:
        CutError, JobError, ModelError: a unit does not fit the network.
    """

    def __init__(
        self,
        job: Job,
        graph: Graph,
        network: str,
        teachers: Teachers,
        folder: Path,
        known: Sequence[Candidate] = (),
        *,
        macs_share: float = 1.0,
        progress: Progress,
    ) -> None:
        self._job, self._graph, self._teachers, self._folder = job, graph, teachers, folder
        self._known, self._macs_share, self._progress = known, macs_share, progress
        self._network = network
        self._views = Views(is_mirrored=job.bottleneck.mirror, mixes=job.bottleneck.mixes)
        self._wanted = list(wanted_units(job.bottleneck, graph))
        self._checkpoints: list[Path] = []
        self.units: list[Trained] = []
        self.num_cells = sum(1 if unit.bits_loss is None else unit.spec.bits for unit in self._wanted)
        self.num_begun = self.num_finished = 0

    @property
    def text(self) -> str:
        """One line for people."""
        ran = f"{self.num_begun} ran their first phase, {self.num_finished} to their end"
        return f"units: of {self.num_cells} trainings of the whole grid {ran}"

    def tasks(self) -> list[Task]:
        """The cells of each cut together: what they share is computed once, and they are compared."""
        by_cut = groupby(self._wanted, key=lambda unit: (unit.cut.name, unit.spec.head_width > 0))
        return [self._task(list(cells)) for _, cells in by_cut]

    def _task(self, cells: list[Wanted]) -> Task:
        cut = cells[0].cut

        def run() -> Outcome:
            units = self._finished(cells)
            self.units += units
            self.num_finished += len(units)
            return Outcome(self._kept_candidates(units), [])

        return Task(
            f"{len(cells)} units at {cut.name} of {100 * self._macs_share:.0f} % of the network", len(cells),
            self._seconds(cells), lambda: [c for cell in cells for c in self._prospects(cell.cut, cell.spec)], run,
        )  # fmt: skip

    def _seconds(self, cells: Sequence[Wanted]) -> float:
        """What the trainings of one cut's cells are expected to take."""
        if self._job.build.minutes is None:
            return 0.0
        passes = 0.0
        for cell in cells:
            recipe, head = cell.recipe, cell.cut.compute_share
            behind = recipe.alone + recipe.together
            before = head if cell.spec.head_width else 0.0
            passes += behind * (1 - head + before) + recipe.whole + recipe.anew * 4 / 3
        return self._teachers.seconds(self._macs_share * passes, self._job.bottleneck.images)

    def _prospects(self, cut: Cut, spec: UnitSpec, *, num_bytes: float | None = None) -> list[Candidate]:
        """The main network's splits at this cut as they would be with a unit; `num_bytes`: what it sends, if known."""
        (crossing,) = cut.specs
        channels = crossing.shape[0] if len(crossing.shape) == 3 else crossing.shape[-1]
        symbols = spec.width * crossing.num_elements / channels / spec.stride**2
        sent = symbols * spec.bits / 8 * _CODED if num_bytes is None else num_bytes
        found = []
        for candidate in scaled(self._known, time=self._macs_share, crossing=1.0, cuts=(cut.name,)):
            share = min(1.0, symbols / crossing.num_elements)
            evidence = msgspec.structs.replace(
                candidate.evidence,
                payload_bytes=sent,
                encode_s=share * candidate.evidence.encode_s,
                decode_s=share * candidate.evidence.decode_s,
            )
            found.append(msgspec.structs.replace(candidate, evidence=evidence))
        return found

    def _kept_candidates(self, units: Sequence[Trained]) -> list[Candidate]:
        """What units are known to bring: at the rates that keep the goal's loss on the images of choice."""
        if not self._known:
            return []
        least = self._teachers.own_accuracy - self._job.goal.max_loss - LOSS_TOLERANCE
        return [
            candidate
            for unit in units
            for point in rates_of(unit.divided, self._teachers.validation, self._teachers.preprocess)
            if point.accuracy >= least
            for candidate in self._prospects(unit.cut, unit.divided.unit.spec, num_bytes=point.num_bytes)
        ]

    @cached_property
    def _teacher(self) -> Teacher:
        return self._teachers.of(self._job.bottleneck.images, self._views)

    @cached_property
    def _validation(self) -> Images:
        return self._teachers.validation.pick(slice(SELECTION_PICTURES))

    @cached_property
    def _given(self) -> tuple[Any, ...]:
        """All that the trainings of all cells, and the choice among them, depend on."""
        teachers = self._teachers
        images = teachers.source.drawn("train", self._job.bottleneck.images)
        pictures = (images.digest, self._validation.digest, teachers.preprocess, self._views)
        return (VERSIONS, teachers.weights_sha256, self._network, *pictures)

    def _finished(self, cells: list[Wanted]) -> list[Trained]:
        """The units of one cut's cells that no other dominates, from their files or trained now."""
        key = hashlib.sha256(msgspec.json.encode([self._given, *(_named(cell) for cell in cells)]))
        done = self._folder / f"{key.hexdigest()[:12]}.json"
        found = msgspec.json.decode(done.read_bytes(), type=Done) if done.is_file() else None
        # Where somebody removed a unit's file, the cells are trained again.
        if found is not None and all((self._folder / name).is_file() for name in found.names):
            self.num_begun += found.num_begun
            return [load_unit(self._folder / name, self._graph, network=self._network) for name in found.names]
        begun_before = self.num_begun
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
                network=self._network, recipes=[cell.recipe],
            )  # fmt: skip
        write_atomically(done, msgspec.json.encode(Done(names=names, num_begun=self.num_begun - begun_before)))
        for folder in self._checkpoints:
            shutil.rmtree(folder, ignore_errors=True)
        return [load_unit(self._folder / name, self._graph, network=self._network) for name in names]

    def _begun(self, cells: list[Wanted]) -> list[UnitTraining]:
        """The first phase of every cell, the widest of each stride first."""
        features: Tensor | None = None
        is_light = cells[0].spec.head_width > 0
        if is_cached(cells[0].spec, cells[0].recipe):
            self._progress(f"features at {cells[0].cut.name}", 0, 1, f"{len(self._teacher.images)} pictures")
            head, _ = split(self._graph, cells[0].cut)
            features = seen_by(head, self._teacher.images.pixels, self._teacher.preprocess, self._views)
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
        training = UnitTraining(
            self._graph, cell.cut, spec, self._teacher, cell.recipe,
            features=features,
            wider=start,
            checkpoints=self._folder,
            progress=of_training(self._progress, f"unit {cell.cut.name} {spec.name}"),
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
        return rates_of(training.divided, self._validation, self._teacher.preprocess)

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
