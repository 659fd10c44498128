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
    [exits]                             # optional: early answers, see ExitsJob
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

import msgspec

from ..errors import JobError, PlanError, UsageError
from ..plan import Value
from ..profile import RADIOS, Conditions, Link, Slowdown
from ..search.goal import Goal
from ..units import parse_duration_s, parse_rate_bps
from .sections import (
    BottleneckJob,
    BuildJob,
    DataJob,
    DeviceJob,
    EdgeJob,
    ExitsJob,
    GoalJob,
    LinkJob,
    ModelJob,
    PruneJob,
)


def goal_of(job: Job) -> Goal:
    """What the menu is made for."""
    goal = job.goal
    return Goal(
        minimise=goal.minimise,
        max_loss_points=goal.max_loss,
        max_energy_j=goal.max_energy,
        max_device_bytes=goal.max_size,
        max_device_memory_bytes=goal.max_memory,
    )


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
    exits: ExitsJob = ExitsJob()

    def __post_init__(self) -> None:
        rounds = self.build.rounds
        if not rounds or min(rounds) < 1 or list(rounds) != sorted(rounds):
            raise JobError(f"[build] rounds must be increasing image counts, got {list(rounds)}")
        if "fp32" not in self.build.precisions:
            given = list(self.build.precisions)
            raise JobError(f"[build] precisions must have fp32, against which losses are counted, got {given}")
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
        for name in ("max_size", "max_memory"):
            limit = getattr(self.goal, name)
            if not (limit is None or limit >= 0):
                raise JobError(f"[goal] {name} must be at least 0 bytes, got {limit}")
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
    exits = msgspec.structs.replace(job.exits, files=tuple(str(folder / file) for file in job.exits.files))
    return msgspec.structs.replace(job, model=model, data=data, bottleneck=bottleneck, prune=prune, exits=exits)


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
