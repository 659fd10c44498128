"""The job file: what to build, from what, for which conditions.  TOML in, values only.

    [model]
    source = "resnet56"                 # a built-in name, or "package.module:factory"
    weights = "weights/cifar10_resnet56.safetensors"
    smaller = ["resnet32", "resnet20"]  # honest rivals for the device alone
    [data]
    source = "cifar10"
    [device]
    slowdown = 30.0
    [link]
    rate = "1 Mbit/s"
    delay = "5 ms"
    [goal]
    minimise = "latency"
    max_loss = 1.0
    [bottleneck]                        # optional: units to train around a cut, see BottleneckJob
    cuts = ["layer2.8#0"]
    widths = [16]
    strides = [2]
    light = [0.1]
    [prune]                             # optional: smaller networks to make of it, see PruneJob
    keep = [0.5, 0.25]
    cuts = ["layer2.8#0"]

Paths (weights, `folder:PATH`) are relative to the job file's folder; the module of a factory is looked for in
the current folder and the environment.  Weights of a smaller network are looked for beside
the main network's, in the file of the same name with the network's name exchanged, unless
`smaller_weights` names them.
"""

from __future__ import annotations

import math
import tomllib
from pathlib import Path
from typing import Literal

import msgspec

from ..compress.budget import Budget
from ..compress.pruning import PruneRecipe
from ..compress.scores import Score
from ..errors import JobError, ModelError, PlanError, UsageError
from ..plan import Value
from ..profile import RADIOS, Conditions, Link, Slowdown
from ..search.goal import Goal
from ..units import parse_duration_s, parse_rate_bps


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

    `max_size`: bytes of the files that the device needs.
    """

    minimise: Literal["latency", "throughput", "bytes", "energy"] = "latency"
    max_loss: float = 1.0
    max_energy: float | None = None
    max_size: float | None = None


class BuildJob(Value, frozen=True, kw_only=True):
    """How much work: images of the three rounds of choice, images of the report, calibration pictures.

    `precisions` and `cuts` (shell patterns of cut names) narrow what is tried.  `keep_all`: every candidate is
    classified on all images and kept, however bad, for curves of bytes and accuracy.  `minutes` and `trainings` limit
    what trainings take together; they go where the menu gains most (`spending`).
    """

    rounds: tuple[int, ...] = (250, 1000, 2000)
    report_images: int = 8000
    calibration_images: int = 512
    precisions: tuple[Literal["fp32", "int8"], ...] = ("fp32", "int8")
    cuts: tuple[str, ...] = ("*",)
    keep_all: bool = False
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


class PruneJob(Value, frozen=True, kw_only=True):
    """Pruned networks to make of the main one, and such that were made before.

    Step 1 prunes layers of the whole network (of `region`, without `ignore`: shell patterns of layers) to each share
    `keep` of the `budget`, the largest first, each from the one before; a latency is that of the deployed network, or
    of its head up to the cut `latency_at`.  Step 2 makes a series for each of `cuts`: from the smallest of these that
    keeps the goal's loss, ever fewer channels cross there, in `counts` log-spaced steps of `cut_epochs`, until one
    loses more.  Pictures are shifted by up to `shift` pixels in training (None: an eighth of their side, at most 4).
    The rest is as in `PruneRecipe`; `networks` are files of networks that were pruned before.
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
    cuts: tuple[str, ...] = ()
    counts: int = 8
    cut_epochs: int = 1
    lr: float = 0.02
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
            keep=keep, budget=self.budget, score=self.score,
            rounds=self.rounds, epochs=self.epochs, final_epochs=self.final_epochs,
            sparse_epochs=self.sparse_epochs, strength=self.strength,
            region=self.region, ignore=self.ignore, least=self.least,
            lr=self.lr, final_lr=self.lr, batch_size=self.batch_size,
            label_share=self.labels, shift=usual_shift(side) if self.shift is None else self.shift, seed=self.seed,
        )  # fmt: skip

    def __post_init__(self) -> None:
        if list(self.keep) != sorted(set(self.keep), reverse=True):
            raise JobError(f"[prune] keep must be shares that fall, got {list(self.keep)}")
        if self.latency_at is not None and self.budget != "latency":
            raise JobError(f'[prune] latency_at is for the budget "latency", got "{self.budget}"')
        if self.budget == "channels":
            raise JobError('[prune] budget must be "macs", "parameters" or "latency", got "channels"')
        if min(self.counts, self.images) < 1 or min(self.cut_epochs, self.mixes, self.shift or 0) < 0:
            raise JobError("[prune] counts and images must be at least 1, cut_epochs, mixes and shift 0 or more")
        if not 0 <= self.seed < 2**32:
            raise JobError(f"[prune] seed must be 0 to {2**32 - 1}, got {self.seed}")
        try:
            for keep in self.keep or (0.5,):
                self.recipe(keep)
        except ModelError as error:
            raise JobError(f"[prune] {error}") from error


def goal_of(job: Job) -> Goal:
    """What the menu is made for."""
    goal = job.goal
    return Goal(
        minimise=goal.minimise,
        max_loss_points=goal.max_loss,
        max_energy_j=goal.max_energy,
        max_device_bytes=goal.max_size,
    )


def usual_shift(side: int) -> int:
    """Pixels that a training picture of this side is shifted by at most.

    >>> usual_shift(32), usual_shift(8), usual_shift(224)
    (4, 1, 4)
    """
    return min(4, side // 8)


class Job(Value, frozen=True, kw_only=True):
    """A whole job file."""

    model: ModelJob
    data: DataJob
    device: DeviceJob = DeviceJob()
    edge: EdgeJob = EdgeJob()
    link: LinkJob = LinkJob()
    goal: GoalJob = GoalJob()
    build: BuildJob = BuildJob()
    bottleneck: BottleneckJob = BottleneckJob()
    prune: PruneJob = PruneJob()

    def __post_init__(self) -> None:
        rounds = self.build.rounds
        if not rounds or min(rounds) < 1 or list(rounds) != sorted(rounds):
            raise JobError(f"[build] rounds must be increasing image counts, got {list(rounds)}")
        if self.build.report_images < 1 or self.build.calibration_images < 1:
            raise JobError("[build] report_images and calibration_images must be at least 1")
        if not (self.build.minutes is None or self.build.minutes >= 0) or (self.build.trainings or 0) < 0:
            raise JobError("[build] minutes and trainings must be 0 or more")
        if not self.goal.max_loss >= 0:
            raise JobError(f"[goal] max_loss must be at least 0 points, got {self.goal.max_loss}")
        if not (self.device.slowdown > 0 and (self.device.int8_slowdown or 1.0) > 0 and self.edge.load > 0):
            raise JobError("[device] slowdown and int8_slowdown and [edge] load must be above 0")
        is_powered = self.device.power is not None and self.link.radio is not None
        if (self.goal.minimise == "energy" or self.goal.max_energy is not None) and not is_powered:
            raise JobError("[goal] an energy needs [device] power and [link] radio")
        if not ((self.device.power or 0.0) >= 0 and self.link.radio_tail >= 0 and (self.goal.max_energy or 0.0) >= 0):
            raise JobError("[device] power, [link] radio_tail and [goal] max_energy must be at least 0")
        if not (self.goal.max_size is None or self.goal.max_size >= 0):
            raise JobError(f"[goal] max_size must be at least 0 bytes, got {self.goal.max_size}")
        if (self.model.mean is None) != (self.model.std is None):
            raise JobError("[model] mean and std must be given together")
        if self.model.top is not None and self.model.top < 1:
            raise JobError(f"[model] top must be at least 1, got {self.model.top}")
        units = self.bottleneck
        is_priced = bool(units.prices) and all(0 <= price < math.inf for price in units.prices)
        if not is_priced or list(units.prices) != sorted(set(units.prices)):
            raise JobError(f"[bottleneck] prices must be 0 or more and rise, got {list(units.prices)}")
        has_bits = units.bits == "search" or 1 <= units.bits <= 8
        least = min((*units.widths, *units.strides), default=0)
        if least < 1 or min(units.epochs, default=-1) < 0 or len(units.epochs) > 4 or not has_bits:
            allowed = 'widths and strides at least 1, up to four epochs of 0 or more, bits 1 to 8 or "search"'
            raise JobError(f"[bottleneck] allowed are {allowed}")
        if units.cuts and not (units.widths and units.strides):
            raise JobError("[bottleneck] cuts need at least one of widths and one of strides")
        for name in ("widths", "strides", "light"):
            values = getattr(units, name)
            if len(set(values)) != len(values):
                raise JobError(f"[bottleneck] {name} must not name a value twice, got {list(values)}")
        if not 0 <= units.seed < 2**32:
            raise JobError(f"[bottleneck] seed must be 0 to {2**32 - 1}, got {units.seed}")
        if units.images < 1 or min(units.refine, units.prepare) < 0:
            raise JobError("[bottleneck] images must be at least 1, prepare and refine 0 or more")
        if units.mixes < 0:
            raise JobError(f"[bottleneck] mixes must be 0 or more, got {units.mixes}")
        if not 0 <= units.labels <= 1 or (units.labels and (units.mixes or not self.data.labels)):
            allowed = "0 to 1, above 0 only with mixes = 0 and labelled data"
            raise JobError(f"[bottleneck] labels must be a share of {allowed}, got {units.labels}")
        if not units.bits_loss >= 0:
            raise JobError(f"[bottleneck] bits_loss must be at least 0 points, got {units.bits_loss}")
        if not all(0 < share <= 1 for share in units.light):
            raise JobError(f"[bottleneck] light must be shares above 0 and up to 1, got {list(units.light)}")
        try:
            conditions_of(self, int8_ratio=1.0)
        except (UsageError, PlanError) as error:
            raise JobError(f"[link] {error}") from error


def load_job(path: Path) -> Job:
    """The job in a TOML file, its weight paths made absolute.

    Raises:
        JobError: the file is missing, not TOML, or holds a value or a key that is not allowed.
    """
    try:
        job = msgspec.convert(tomllib.loads(path.read_text()), Job)
    except OSError as error:
        raise JobError(f"job file {path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise JobError(f"job file {path} is not TOML: {error}") from error
    except msgspec.ValidationError as error:
        raise JobError(f"job file {path}: {error}") from error
    except JobError as error:
        raise JobError(f"job file {path}: {error}") from error
    folder = path.resolve().parent
    model = msgspec.structs.replace(
        job.model,
        weights=None if job.model.weights is None else str(folder / job.model.weights),
        smaller_weights={name: str(folder / file) for name, file in job.model.smaller_weights.items()},
    )
    data = job.data
    if data.source.startswith("folder:"):
        place = folder / Path(data.source.removeprefix("folder:")).expanduser()
        data = msgspec.structs.replace(data, source=f"folder:{place}")
    units = tuple(str(folder / unit) for unit in job.bottleneck.units)
    bottleneck = msgspec.structs.replace(job.bottleneck, units=units)
    prune = msgspec.structs.replace(job.prune, networks=tuple(str(folder / file) for file in job.prune.networks))
    return msgspec.structs.replace(job, model=model, data=data, bottleneck=bottleneck, prune=prune)


def weights_of_smaller(job: Job, name: str) -> Path | None:
    """Where the weights of one of the `smaller` networks lie; None where the main network has none either.

    Raises:
        JobError: neither named nor to be found beside the main network's.
    """
    if name in job.model.smaller_weights:
        return Path(job.model.smaller_weights[name])
    if job.model.weights is None:
        return None
    main = Path(job.model.weights)
    beside = main.with_name(main.name.replace(job.model.source, name))
    if beside == main or not beside.is_file():
        raise JobError(f'weights of smaller network "{name}" are neither in [model] smaller_weights nor at {beside}')
    return beside


def conditions_of(job: Job, *, int8_ratio: float) -> Conditions:
    """The job's link, device and edge; int8's slowdown is `slowdown * int8_ratio` where the job has none.

    Raises:
        UsageError: rate or delay is not understood.
    """
    device = job.device
    int8 = device.int8_slowdown if device.int8_slowdown is not None else device.slowdown * int8_ratio
    radio = None
    if job.link.radio is not None:
        radio = msgspec.structs.replace(RADIOS[job.link.radio], tail_j=job.link.radio_tail)
    return Conditions(
        link=Link(rate_bps=parse_rate_bps(job.link.rate), delay_s=parse_duration_s(job.link.delay)),
        device=Slowdown(fp32=device.slowdown, int8=int8),
        edge_load=job.edge.load,
        device_power_w=device.power,
        radio=radio,
    )
