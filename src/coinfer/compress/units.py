"""Training a unit at a cut of a trained network, from labels or from the network's own answers alone.

    head frozen      features computed once (as they are and mirrored), then: the unit alone, the unit and the tail
    light head       from pictures: head and unit before the frozen tail, then all three

The loss is distillation from the unmodified network (with a share of labels where they are known) plus the price of
the bits at the rate that the batch was drawn for.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..data import Images
from ..errors import DataError, ModelError
from ..model.cut import Cut
from ..model.graph import Graph
from ..plan import Preprocess, Value
from .batches import Augment, Batches, FeatureBatches, PictureBatches, as_inputs, seen_by
from .bottleneck import Unit, UnitSpec
from .divided import Behind, Divided, features_of, insert_unit
from .losses import distillation, rate_distortion
from .train import Schedule, Step, fit, training_device

START_PICTURES = 512
Progress = Callable[[str, Step], None]


class UnitRecipe(Value, frozen=True, kw_only=True):
    """How a unit is trained: epochs of the two phases, `prices` of 1,000 bits for each rate (in nats of the loss).

    Raises:
        ModelError: no price, or prices that do not rise.
    """

    alone: int = 6
    together: int = 6
    lr: float = 2e-3
    together_lr: float = 5e-4
    prices: tuple[float, ...] = (0.02,)
    temperature: float = 2.0
    label_share: float = 0.0
    batch_size: int = 128
    shift: int = 4
    is_mirrored: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prices or min(self.prices) < 0 or list(self.prices) != sorted(self.prices):
            raise ModelError(f"a unit's prices must be 0 or more and rise, got {list(self.prices)}")


class RatePoint(NamedTuple):
    """What a unit sends and keeps at one rate: mean bytes by its own prior, top-1 in percent, of how many images."""

    rate: int
    num_bytes: float
    accuracy: float
    num_images: int


class Teacher(NamedTuple):
    """What every unit of one network is trained on: pictures, labels (or None) and the network's own logits."""

    images: Images
    preprocess: Preprocess
    logits: Tensor


def teacher_of(graph: Graph, images: Images, preprocess: Preprocess, *, is_mirrored: bool) -> Teacher:
    """The network's own logits of all pictures (and mirrored), computed once for all of its units."""
    network = copy.deepcopy(graph.module).to(training_device())
    return Teacher(images, preprocess, seen_by(network, images.pixels, preprocess, is_mirrored=is_mirrored))


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
        checkpoints: folder where each phase keeps its own; a training that finds them goes on.
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
        device = training_device()
        self.divided = insert_unit(graph, cut, spec).to(device)
        self._recipe, self._checkpoints, self._progress = recipe, checkpoints, progress
        pixels, labels = teacher.images.pixels, teacher.images.labels
        share = recipe.label_share if labels is not None else 0.0
        task = distillation(temperature=recipe.temperature, label_share=share)
        self._loss = rate_distortion(task, recipe.prices)
        self._batches: Batches
        self._module: nn.Module = self.divided
        if spec.head_width:
            first = as_inputs(pixels[:START_PICTURES], teacher.preprocess).to(device)
            with torch.no_grad():
                self.divided.unit.start_grid_from(features_of(self.divided.head(first)))
            augment = Augment(shift=recipe.shift, is_mirrored=recipe.is_mirrored)
            self._batches = PictureBatches(
                pixels, labels, teacher.preprocess,
                batch_size=recipe.batch_size, augment=augment, seed=recipe.seed, teacher=teacher.logits,
            )  # fmt: skip
            return
        if features is None:
            features = seen_by(self.divided.head, pixels, teacher.preprocess, is_mirrored=recipe.is_mirrored)
        start = features[0, :START_PICTURES].float().to(device)
        if wider is None:
            self.divided.unit.start_from(start)
        else:
            self.divided.unit.start_from_wider(wider, start)
        self._batches = FeatureBatches(
            features, labels, batch_size=recipe.batch_size, seed=recipe.seed, teacher=teacher.logits
        )
        self._module = Behind(self.divided)

    def alone(self) -> None:
        """The unit (and a light head) before the frozen tail.

        Raises:
            ModelError: the loss became NaN.
            WeightsError: the checkpoint is of another training.
        """
        self._fit("alone", self._recipe.alone, self._recipe.lr)

    def together(self) -> None:
        """The unit (and a light head) and the tail.  Raises as `alone`."""
        self._fit("together", self._recipe.together, self._recipe.together_lr)

    def _fit(self, phase: str, epochs: int, lr: float) -> None:
        divided, progress = self.divided, self._progress
        divided.head.requires_grad_(bool(divided.unit.spec.head_width))
        divided.unit.requires_grad_(True)
        divided.tail.requires_grad_(phase == "together")
        if epochs:
            fit(
                self._module,
                self._batches,
                self._loss,
                schedule=Schedule(lr=lr, epochs=epochs, weight_decay=1e-4, optimizer="adam"),
                checkpoint=None if self._checkpoints is None else self._checkpoints / f"{phase}.safetensors",
                progress=None if progress is None else partial(progress, phase),
                seed=self._recipe.seed,
            )
        divided.eval()


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
        features = features_of(divided.head(as_inputs(images.pixels[part], preprocess).to(device)))
        for rate in rates:
            restored, cost = divided.unit(features, rate)
            right = divided.tail(restored).argmax(1).cpu().numpy() == images.labels[part]
            hits[rate] += right.sum()
            bits[rate] += float(cost.sum())
    count = len(images)
    return tuple(RatePoint(k, float(bits[k]) / 8 / count, 100 * float(hits[k]) / count, count) for k in rates)
