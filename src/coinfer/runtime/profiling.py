"""Times of a bundle's menu on this machine: every segment and every codec, as deployed, without torch."""

from __future__ import annotations

import datetime
from functools import partial

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from ..bundle import Bundle
from ..codec import load_tables, make_codec
from ..engine.measure import describe_machine, measure, pin
from ..engine.onnx import Session
from ..plan import Plan
from ..profile import Profile, Timing


def profile_bundle(bundle: Bundle, *, threads: int = 1, repeats: int = 30, core: int | None = None) -> Profile:
    """Median and spread of each segment and codec of the menu, on the bundle's own sample pictures.

    Args:
        bundle: whose menu to time.
        threads: of every session.
        repeats: timed calls of each, after three that are not counted.
        core: pin this process to one core while timing; None leaves it free.

    Raises:
        EngineError: a segment does not load.
    """
    pixels = load_file(bundle.path("samples.safetensors"))["pixels"]
    pin(core)
    segments: dict[str, Timing] = {}
    codecs: dict[str, tuple[Timing, Timing]] = {}
    for plan in bundle.manifest.menu:
        values: list[NDArray[np.generic]] = [pixels[:1]]
        if plan.head is not None:
            values = _timed(bundle, plan.head, values, segments, threads, repeats)
        if plan.codec is not None and plan.tail is not None:
            values = _timed_codec(bundle, plan, values, codecs, repeats)
            _timed(bundle, plan.tail, values, segments, threads, repeats)
    pin(None)
    return Profile(
        machine=describe_machine(),
        threads=threads,
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        segments=segments,
        codecs=codecs,
    )


def _timed(
    bundle: Bundle,
    name: str,
    values: list[NDArray[np.generic]],
    segments: dict[str, Timing],
    threads: int,
    repeats: int,
) -> list[NDArray[np.generic]]:
    session = Session(bundle.path(name), threads=threads)
    if name not in segments:
        segments[name] = measure(partial(session.run, values), warmup=3, repeats=repeats)
    return list(session.run(values))


def _timed_codec(
    bundle: Bundle,
    plan: Plan,
    values: list[NDArray[np.generic]],
    codecs: dict[str, tuple[Timing, Timing]],
    repeats: int,
) -> list[NDArray[np.generic]]:
    assert plan.codec is not None
    tables = None if plan.tables is None else load_tables(bundle.path(plan.tables))
    codec = make_codec(plan.codec, plan.crossing, tables)
    payload = codec.encode(values)
    codecs[str(plan.number)] = (
        measure(partial(codec.encode, values), warmup=3, repeats=repeats),
        measure(partial(codec.decode, payload), warmup=3, repeats=repeats),
    )
    return list(codec.decode(payload))
