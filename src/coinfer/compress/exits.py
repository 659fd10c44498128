"""Classifiers at cuts of a trained network, for answers that come early.

    ExitHead         a small classifier of what crosses at a cut: a map, tokens or a vector
    train_exits      with the network frozen, each on features that were computed once
    train_jointly    network and exits together, by BranchyNet's weighted sum
    temperature_of   the softmax temperature that fits answers to unseen images best

What is learned is the unmodified network's own answer (distillation), with a share of labels where there are any.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor, nn

from ..errors import CutError, ModelError
from ..model.cut import Cut, parts_of, split
from ..model.graph import Graph, first_of
from ..model.zoo import weights_digest
from ..plan import TensorSpec, Value
from .batches import Augment, FeatureBatches, PictureBatches, seen_by
from .hardware import training_device
from .losses import Batch, Loss, distillation
from .train import Schedule, Step, fit
from .unit_training import Teacher

VERSIONS = ("exits-2", f"torch {torch.__version__}")
Progress = Callable[[str, Step], None]


class ExitSpec(Value, frozen=True, kw_only=True):
    """The shape of an exit: `depth` 3 x 3 convolutions of `width` channels (or linear maps) before the mean; 0: none.

    Each has a batch norm behind it, and where there are several each halves height and width.

    Raises:
        ModelError: a width below 0 or a depth below 1.
    """

    width: int = 0
    depth: int = 1

    def __post_init__(self) -> None:
        if self.width < 0 or self.depth < 1:
            given = f"width {self.width}, depth {self.depth}"
            raise ModelError(f"an exit's width must be 0 or more, its depth 1 or more, got {given}")


class ExitRecipe(Value, frozen=True, kw_only=True):
    """How exits are trained: `epochs` with the network frozen, `joint_epochs` with all of it.

    `weights` are BranchyNet's, of each exit's loss in the sum, the end's last (none: all 1).

    Raises:
        ModelError: epochs below 0, a rate or weight of 0 or below, a share of labels that is none.
    """

    epochs: int = 6
    joint_epochs: int = 0
    lr: float = 2e-3
    joint_lr: float = 2e-4
    temperature: float = 2.0
    label_share: float = 0.3
    weights: tuple[float, ...] = ()
    weight_decay: float = 1e-4
    batch_size: int = 128
    shift: int = 4
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.epochs, self.joint_epochs) < 0 or self.batch_size < 1:
            raise ModelError(f"exits train for epochs of 0 or more, batches of 1 or more, got {self}")
        if not (self.lr > 0 and self.joint_lr > 0 and 0 <= self.label_share <= 1):
            raise ModelError(f"exits need learning rates above 0 and a label share of 0 to 1, got {self}")
        if any(weight <= 0 for weight in self.weights):
            raise ModelError(f"the weights of exits must be above 0, got {list(self.weights)}")


class ExitHead(nn.Module):
    """A classifier of one crossing tensor: (C, H, W), (T, C) or (C).

    Raises:
        CutError: the tensor is none of these.
    """

    def __init__(self, crossing: TensorSpec, num_classes: int, spec: ExitSpec) -> None:
        super().__init__()
        if len(crossing.shape) not in (1, 2, 3) or crossing.dtype != "float32":
            allowed = "float32 maps (C, H, W), tokens (T, C) or vectors (C)"
            raise CutError(f'an exit needs {allowed}, "{crossing.name}" is {crossing.dtype} {crossing.shape}')
        self._rank = len(crossing.shape)
        channels = crossing.shape[0] if self._rank == 3 else crossing.shape[-1]
        layers: list[nn.Module] = []
        for _ in range(spec.depth if spec.width else 0):
            if self._rank == 3:
                conv = nn.Conv2d(channels, spec.width, 3, stride=2 if spec.depth > 1 else 1, padding=1)
                layers += [conv, nn.BatchNorm2d(spec.width)]
            else:
                layers.append(nn.Linear(channels, spec.width))
            layers.append(nn.ReLU())
            channels = spec.width
        self.features = nn.Sequential(*layers)
        self.classify = nn.Linear(channels, num_classes)

    def forward(self, features: Tensor) -> Tensor:
        """Logits (N, K)."""
        x = self.features(features)
        if self._rank == 3:
            x = x.mean((2, 3))
        elif self._rank == 2:
            x = x.mean(1)
        logits: Tensor = self.classify(x)
        return logits


class WithExits(nn.Module):
    """A network in parts with an exit behind each but the last: gives all their logits, the end's last."""

    def __init__(self, parts: Sequence[nn.Module], exits: Sequence[ExitHead]) -> None:
        super().__init__()
        self.parts, self.exits = nn.ModuleList(parts), nn.ModuleList(exits)

    @property
    def classifiers(self) -> tuple[ExitHead, ...]:
        """The exits, in order."""
        return tuple(exit for exit in self.exits if isinstance(exit, ExitHead))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, K) of every exit and of the end."""
        found, crossing = [], (x,)
        for place, part in enumerate(self.parts):
            given = part(*crossing)
            if place < len(self.exits):
                crossing = given
                found.append(self.exits[place](given[0]))
            else:
                found.append(first_of(given))
        return tuple(found)

    def train(self, mode: bool = True) -> WithExits:
        """The network's own batch norms and dropouts stay as they are evaluated."""
        super().train(mode)
        self.parts.eval()
        return self


def weighted_sum(task: Loss, weights: Sequence[float]) -> Loss:
    """The sum of a loss over the outputs of `WithExits`, each with its weight (BranchyNet, 2016, section III)."""

    def loss(outputs: Any, batch: Batch) -> Tensor:
        if len(outputs) != len(weights):
            raise ModelError(f"{len(outputs)} outputs need as many weights, got {len(weights)}")
        return torch.stack([weight * task(part, batch) for weight, part in zip(weights, outputs, strict=True)]).sum()

    return loss


def check_cuts(graph: Graph, cuts: Sequence[Cut]) -> None:
    """Refuse cuts where no exits can be.

    Raises:
        CutError: several tensors cross.
        ModelError: the network's first output is no classes, or it takes one picture at a time.
    """
    if len(graph.outputs[0].shape) != 1 or graph.outputs[0].shape[0] < 2:
        shape = graph.outputs[0].shape
        raise ModelError(f"an exit learns classes from the network's first output, which is of shape {shape}")
    if graph.why_fixed_batch is not None:
        raise ModelError(f"training needs batches, but this network takes one at a time: {graph.why_fixed_batch}")
    for cut in cuts:
        if len(cut.specs) != 1:
            names = ", ".join(spec.name for spec in cut.specs)
            raise CutError(f'an exit needs a cut that one tensor crosses, at "{cut.name}" cross {names}')


def train_exits(
    graph: Graph,
    cuts: Sequence[Cut],
    spec: ExitSpec,
    teacher: Teacher,
    recipe: ExitRecipe,
    *,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> tuple[ExitHead, ...]:
    """An exit at each of `cuts`, the network frozen: minutes, since features are computed once for each.

    Args:
        graph: the captured network; it is left as it is.
        cuts: where one tensor crosses, in order.
        spec: the exits' shape.
        teacher: pictures with the unmodified network's logits.
        recipe: how long.
        checkpoints: folder where trainings keep theirs, by all that they depend on; one that finds it goes on.
        progress: is told the exit's name and each step.

    Raises:
        CutError, ModelError: as `check_cuts`; the loss became NaN.
        DataError: fewer pictures than a batch.
    """
    check_cuts(graph, cuts)
    device, num_classes = training_device(), graph.outputs[0].shape[0]
    found = []
    for cut in cuts:
        torch.manual_seed(recipe.seed)
        head, _ = split(graph, cut)
        exit_head = ExitHead(cut.specs[0], num_classes, spec).to(device)
        features = seen_by(head, teacher.images.pixels, teacher.preprocess, teacher.views)
        labels = None if teacher.views.mixes else teacher.images.labels
        batches = FeatureBatches(
            features, labels, batch_size=recipe.batch_size, seed=recipe.seed, teacher=teacher.logits
        )  # fmt: skip
        key = _key(graph, (cut,), spec, teacher, recipe)
        fit(
            exit_head,
            batches,
            distillation(
                temperature=recipe.temperature, label_share=recipe.label_share if labels is not None else 0.0
            ),
            schedule=Schedule(
                lr=recipe.lr, epochs=recipe.epochs, weight_decay=recipe.weight_decay, optimizer="adam"
            ),
            checkpoint=None if checkpoints is None else checkpoints / f"{key[:12]}.exit.safetensors",
            progress=None if progress is None else partial(progress, f"exit at {cut.name}"),
            seed=recipe.seed,
            key=key,
        )  # fmt: skip
        found.append(exit_head.eval())
    return tuple(found)


def train_jointly(
    graph: Graph,
    cuts: Sequence[Cut],
    heads: Sequence[ExitHead],
    teacher: Teacher,
    recipe: ExitRecipe,
    *,
    checkpoints: Path | None = None,
    progress: Progress | None = None,
) -> WithExits:
    """Network and exits together, from exits that were trained before; copies are trained.

    Args, Raises: as `train_exits`; `heads` are the exits to begin with.
    """
    check_cuts(graph, cuts)
    torch.manual_seed(recipe.seed)
    parts = copy.deepcopy(parts_of(graph, cuts))
    module = WithExits(parts, copy.deepcopy(list(heads))).to(training_device())
    weights = recipe.weights or (1.0,) * (len(cuts) + 1)
    labels = None if teacher.views.mixes else teacher.images.labels
    share = recipe.label_share if labels is not None else 0.0
    batches = PictureBatches(
        teacher.images.pixels, labels, teacher.preprocess,
        batch_size=recipe.batch_size, augment=Augment(recipe.shift, teacher.views), seed=recipe.seed,
        teacher=teacher.logits,
    )  # fmt: skip
    key = _key(graph, cuts, ExitSpec(), teacher, recipe) + weights_digest(nn.ModuleList(heads))
    fit(
        module,
        batches,
        weighted_sum(distillation(temperature=recipe.temperature, label_share=share), weights),
        schedule=Schedule(
            lr=recipe.joint_lr, epochs=recipe.joint_epochs, weight_decay=recipe.weight_decay, optimizer="adam"
        ),
        checkpoint=None if checkpoints is None else checkpoints / f"{key[:12]}.joint.safetensors",
        progress=None if progress is None else partial(progress, "exits and network"),
        seed=recipe.seed,
        key=key,
    )  # fmt: skip
    return module.eval()


def _key(graph: Graph, cuts: Sequence[Cut], spec: ExitSpec, teacher: Teacher, recipe: ExitRecipe) -> str:
    given = (
        *(VERSIONS, weights_digest(graph.module), [cut.name for cut in cuts], spec, recipe),
        *(teacher.images.digest, teacher.preprocess, teacher.views),
    )
    return hashlib.sha256(msgspec.json.encode(given)).hexdigest()


def temperature_of(logits: NDArray[np.floating], labels: NDArray[np.int64]) -> float:
    """The temperature of least negative log-likelihood (Guo et al., 2017, arXiv:1706.04599), 0.05 to 20.

    Args:
        logits: (N, K) of images that no training has seen.
        labels: (N,) their classes.
    """
    given = np.asarray(logits, np.float64)

    def cost(log_temperature: float) -> float:
        scaled = given / np.exp(log_temperature)
        top = scaled.max(1)
        of_all = top + np.log(np.exp(scaled - top[:, None]).sum(1))
        return float(np.mean(of_all - scaled[np.arange(len(labels)), labels]))

    return float(np.exp(minimize_scalar(cost, bounds=(np.log(0.05), np.log(20.0)), method="bounded").x))
