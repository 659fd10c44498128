"""Every candidate of a job, before anything is measured: device, upload and split drafts.

A draft is a plan with what is known of it so far.  Drafts whose codecs restore the very same values (the
same quantiser behind another coder) share a `group`: they are classified once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..codec import Tables as CodecTables
from ..plan import CodecSpec, Kind, Plan, Precision
from ..search.space import feature_codecs, input_codecs
from .workshop import Workshop

Group = tuple[str, ...]
LOSSLESS_CODERS = ("none", "zstd", "range", "rans", "png", "webp-lossless")


@dataclass
class Draft:
    """A plan and what has been measured of it: bytes, seconds (unslowed), and which images it got right.

    `is_exact`: it gives the unmodified network's own answers by construction.
    `tables`: a learned unit's own; other codecs are calibrated later.
    `is_rival`: kept whatever beats it, unless it is hopeless, so that the best split always stands beside the rest.
    """

    plan: Plan
    group: Group
    payload_bytes: float = 0.0
    payload_bytes_p50: float | None = None
    payload_bytes_p95: float = 0.0
    bytes_how: str = "measured"
    head_s: float = 0.0
    encode_s: float = 0.0
    decode_s: float = 0.0
    tail_s: float = 0.0
    dropped: str | None = None
    is_rival: bool = False
    is_exact: bool = False
    is_time_predicted: bool = False
    device_bytes: float = 0.0
    device_memory_bytes: float = 0.0
    tables: CodecTables | None = None
    correct: NDArray[np.bool_] = field(default_factory=lambda: np.zeros(0, dtype=np.bool_))


def restores_same(codec: CodecSpec) -> str:
    """A key that two codecs share where they restore the same values from the same input."""
    if codec.transform == "image":
        return "exact" if codec.coder in LOSSLESS_CODERS else f"{codec.coder.removesuffix('-bare')}{codec.quality}"
    if codec.coder in LOSSLESS_CODERS:
        return f"{codec.transform}{codec.bits}{codec.per_channel}{codec.quality}{codec.rate}"
    return codec.name


def all_drafts(workshop: Workshop) -> list[Draft]:
    """Device-only of every network, upload by every input codec, every cut by every codec, every unit at every rate.

    They are numbered in this order.  Smaller rivals run on the device alone; networks that were pruned for a cut are
    divided there and nowhere else.
    """
    drafts: list[Draft] = []
    wanted = workshop.job.build.precisions

    def add(kind: Kind, network: str, precision: Precision, **parts: Any) -> None:
        plan = Plan(
            number=len(drafts),
            kind=kind,
            variant=network,
            precision=precision,
            top=workshop.job.model.top,
            **parts,
        )
        codec = "" if plan.codec is None else restores_same(plan.codec)
        is_exact = network == workshop.main and precision == "fp32" and codec == "exact"
        drafts.append(Draft(plan, (kind, network, precision, plan.cut or "", codec), is_exact=is_exact))

    def add_divided(network: str, precision: Precision) -> None:
        if workshop.networks[network].runs_whole:
            for codec in input_codecs(workshop.input.shape[-1]):
                whole = workshop.whole_name(network, precision)
                add("upload", network, precision, tail=whole, codec=codec, crossing=(workshop.input,))
        for cut in workshop.cuts(network, precision):
            head, tail = workshop.segments(network, precision, cut.name)
            for codec in feature_codecs(cut.specs):
                add("split", network, precision, head=head, tail=tail, cut=cut.name, codec=codec, crossing=cut.specs)

    pairs = [(n, p) for n, entry in workshop.networks.items() for p in wanted if p in entry.wholes]
    for network, precision in pairs:
        if workshop.networks[network].runs_whole:
            add("device", network, precision, head=workshop.whole_name(network, precision))
    for network, precision in pairs:
        if workshop.networks[network].is_divided and workshop.networks[network].unit is None:
            add_divided(network, precision)
    for network, precision in pairs:
        for rate in workshop.networks[network].rates(precision):
            (cut,) = workshop.cuts(network, precision)
            head, tail = workshop.segments(network, precision, cut.name)
            segments = {"head": head, "tail": tail, "cut": cut.name, "crossing": cut.specs}
            add("split", network, precision, codec=rate.codec, **segments)
            drafts[-1].tables = rate.tables
    return drafts
