"""Times of plans on this machine, stage by stage, as a request meets them; without torch and without a link.

    picture -> head -> encode, frame -> | decode -> tail -> | read the reply
               '------- device -------' '----- edge -----'    '- device -'

Of a plan with exits every segment and classifier is timed, whether its request would have got there or not.

Stages run in turn, so that each finds the caches as the one before it left them: a codec repeated in a tight loop
looks up to twice as fast as it is behind a head.  The device's framing and reading count as encoding.
"""

from __future__ import annotations

import datetime
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from time import perf_counter

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file
from websockets.frames import Frame, Opcode

from ..bundle import Bundle
from ..plan import Plan, Side, TensorSpec
from ..profile import Profile, Timing
from ..protocol import decode_result, encode_result
from ..protocol.messages import MessageType, pack
from .measure import describe_machine, measure_interleaved, pinned, timing
from .power import PowerMeter, find_sensor
from .segments import Segments

# Plans done, plans in all, the plan at hand.
Progress = Callable[[int, int, str], None]
WARMUP = 2
BATCH_SIZES = (2, 4, 8, 16)


def profile_bundle(bundle: Bundle, *, threads: int = 1, repeats: int = 30, core: int | None = None) -> Profile:
    """Median and spread of each segment and codec of the menu, on the bundle's own sample pictures.

    Args:
        bundle: whose menu to time.
        threads: of every session.
        repeats: timed requests of each plan, after two that are not counted.
        core: pin this process to one core while timing; None leaves it free.

    Raises:
        EngineError: a segment does not load, or there is no such core.
    """
    pixels = load_file(bundle.path("samples.safetensors"))["pixels"]
    manifest = bundle.manifest
    measured = time_plans(
        bundle.path, manifest.menu, pixels, manifest.outputs, threads=threads, repeats=repeats, core=core
    )
    batches = time_batches(bundle.path, manifest.menu, pixels, manifest.outputs, threads=threads, core=core)
    return msgspec.structs.replace(measured, bundle=bundle.digest, batches=batches)


def time_plans(
    path: Callable[[str], Path],
    plans: Sequence[Plan],
    pixels: NDArray[np.uint8],
    outputs: tuple[TensorSpec, ...],
    *,
    threads: int = 1,
    repeats: int = 30,
    core: int | None = None,
    progress: Progress | None = None,
) -> Profile:
    """The Profile of these plans, whose files lie where `path` says, on pictures (N, H, W, C) in turn.

    A segment that several plans use has the timing of all its runs.

    Raises:
        EngineError: a segment does not load, or there is no such core.
    """
    segments: dict[str, list[float]] = defaultdict(list)
    codecs: dict[str, tuple[Timing, Timing]] = {}
    with pinned(core), PowerMeter(find_sensor()) as meter:
        for done, plan in enumerate(plans):
            if progress is not None:
                progress(done, len(plans), plan.label)
            # Each plan has sessions of its own, so that memory holds one plan at a time.
            taken = _time_plan(plan, Segments(path, outputs, threads=threads), pixels, outputs, repeats)
            for name in plan.segments:
                segments[name] += taken[name]
            if plan.codec is not None:
                codecs[str(plan.number)] = (timing(taken["encode"]), timing(taken["decode"]))
    return Profile(
        machine=describe_machine(),
        threads=threads,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        segments={name: timing(seconds) for name, seconds in segments.items()},
        codecs=codecs,
        power_w=None if meter.power is None else meter.power.watts,
        power_sensor=None if meter.power is None else meter.power.sensor,
    )


def time_batches(
    path: Callable[[str], Path],
    plans: Sequence[Plan],
    pixels: NDArray[np.uint8],
    outputs: tuple[TensorSpec, ...],
    *,
    sizes: Sequence[int] = BATCH_SIZES,
    threads: int = 1,
    repeats: int = 9,
    core: int | None = None,
) -> dict[str, dict[int, float]]:
    """Median seconds of the edge's segments of these plans for whole batches, by size, `Profile.batches`.

    A batch is of pictures (N, H, W, C) in turn, as they come out of the codec.

    Raises:
        EngineError: as `time_plans`.
    """
    found: dict[str, dict[int, float]] = {}
    most = max(sizes)
    pictures = np.concatenate([pixels] * -(-most // len(pixels)))[:most]
    with pinned(core):
        for plan in plans:
            if plan.codec is None or all(name in found for name in plan.segments_on("edge")):
                continue
            segments = Segments(path, outputs, threads=threads)
            values: Sequence[NDArray[np.generic]] = (pictures,)
            for part in segments.parts(plan, "device"):
                values = part.segment.run(values) if part.exit is None else values
            codec = segments.codec(plan)
            rows = [codec.decode(codec.encode([v[i : i + 1] for v in values])) for i in range(most)]
            values = [np.concatenate([row[k] for row in rows]) for k in range(len(values))]
            for part in segments.parts(plan, "edge"):
                calls = {
                    str(size): partial(part.segment.run, [value[:size] for value in values]) for size in (1, *sizes)
                }
                taken = measure_interleaved(calls, warmup=2, repeats=repeats)
                found[part.name] = {int(size): timing.median_s for size, timing in taken.items()}
                values = part.segment.run(values) if part.exit is None else values
    return found


def _time_plan(
    plan: Plan,
    segments: Segments,
    pixels: NDArray[np.uint8],
    outputs: tuple[TensorSpec, ...],
    repeats: int,
) -> dict[str, list[float]]:
    """Seconds of each segment by its name, of encoding and of decoding, one of every repeat."""
    taken: dict[str, list[float]] = defaultdict(list)
    for repeat in range(WARMUP + repeats):
        row = repeat % len(pixels)
        seconds = _run_once(plan, segments, pixels[row : row + 1], outputs)
        if repeat >= WARMUP:
            for stage, took_s in seconds.items():
                taken[stage].append(took_s)
    return taken


def _run_once(
    plan: Plan, segments: Segments, picture: NDArray[np.uint8], outputs: tuple[TensorSpec, ...]
) -> dict[str, float]:
    """Seconds of each segment, of encoding and of decoding, of one request that no exit answers."""
    values: Sequence[NDArray[np.generic]] = (picture,)
    seconds: dict[str, float] = {}
    values = _run_segments(plan, "device", segments, values, seconds)
    if plan.codec is None or plan.tail is None:
        return seconds
    codec = segments.codec(plan)
    start_s = perf_counter()
    payload = codec.encode(values)
    Frame(Opcode.BINARY, pack(MessageType.REQUEST, plan.number, 0, payload)).serialize(mask=True)
    encoded_s = perf_counter()
    values = codec.decode(payload)
    decoded_s = perf_counter()
    answer = _run_segments(plan, "edge", segments, values, seconds)
    reply = encode_result(plan, answer, outputs)
    replied_s = perf_counter()
    decode_result(plan, reply, outputs)
    seconds["encode"] = encoded_s - start_s + perf_counter() - replied_s
    seconds["decode"] = decoded_s - encoded_s
    return seconds


def _run_segments(
    plan: Plan,
    side: Side,
    segments: Segments,
    values: Sequence[NDArray[np.generic]],
    seconds: dict[str, float],
) -> Sequence[NDArray[np.generic]]:
    """What a side gives where no exit answers; every segment's time goes into `seconds`."""
    for part in segments.parts(plan, side):
        start_s = perf_counter()
        given = part.segment.run(values)
        seconds[part.name] = perf_counter() - start_s
        values = given if part.exit is None else values
    return values
