"""Training a unit at a cut of a trained network, from labels or from the network's own answers alone.

    phase       network's own head                     light head
    alone       unit before the frozen tail,           head and unit, to give what the network's own layers give,
                on features computed once              the tail left out
    together    unit and tail, on the same             head, unit and tail, on pictures
    whole       head, unit and tail, on pictures       the same for longer
    anew        the same, on pictures mixed anew each time, the unmodified network answering just these

The loss is distillation from the unmodified network, with a share of labels where every view has one, plus the price
of the bits at the rate that the batch was drawn for; a light head begins with imitation in place of distillation.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..data import Images
from ..errors import DataError, ModelError
from ..model.cut import Cut, split
from ..model.graph import Graph, first_of
from ..model.zoo import weights_digest
from ..plan import Preprocess, Value
from .batches import AnsweredBatches, Augment, Batches, FeatureBatches, PictureBatches, Views, as_inputs, seen_by
from .bottleneck import Unit, UnitSpec
from .divided import Before, Behind, Divided, insert_unit
from .hardware import training_device
from .losses import Loss, distillation, imitation, rate_distortion
from .train import Schedule, Step, fit

START_PICTURES = 512
# What else a training depends on: the number is raised when this code trains otherwise.
VERSIONS = ("unit-training-4", f"torch {torch.__version__}")
Progress = Callable[[str, Step], None]


class UnitRecipe(Value, frozen=True, kw_only=True):
    """How a unit is trained: epochs of the four phases, `prices` of 1,000 bits for each rate (in nats of the loss).

    `network_share`: of the learning rate, for the network's own layers beside what is new.

    Raises:
        ModelError: no price, or prices that do not rise.
    """

    alone: int = 6
    together: int = 6
    whole: int = 0
    anew: int = 0
    lr: float = 2e-3
    together_lr: float = 5e-4
    whole_lr: float = 2e-4
    anew_lr: float = 2e-4
    network_share: float = 1.0
    prices: tuple[float, ...] = (0.02,)
    temperature: float = 2.0
    label_share: float = 0.0
    weight_decay: float = 1e-4
    batch_size: int = 128
    shift: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        is_priced = bool(self.prices) and all(0 <= price < math.inf for price in self.prices)
        if not is_priced or list(self.prices) != sorted(self.prices):
            raise ModelError(f"a unit's prices must be 0 or more and rise, got {list(self.prices)}")


def is_cached(spec: UnitSpec, recipe: UnitRecipe) -> bool:
    """Whether a training sees what its cut's head makes of all pictures, rather than of a few to begin with."""
    return recipe.alone > 0 or (recipe.together > 0 and not spec.head_width)


class RatePoint(NamedTuple):
    """What a unit sends and keeps at one rate: mean bytes by its own prior, top-1 in percent, of how many images."""

    rate: int
    num_bytes: float
    accuracy: float
    num_images: int


class Teacher(NamedTuple):
    """What all that is made of one network is trained on: pictures, its own logits of each of their views, itself."""

    images: Images
    preprocess: Preprocess
    views: Views
    logits: Tensor
    network: nn.Module


def teacher_of(graph: Graph, images: Images, preprocess: Preprocess, views: Views) -> Teacher:
    """The network's own logits of all views of all pictures, computed once for all of its units."""
    logits = seen_by(graph.module, images.pixels, preprocess, views)
    return Teacher(images, preprocess, views, logits, graph.module)


class UnitTraining:
    """The training of one unit of `spec` at `cut`, phase by phase; `divided` is what has been trained so far.

    Args:
        graph: the captured network; it is left as it is.
        cut: where one tensor crosses.
        spec: the unit's shape; as many gains as the recipe has prices.
        teacher: pictures with the network's own logits.
        recipe: how long, at what price.
        features: `seen_by` the cut's head for all pictures, where they were computed before.
        wider: a trained unit of the same cut and stride to begin with.
        trained: head, unit of the same spec and tail, to be trained on.
        checkpoints: folder where trainings keep theirs, each in a folder of its own (`checkpoints`, named after all
            that the training depends on); one that finds it goes on.
        progress: is told the phase and each step.

    Raises:
        CutError, ModelError: the unit does not fit.
        DataError: fewer pictures than a batch.
    """

    def __init__(
        self,
        graph: Graph,
        cut: Cut,
        spec: UnitSpec,
        teacher: Teacher,
        recipe: UnitRecipe,
        *,
        features: Tensor | None = None,
        wider: Unit | None = None,
        trained: Divided | None = None,
        checkpoints: Path | None = None,
        progress: Progress | None = None,
    ) -> None:
        if len(spec.gains) != len(recipe.prices):
            rates = f"{len(spec.gains)} rates need as many prices, got {len(recipe.prices)}"
            raise ModelError(f"{rates} (unit {spec.name})")
        count = len(teacher.images)
        if count < recipe.batch_size:
            raise DataError(f"training a unit needs at least {recipe.batch_size} pictures, got {count}")
        torch.manual_seed(recipe.seed)
        self._device = training_device()
        self.divided = insert_unit(graph, cut, spec).to(self._device)
        self._graph, self._cut, self._teacher, self._recipe = graph, cut, teacher, recipe
        start = trained if trained is not None else wider
        begun = None if start is None else weights_digest(start)
        own, taught_by = weights_digest(graph.module), weights_digest(teacher.network)
        given = (
            *(VERSIONS, own, cut.name, spec, recipe),
            *(teacher.images.digest, teacher.preprocess, teacher.views, begun),
            *([] if taught_by == own else [taught_by]),
        )
        self._key = hashlib.sha256(msgspec.json.encode(given)).hexdigest()
        self.checkpoints = None if checkpoints is None else checkpoints / f"{spec.name}.{self._key[:12]}.training"
        self._progress = progress
        self._is_light = spec.head_width > 0
        if features is None and is_cached(spec, recipe):
            features = self._seen(teacher.images.pixels)
        self._features = features
        # A mixed picture has no label.
        self._labels = None if teacher.views.mixes else teacher.images.labels
        share = recipe.label_share if self._labels is not None else 0.0
        self._task = distillation(temperature=recipe.temperature, label_share=share)
        if trained is not None:
            self.divided.load_state_dict(trained.state_dict())
        else:
            self._start(wider)

    @torch.no_grad()
    def _start(self, wider: Unit | None) -> None:
        """The unit as it is before training: from principal components, from a wider one, or behind a light head."""
        unit, first = self.divided.unit, self._teacher.images.pixels[:START_PICTURES]
        if self._is_light:
            pictures = as_inputs(first, self._teacher.preprocess).to(self._device)
            unit.start_grid_from(first_of(self.divided.head(pictures)))
            return
        seen = self._seen(first) if self._features is None else self._features
        features = seen[0, :START_PICTURES].float().to(self._device)
        if not features.isfinite().all():
            raise ModelError(f'of training pictures the network gives values at "{self._cut.name}" that are no numbers')
        if wider is None:
            unit.start_from(features)
        else:
            unit.start_from_wider(wider, features)

    def _seen(self, pixels: NDArray[np.uint8]) -> Tensor:
        """What the network's own head makes of pictures, in all views."""
        head, _ = split(self._graph, self._cut)
        return seen_by(head, pixels, self._teacher.preprocess, self._teacher.views)

    def alone(self) -> None:
        """The unit, or the unit and its light head; the rest of the network is as it was.

        Raises:
            ModelError: the loss became NaN.
            WeightsError: the checkpoint is of another training.
        """
        divided, recipe = self.divided, self._recipe
        divided.requires_grad_(False)
        divided.unit.requires_grad_(True)
        if not recipe.alone:
            return
        if self._is_light:
            divided.head.requires_grad_(True)
            pictures = self._pictures(shift=0, features=self._features)
            self._fit("alone", Before(divided), pictures, imitation(), recipe.alone, recipe.lr)
        else:
            self._fit("alone", Behind(divided), self._behind(), self._task, recipe.alone, recipe.lr)

    def together(self) -> None:
        """The unit (and a light head) and the tail.  Raises as `alone`."""
        divided, recipe = self.divided, self._recipe
        divided.requires_grad_(True)
        divided.head.requires_grad_(self._is_light)
        if self._is_light and recipe.alone and recipe.together:
            # What the head gives has grown while it learned, and the steps have hardly moved.
            self._start(None)
        module: nn.Module = divided if self._is_light else Behind(divided)
        if recipe.together:
            batches: Batches = self._pictures(shift=recipe.shift) if self._is_light else self._behind()
            self._fit("together", module, batches, self._task, recipe.together, recipe.together_lr)

    def whole(self) -> None:
        """Head, unit and tail.  Raises as `alone`."""
        recipe = self._recipe
        self.divided.requires_grad_(True)
        if recipe.whole:
            self._fit(
                "whole", self.divided, self._pictures(shift=recipe.shift), self._task, recipe.whole, recipe.whole_lr
            )

    def anew(self) -> None:
        """Head, unit and tail, without labels.  Raises as `alone`."""
        recipe = self._recipe
        self.divided.requires_grad_(True)
        if recipe.anew:
            task = distillation(temperature=recipe.temperature)
            self._fit("anew", self.divided, self._answered(), task, recipe.anew, recipe.anew_lr)

    def _behind(self) -> FeatureBatches:
        assert self._features is not None
        recipe, teacher = self._recipe, self._teacher
        return FeatureBatches(
            self._features, self._labels,
            batch_size=recipe.batch_size, seed=recipe.seed, teacher=teacher.logits,
        )  # fmt: skip

    def _pictures(self, *, shift: int, features: Tensor | None = None) -> PictureBatches:
        recipe, teacher = self._recipe, self._teacher
        return PictureBatches(
            teacher.images.pixels, self._labels, teacher.preprocess,
            batch_size=recipe.batch_size,
            augment=Augment(shift, teacher.views),
            seed=recipe.seed,
            teacher=teacher.logits,
            features=features,
        )  # fmt: skip

    def _answered(self) -> AnsweredBatches:
        recipe, teacher = self._recipe, self._teacher
        plain = teacher.views._replace(mixes=0)
        pictures = PictureBatches(
            teacher.images.pixels, None, teacher.preprocess,
            batch_size=recipe.batch_size,
            augment=Augment(recipe.shift, plain),
            seed=recipe.seed,
            teacher=teacher.logits[: plain.num_views],
        )  # fmt: skip
        network = copy.deepcopy(teacher.network).to(self._device)
        return AnsweredBatches(pictures, network, seed=recipe.seed)

    def _fit(self, phase: str, module: nn.Module, batches: Batches, task: Loss, epochs: int, lr: float) -> None:
        progress = self._progress
        fit(
            module,
            batches,
            rate_distortion(task, self._recipe.prices),
            schedule=Schedule(lr=lr, epochs=epochs, weight_decay=self._recipe.weight_decay, optimizer="adam"),
            checkpoint=None if self.checkpoints is None else self.checkpoints / f"{phase}.safetensors",
            progress=None if progress is None else partial(progress, phase),
            seed=self._recipe.seed,
            key=self._key,
            slower={} if self._is_light else dict.fromkeys(("head", "tail"), self._recipe.network_share),
        )
        self.divided.eval()


@torch.inference_mode()
def rates_of(
    divided: Divided, images: Images, preprocess: Preprocess, *, batch_size: int = 250
) -> tuple[RatePoint, ...]:
    """Bytes and top-1 at each rate, in torch and by the unit's own prior: what training expects of the deployed form.

    Raises:
        DataError: the images have no labels.
    """
    if images.labels is None:
        raise DataError("accuracy needs labels, the images have none")
    device = next(divided.parameters()).device
    rates = range(len(divided.unit.spec.gains))
    hits, bits = np.zeros(len(rates)), np.zeros(len(rates))
    for first in range(0, len(images), batch_size):
        part = slice(first, first + batch_size)
        features = first_of(divided.head(as_inputs(images.pixels[part], preprocess).to(device)))
        for rate in rates:
            restored, cost = divided.unit(features, rate)
            right = first_of(divided.tail(restored)).argmax(1).cpu().numpy() == images.labels[part]
            hits[rate] += right.sum()
            bits[rate] += float(cost.sum())
    count = len(images)
    return tuple(RatePoint(k, float(bits[k]) / 8 / count, 100 * float(hits[k]) / count, count) for k in rates)
