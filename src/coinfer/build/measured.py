"""Bytes and times of drafts: calibrated static tables, a few pictures' payloads, segments timed as deployed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..codec import Codec, calibrate, make_codec, save_tables
from ..codec import Tables as CodecTables
from ..engine.measure import measure
from ..model.export import DeployedCut
from ..plan import CodecSpec, Plan
from ..profile import Timing
from .drafts import Draft
from .progress import Progress
from .workshop import Workshop, cut_file_name

Tables = dict[int, CodecTables]
BYTES_PICTURES = 32
TIMED_PICTURES = 2
CALIBRATION_ELEMENTS, LEAST_CALIBRATION = 1 << 21, 32


def codec_of(plan: Plan, tables: Tables) -> Codec:
    """The codec of a split or upload plan with its calibrated tables."""
    assert plan.codec is not None
    return make_codec(plan.codec, plan.crossing, tables.get(plan.number))


def calibrate_and_weigh(workshop: Workshop, drafts: list[Draft], *, progress: Progress) -> Tables:
    """Calibrate codecs on training pictures; set bytes and coding times of every draft.

    Bytes are means over `BYTES_PICTURES` validation pictures, coding times medians on one picture.  At one cut
    and with one coder, more bits or a higher quality cost more bytes: once a lossless upload beats
    one of them in bytes and device time, the rest are dropped without being tried (unless throughput is the goal:
    then less work for the edge may be worth both; or all are to be kept).
    """
    tables: Tables = {}
    pictures = workshop.validation.pixels[:BYTES_PICTURES]
    uploads = [d for d in drafts if d.plan.kind == "upload"]
    for draft in uploads:
        _weigh(draft, codec_of(draft.plan, tables), [pictures])
    exact = [d for d in uploads if d.is_exact]
    if workshop.job.goal.minimise == "throughput" or workshop.job.build.keep_all:
        exact = []
    splits = [d for d in drafts if d.plan.kind == "split"]
    done = 0
    for network, precision in dict.fromkeys((d.plan.variant, d.plan.precision) for d in splits):
        by_cut: dict[str, list[Draft]] = {}
        for draft in splits:
            if (draft.plan.variant, draft.plan.precision) == (network, precision):
                by_cut.setdefault(str(draft.plan.cut), []).append(draft)
        by_count: dict[int, list[DeployedCut]] = {}
        for cut in workshop.cuts(network, precision):
            if cut.name in by_cut:
                by_count.setdefault(_calibration_count(cut), []).append(cut)
        for count, wanted in by_count.items():
            both = np.concatenate([workshop.calibration[:count], pictures])
            for cut, features in workshop.features(network, precision, wanted, both):
                progress("codecs", done, len(splits), cut.name)
                calibration = [f[: -len(pictures)] for f in features]
                _weigh_cut(by_cut[cut.name], tables, calibration, [f[-len(pictures) :] for f in features], exact)
                done += len(by_cut[cut.name])
    progress("codecs", len(splits), len(splits), "")
    return tables


def _calibration_count(cut: DeployedCut) -> int:
    """Pictures to calibrate a cut's codecs on: a power of two, many where few values cross."""
    known = CALIBRATION_ELEMENTS // sum(spec.num_elements for spec in cut.specs)
    return 1 << max(LEAST_CALIBRATION, known).bit_length() - 1


def _weigh_cut(
    drafts: list[Draft],
    tables: Tables,
    calibration: list[NDArray[np.generic]],
    values: list[NDArray[np.generic]],
    exact: list[Draft],
) -> None:
    """Weigh one cut's drafts, family by family from few bytes to many."""
    families: dict[tuple[str, str, bool], list[tuple[CodecSpec, Draft]]] = {}
    for draft in drafts:
        codec = draft.plan.codec
        assert codec is not None
        families.setdefault((codec.transform, codec.coder, codec.per_channel), []).append((codec, draft))
    grids: dict[tuple[str, int, bool, int | None], CodecTables] = {}
    for members in families.values():
        beaten: Draft | None = None
        for codec, draft in sorted(members, key=lambda member: _rate_order(member[0])):
            if beaten is not None:
                draft.payload_bytes, draft.bytes_how = beaten.payload_bytes, "estimated"
                draft.payload_bytes_p95, draft.encode_s = beaten.payload_bytes_p95, beaten.encode_s
                draft.decode_s = beaten.decode_s
                draft.dropped = f"before any image: more bytes than {beaten.plan.label}, which a lossless upload beats"
                continue
            tables[draft.plan.number] = draft.tables or _calibrated(codec, draft, calibration, grids)
            _weigh(draft, codec_of(draft.plan, tables), values)
            took_s = draft.head_s + draft.encode_s
            if any(e.payload_bytes <= draft.payload_bytes and e.encode_s <= took_s for e in exact):
                beaten = draft


def _rate_order(codec: CodecSpec) -> tuple[int, int, int]:
    """Codecs of one kind in this order send more and more."""
    return codec.bits, codec.quality or 100, -codec.rate if isinstance(codec.rate, int) else 0


def _calibrated(
    codec: CodecSpec,
    draft: Draft,
    calibration: list[NDArray[np.generic]],
    grids: dict[tuple[str, int, bool, int | None], CodecTables],
) -> CodecTables:
    """The codec's tables; a lossless coder without frequencies takes over the grid of one that has them."""
    key = (codec.transform, codec.bits, codec.per_channel, codec.quality)
    if codec.transform == "uniform" and codec.coder not in ("range", "rans") and key in grids:
        return CodecTables(tuple(dataclasses.replace(t, frequencies=None, groups=None) for t in grids[key].tensors))
    made = calibrate(codec, draft.plan.crossing, calibration)
    grids.setdefault(key, made)
    return made


def _weigh(draft: Draft, codec: Codec, values: list[NDArray[np.generic]]) -> None:
    _, num_bytes = codec.roundtrip(values)
    draft.payload_bytes = float(np.mean(num_bytes))
    draft.payload_bytes_p95 = float(np.percentile(num_bytes, 95))
    draft.bytes_how = codec.bytes_how
    encode, decode = time_codec(codec, values, repeats=3)
    draft.encode_s, draft.decode_s = encode.median_s, decode.median_s


def time_codec(codec: Codec, values: Sequence[NDArray[np.generic]], *, repeats: int) -> tuple[Timing, Timing]:
    """Seconds to encode and to decode one picture's values, over the first few pictures in turn."""
    singles = [[v[i : i + 1] for v in values] for i in range(min(TIMED_PICTURES, len(values[0])))]
    payloads = [codec.encode(single) for single in singles]
    encode = measure(partial(_each, codec.encode, singles), warmup=1, repeats=repeats)
    decode = measure(partial(_each, codec.decode, payloads), warmup=1, repeats=repeats)
    return _share(encode, len(singles)), _share(decode, len(singles))


def _each(call: Callable[[Any], object], arguments: Sequence[object]) -> None:
    for argument in arguments:
        call(argument)


def _share(timing: Timing, count: int) -> Timing:
    return Timing(
        median_s=timing.median_s / count,
        p5_s=timing.p5_s / count,
        p95_s=timing.p95_s / count,
        repeats=timing.repeats,
    )


def store_tables(workshop: Workshop, draft: Draft, tables: Tables) -> None:
    """Write a draft's tables below the workshop and name the file in its plan."""
    made = tables.get(draft.plan.number)
    if made is None or not made.tensors or draft.plan.codec is None:
        return
    plan = draft.plan
    name = f"tables/{plan.variant}.{plan.precision}.{cut_file_name(str(plan.cut))}.{draft.plan.codec.name}.safetensors"
    (workshop.folder / "tables").mkdir(exist_ok=True)
    save_tables(made, workshop.folder / name)
    draft.device_bytes += (workshop.folder / name).stat().st_size
    draft.plan = msgspec.structs.replace(plan, tables=name)
