"""The decision and what is known about it: the file to open first.

    Plan       what runs where, and what crosses the link: data, nothing else
    Evidence   what was measured of a plan in its deployed form, and on how many images
    Candidate  a Plan with its Evidence; `search` ranks candidates, a `Bundle` holds a menu of plans

Three kinds of plan exist, and all three are always among the candidates:

    device   the whole network on the device; nothing crosses
    upload   the input image crosses, coded by an image codec; the whole network on the edge
    split    the head on the device, a cut's values cross, the tail on the edge

A plan never names layers by number; a cut is named by module path and call (`layer2.1#0`).
Finding a plan (search), pricing it (stages), simulating it and running it are other modules.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from .errors import PlanError

Kind = Literal["device", "upload", "split"]
# What stands beside the chosen plan in a table: each kind, splits with a trained unit apart from plain ones.
Way = Literal["device", "upload", "split", "unit"]
# Between the values that name a cut which no prefix of the layers has.
SEVERAL = " + "
Precision = Literal["fp32", "int8"]
Side = Literal["device", "edge"]
SIDES: tuple[Side, ...] = ("device", "edge")
Rule = Literal["confidence", "margin", "entropy"]
RULES: tuple[Rule, ...] = ("confidence", "margin", "entropy")
Transform = Literal["float32", "float16", "uniform", "picture", "image"]
Coder = Literal["none", "zstd", "range", "rans", "png", "webp-lossless", "webp", "jpeg", "jpeg-bare"]


class Value(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Common options of every noun: frozen, keyword-only, unknown fields refused.

    A subclass says `frozen=True, kw_only=True` again: type checkers want the one, msgspec the other.
    """


class TensorSpec(Value, frozen=True, kw_only=True):
    """Name, shape without the batch dimension, and dtype of one value.

    `dtype` is numpy's name: "float32", "uint8" or "int64".

    >>> TensorSpec(name="x", shape=(3, 32, 32)).num_bytes
    12288
    """

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def num_elements(self) -> int:
        """Elements of one sample."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample as it lies in memory.

        Raises:
            PlanError: `dtype` is none that a value may have.
        """
        sizes = {"bool": 1, "uint8": 1, "int8": 1, "float16": 2, "int32": 4, "float32": 4, "int64": 8, "float64": 8}
        if self.dtype not in sizes:
            raise PlanError(f'dtype must be one of {", ".join(sizes)}, got "{self.dtype}" (value "{self.name}")')
        return self.num_elements * sizes[self.dtype]


class Preprocess(Value, frozen=True, kw_only=True):
    """How a camera's picture becomes the network's input: `(pixels / 255 - mean) / std`.

    Pictures are (N, H, W, C) uint8; the network's input is (N, C, H, W) float32.  The step is part
    of every exported network, so that it is timed and coded as deployed.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]


class CodecSpec(Value, frozen=True, kw_only=True):
    """What turns arrays into bytes: a transform to symbols, then a coder.

    transform   float32, float16: as they are; uniform: `bits` per element with static ranges, one
                for the tensor or one per channel; picture: 8-bit features tiled to one grey
                picture; image: the input picture itself (uint8).
    coder       none, zstd (after bit-packing), range / rans (static integer tables), or an
                image format.  `quality` is for webp and jpeg, and for uniform with range / rans:
                the percent of the 2^bits levels that are used.
    rate        of a learned unit: which of its rates, finest first; its tables are the unit's own.

    `name` is the canonical short form, unique for each spec: `uniform4c-range`.

    >>> CodecSpec(transform="uniform", bits=4, per_channel=True, coder="range").name
    'uniform4c-range'
    >>> CodecSpec(transform="image", coder="webp", quality=95).name
    'webp-q95'
    """

    transform: Transform
    coder: Coder = "none"
    bits: int = 8
    per_channel: bool = False
    quality: int | None = None
    # Unset rather than None: what says nothing of it has the bytes of before there were units.
    rate: int | msgspec.UnsetType = msgspec.UNSET

    @property
    def name(self) -> str:
        """Canonical short form."""
        quality = "" if self.quality is None else f"-q{self.quality}"
        quality += f"-r{self.rate}" if isinstance(self.rate, int) else ""
        if self.transform == "image":
            return ("raw" if self.coder == "none" else self.coder) + quality
        if self.transform == "uniform":
            return f"uniform{self.bits}{'c' if self.per_channel else ''}-{self.coder}{quality}"
        return f"{self.transform}-{self.coder}{quality}"


class ExitRule(Value, frozen=True, kw_only=True):
    """The decision of one exit: it answers where it is at least `threshold` sure (`exits.certainty`).

    A threshold above 1 never answers; one of 0 always does.

    Raises:
        PlanError: a threshold that is not 0 to 2, an unknown rule, or a temperature of 0 or below.
    """

    threshold: float
    temperature: float = 1.0
    rule: Rule = "confidence"

    def __post_init__(self) -> None:
        if not 0 <= self.threshold <= 2:
            raise PlanError(f"the threshold of an exit must be 0 (always) to 1, above 1 never, got {self.threshold}")
        if not 0 < self.temperature < math.inf:
            raise PlanError(f"the temperature of an exit must be above 0, got {self.temperature}")
        if self.rule not in RULES:
            raise PlanError(f'a rule of exits must be one of {", ".join(RULES)}, got "{self.rule}"')


class Exit(Value, frozen=True, kw_only=True):
    """An early-exit classifier of a plan, on one side of the link.

    It is met when the segment before it has given `value`, the one tensor that crosses at `cut`; `classifier` (file
    name of a segment) makes logits (K) of it.  Where they are not sure enough, `rest` leads on from the value: to the
    next exit of the side, to what crosses the link, or to the network's outputs (None: the value itself crosses).
    """

    side: Side
    cut: str
    value: TensorSpec
    classifier: str
    rest: str | None
    rule: ExitRule

    @property
    def label(self) -> str:
        """Short text for tables: `layer2.1#0 >= 0.912`."""
        return f"{self.cut} >= {self.rule.threshold:.3g}"


class Plan(Value, frozen=True, kw_only=True):
    """One way to run the network: data only, the same on both machines.

    `number` names the plan in every frame of the link.  `head` and `tail` are file names of
    segments within the bundle (None where that machine computes nothing); `tables` is the file
    name of the codec's static tables (None where it needs none).  `variant` is the network (or
    its pruned or extended form); `top` limits the reply to that many best classes (None: every
    output tensor as it is).

    `exits` are in the order in which a request meets them, the device's first.  `head` then leads to the device's first
    exit, `tail` to the edge's, and each exit's `rest` goes on; an exit answers with its logits as the first output.
    """

    number: int
    kind: Kind
    variant: str
    precision: Precision = "fp32"
    cut: str | None = None
    codec: CodecSpec | None = None
    crossing: tuple[TensorSpec, ...] = ()
    head: str | None = None
    tail: str | None = None
    tables: str | None = None
    top: int | None = None
    exits: tuple[Exit, ...] = ()

    def __post_init__(self) -> None:
        self._check_exits()
        needs = {
            "device": (True, False, False, False),
            "upload": (False, True, False, True),
            "split": (True, True, True, True),
        }[self.kind]
        has = (self.head is not None, self.tail is not None, self.cut is not None, self.codec is not None)
        if has != needs:
            raise PlanError(
                f"a {self.kind} plan has (head, tail, cut, codec) = {needs}, got {has} (plan {self.number})"
            )

    def _check_exits(self) -> None:
        sides = [exit.side for exit in self.exits]
        if sides != sorted(sides) or (self.kind != "split" and set(sides) - {"device" if self.head else "edge"}):
            raise PlanError(f"a {self.kind} plan's exits are where it computes, the device's first, got {sides}")
        last = self.exits_on("device")[-1:] if self.kind == "split" else ()
        for exit in self.exits:
            if exit.rest is None and exit not in last:
                raise PlanError(f'only a split\'s last exit on the device has no rest, not "{exit.cut}" ({self.label})')

    def exits_on(self, side: Side) -> tuple[Exit, ...]:
        """Those of one machine, in order."""
        return tuple(exit for exit in self.exits if exit.side == side)

    def segments_on(self, side: Side) -> tuple[str, ...]:
        """File names of the segments that one machine runs, in order."""
        first = self.head if side == "device" else self.tail
        parts = (first, *(name for exit in self.exits_on(side) for name in (exit.classifier, exit.rest)))
        return tuple(dict.fromkeys(name for name in parts if name is not None))

    @property
    def segments(self) -> tuple[str, ...]:
        """File names of all segments, of both machines."""
        return tuple(dict.fromkeys((*self.segments_on("device"), *self.segments_on("edge"))))

    @property
    def way(self) -> Way:
        """The kind, or "unit": a split whose codec has the learned grid of a unit."""
        has_unit = self.codec is not None and isinstance(self.codec.rate, int)
        return "unit" if has_unit else self.kind

    @property
    def label(self) -> str:
        """Short text for tables: `split layer2.1#0 uniform4c-range`."""
        parts: list[str] = [self.kind, self.variant]
        if self.precision != "fp32":
            parts.append(self.precision)
        if self.cut is not None:
            parts.append(self.cut)
        if self.codec is not None:
            parts.append(self.codec.name)
        if self.exits:
            parts.append(f"exits {', '.join(exit.label for exit in self.exits)}")
        return " ".join(parts)


class Evidence(Value, frozen=True, kw_only=True):
    """What was measured of a plan in its deployed form.

    Accuracy is in percent, of `num_images` held-out images of the part named `split` ("validation": choices,
    "test": reported); `loss_points` is top-1 points against the unmodified fp32 network on the same
    images, `loss_ci_points` the half width of its 95 % interval; all four are None where the candidate
    was dropped before any image was classified (num_images 0).  Payload bytes are whole payloads, header and
    CRC included; `bytes_how` says whether they were coded or computed from the static tables.  Times are medians on
    the machine that built the bundle, unslowed, on one thread: `head_s` and `encode_s` on the
    device's side, `decode_s` and `tail_s` on the edge's.  `device_bytes` is the size of the files that the device
    needs: its segments and the codec's tables (None: not known).

    Of a plan with exits `exit_shares` has the share of requests that each one answers.  Payloads, replies, `encode_s`,
    `decode_s` and `tail_s` are then means of the requests that cross; `head_s` and `exit_s`, the device's segments and
    its exits' classifiers, of all.  `exit_file` names the answers of every image at every exit (`exits.ExitEvidence`).
    `device_memory_bytes` is an estimate of the memory that the device's segments need, the engine's own left out.
    `tail_batch_s` is what the tails of a whole batch take, by its size.
    """

    split: Literal["validation", "test"]
    num_images: int
    accuracy: float | None
    accuracy_ci: float | None
    loss_points: float | None
    loss_ci_points: float | None
    payload_bytes: float
    payload_bytes_p95: float
    payload_bytes_p50: float | None = None
    reply_bytes: float
    head_s: float
    encode_s: float
    decode_s: float
    tail_s: float
    exit_s: float = 0.0
    tail_batch_s: dict[int, float] = {}
    exit_shares: tuple[float, ...] = ()
    exit_file: str | None = None
    device_bytes: float | None = None
    device_memory_bytes: float | None = None
    bytes_how: Literal["measured", "estimated"] = "measured"
    times_how: Literal["measured", "estimated"] = "measured"


class Candidate(Value, frozen=True, kw_only=True):
    """A plan with its evidence; `dropped` says in which round and why it was measured no further.

    `evidence` is what choices are made on (validation images); `reported` is the same of images that no
    choice has seen (test images), measured for the menu alone.
    """

    plan: Plan
    evidence: Evidence
    reported: Evidence | None = None
    dropped: str | None = None
