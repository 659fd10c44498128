"""The sections of a job file, each a value with its own rules; `job` puts them together."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from ..compress.budget import Budget
from ..compress.pruning import PruneRecipe
from ..compress.scores import Score
from ..errors import JobError, ModelError
from ..plan import Rule, Value


def usual_shift(side: int) -> int:
    """Pixels that a training picture of this side is shifted by at most.

    >>> usual_shift(32), usual_shift(8), usual_shift(224)
    (4, 1, 4)
    """
    return min(4, side // 8)


class ModelJob(Value, frozen=True, kw_only=True):
    """Which network; `mean` and `std` (of pixels / 255) override the network's own, `top` the reply's form."""

    source: str
    weights: str | None = None
    smaller: tuple[str, ...] = ()
    smaller_weights: dict[str, str] = {}
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    top: int | None = None


class DataJob(Value, frozen=True, kw_only=True):
    """Which pictures; `size` is (height, width) where the source has none of its own.

    `labels` false: labels are not used; accuracy is then agreement with the unmodified network's own answers.
    """

    source: str
    labels: bool = True
    size: tuple[int, int] | None = None
    holdout: str | None = None


class DeviceJob(Value, frozen=True, kw_only=True):
    """How many times slower the device is than the building machine, for fp32 and, if given, for int8.

    `power` is what its computing takes, in W: for energies.
    """

    slowdown: float = 1.0
    int8_slowdown: float | None = None
    power: float | None = None


class EdgeJob(Value, frozen=True, kw_only=True):
    """How loaded the edge is: a factor on its times."""

    load: float = 1.0


class LinkJob(Value, frozen=True, kw_only=True):
    """Rate and one-way delay, as text with units; the radio whose power sending takes, and the joules of its tail."""

    rate: str = "1 Mbit/s"
    delay: str = "5 ms"
    radio: Literal["3g", "4g", "wifi"] | None = None
    radio_tail: float = 0.0


class GoalJob(Value, frozen=True, kw_only=True):
    """What to minimise, the top-1 points that may be lost, and the joules that a request may take of the device.

    `max_size`: bytes of the files that the device needs; `max_memory`: of the memory that its segments need.
    """

    minimise: Literal["latency", "throughput", "bytes", "energy", "accuracy"] = "latency"
    max_loss: float = 1.0
    max_energy: float | None = None
    max_size: float | None = None
    max_memory: float | None = None


class BuildJob(Value, frozen=True, kw_only=True):
    """How much work: images of the three rounds of choice, images of the report, calibration pictures.

    `precisions` and `cuts` (shell patterns of cut names) narrow what is tried.  `keep_all`: every candidate is
    classified on all images and kept, however bad, for curves of bytes and accuracy.  `minutes` and `trainings` limit
    what trainings take together; they go where the menu gains most (`spending`).  `divisions`: a network with branches
    is also cut where no prefix of its layers ends, if a minimum cut says that it is best somewhere.
    """

    rounds: tuple[int, ...] = (250, 1000, 2000)
    report_images: int = 8000
    calibration_images: int = 512
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    cuts: tuple[str, ...] = ("*",)
    keep_all: bool = False
    divisions: bool = True
    minutes: float | None = None
    trainings: int | None = None


class BottleneckJob(Value, frozen=True, kw_only=True):
    """Units to train around cuts, and units that were trained before.

    A unit is trained at each of `cuts` for each of `widths` and `strides`, with the network's own layers before it
    where `light` is empty, else with a light head of each of these shares of the network's multiply-accumulates.
    `bits` "search" takes the fewest whose accuracy after the first phase is at most `bits_loss` points below that of 8.
    `prices` of 1,000 bits, in nats, give one rate each.  `epochs` are those of up to four phases: the unit alone, the
    unit and the tail, the whole network, and that on pictures mixed anew; on at most `images` pictures, mirrored ones
    too where `mirror`, and `mixes` mixes of each with another.  `labels`: of the loss, beside the network's own answers
    (mixed pictures have no label).  `units` are files of units that were trained before.  `base`: what they are trained
    in: the unmodified network, the smallest that step 1 of [prune] made within the goal's loss, or both.
    """

    cuts: tuple[str, ...] = ()
    widths: tuple[int, ...] = (8,)
    strides: tuple[int, ...] = (1,)
    light: tuple[float, ...] = ()
    bits: int | Literal["search"] = 6
    bits_loss: float = 0.5
    prepare: int = 0
    refine: int = 1
    prices: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    epochs: tuple[int, ...] = (4, 4, 0, 0)
    images: int = 50_000
    mirror: bool = True
    mixes: int = 1
    labels: float = 0.0
    seed: int = 0
    units: tuple[str, ...] = ()
    base: Literal["main", "pruned", "both"] = "main"


class ExitsJob(Value, frozen=True, kw_only=True):
    """Early exits to train at `cuts` (shell patterns), and such that were trained before (`files`).

    A classifier has `depth` convolutions of `width` channels (0: none; several: each halves height and width), then
    a mean and a linear layer; it learns for `epochs` with the network frozen and for `joint_epochs` with it, each
    exit's loss with its weight of `weights`, the end's last (none: all 1). `rule` says how sure an exit is;
    thresholds are chosen for each of `losses`, top-1 points against the unmodified network. `labels`, `images`,
    `mirror`, `mixes` and `seed` are as in BottleneckJob; at most `most` exits.
    """

    cuts: tuple[str, ...] = ()
    width: int = 0
    depth: int = 1
    epochs: int = 6
    joint_epochs: int = 0
    weights: tuple[float, ...] = ()
    rule: Rule = "confidence"
    losses: tuple[float, ...] = (0.0, 0.5, 1.0)
    labels: float = 0.3
    images: int = 50_000
    mirror: bool = True
    mixes: int = 0
    seed: int = 0
    most: int = 4
    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_number = all(0 <= loss < math.inf for loss in self.losses)
        if not self.losses or not is_number or list(self.losses) != sorted(set(self.losses)):
            raise JobError(f"[exits] losses must be points of 0 or more that rise, got {list(self.losses)}")
        counts = (self.width, self.epochs, self.joint_epochs, self.mixes)
        if min(counts) < 0 or min(self.images, self.most, self.depth) < 1:
            raise JobError("[exits] images, depth and most must be at least 1, width, epochs and mixes 0 or more")
        if not 0 <= self.labels <= 1 or any(weight <= 0 for weight in self.weights):
            raise JobError("[exits] labels must be a share of 0 to 1, weights above 0")
        if not 0 <= self.seed < 2**32:
            raise JobError(f"[exits] seed must be 0 to {2**32 - 1}, got {self.seed}")


class PruneJob(Value, frozen=True, kw_only=True):
    """Pruned networks to make of the main one, and such that were made before.

    Step 1 prunes layers of the whole network (of `region`, without `ignore`: shell patterns of layers) to each share
    `keep` of the `budget`, the largest first, each from the one before; a latency is that of the deployed network, or
    of its head up to the cut `latency_at`.  Step 2 makes a series for each of `cuts`: from the smallest of these that
    keeps the goal's loss, ever fewer channels cross there, in `counts` log-spaced steps (or to these counts) of
    `cut_epochs`, until one loses more.  `final_lr` and `cut_lr` are the learning rates of the final epochs and of step
    2 (None: `lr`).  Pictures are shifted by up to `shift` pixels in training (None: an eighth of their side, at most
    4).  The rest is as in `PruneRecipe`; `networks` are files of networks that were pruned before.
    """

    keep: tuple[float, ...] = ()
    budget: Budget = "macs"
    latency_at: str | None = None
    score: Score = "taylor"
    rounds: int = 4
    epochs: int = 1
    final_epochs: int = 4
    sparse_epochs: int = 0
    strength: float = 1e-4
    region: tuple[str, ...] = ("*",)
    ignore: tuple[str, ...] = ()
    least: int = 1
    multiple: int = 1
    unreachable: Literal["refuse", "nearest"] = "refuse"
    cuts: tuple[str, ...] = ()
    counts: int | tuple[int, ...] = 8
    cut_epochs: int = 1
    lr: float = 0.02
    final_lr: float | None = None
    cut_lr: float | None = None
    batch_size: int = 128
    images: int = 50_000
    mirror: bool = True
    mixes: int = 0
    labels: float = 0.3
    shift: int | None = None
    seed: int = 0
    networks: tuple[str, ...] = ()

    def recipe(self, keep: float, *, side: int = 32) -> PruneRecipe:
        """How step 1 comes to a share; pictures are at least `side` pixels high and wide.

        Raises:
            ModelError: a number is out of range.
        """
        return PruneRecipe(
            keep=keep, budget=self.budget, latency_at=self.latency_at, score=self.score,
            rounds=self.rounds, epochs=self.epochs, final_epochs=self.final_epochs,
            sparse_epochs=self.sparse_epochs, strength=self.strength,
            region=self.region, ignore=self.ignore, least=self.least, multiple=self.multiple,
            unreachable=self.unreachable, batch_size=self.batch_size,
            lr=self.lr, final_lr=self.lr if self.final_lr is None else self.final_lr,
            label_share=self.labels, shift=usual_shift(side) if self.shift is None else self.shift, seed=self.seed,
        )  # fmt: skip

    def cut_recipe(self, *, side: int = 32) -> PruneRecipe:
        """How step 2 comes from one count to the next; the share is set there.

        Raises:
            ModelError: a number is out of range.
        """
        rate = self.lr if self.cut_lr is None else self.cut_lr
        return msgspec.structs.replace(
            self.recipe(0.5, side=side), latency_at=None, final_epochs=self.cut_epochs, final_lr=rate, sparse_epochs=0
        )

    def __post_init__(self) -> None:
        if list(self.keep) != sorted(set(self.keep), reverse=True):
            raise JobError(f"[prune] keep must be shares that fall, got {list(self.keep)}")
        if self.latency_at is not None and self.budget != "latency":
            raise JobError(f'[prune] latency_at is for the budget "latency", got "{self.budget}"')
        if self.budget == "channels":
            raise JobError('[prune] budget must be "macs", "parameters" or "latency", got "channels"')
        given = (self.counts,) if isinstance(self.counts, int) else self.counts
        if not given or min(given) < 1 or list(given) != sorted(set(given), reverse=True):
            raise JobError(f"[prune] counts must be how many, or counts of 1 and more that fall, got {self.counts}")
        if self.images < 1 or min(self.cut_epochs, self.mixes, self.shift or 0) < 0:
            raise JobError("[prune] images must be at least 1, cut_epochs, mixes and shift 0 or more")
        if not 0 <= self.seed < 2**32:
            raise JobError(f"[prune] seed must be 0 to {2**32 - 1}, got {self.seed}")
        try:
            for keep in self.keep or (0.5,):
                self.recipe(keep)
            self.cut_recipe()
        except ModelError as error:
            raise JobError(f"[prune] {error}") from error
