"""Timing a call on this machine, and saying which machine that is.

Every figure is the median of repeats after a warm-up, with the 5th and 95th percentile beside it.  Calls
that are to be compared are measured interleaved (one of each, then again), so that a slow moment of the
machine hits all of them alike.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from time import perf_counter

import numpy as np

from ..errors import EngineError
from ..profile import Machine, Timing

_PACKAGES = ("coinfer", "numpy", "onnxruntime", "constriction", "pillow", "zstandard")


def timing(seconds: list[float]) -> Timing:
    """Median, 5th and 95th percentile of measured seconds.

    Raises:
        EngineError: `seconds` is empty.
    """
    if not seconds:
        raise EngineError("a timing needs at least 1 repeat, got 0")
    p5_s, median_s, p95_s = (float(value) for value in np.percentile(seconds, (5, 50, 95)))
    return Timing(median_s=median_s, p5_s=p5_s, p95_s=p95_s, repeats=len(seconds))


def measure(call: Callable[[], object], *, warmup: int = 3, repeats: int = 20) -> Timing:
    """How long `call` takes, after `warmup` calls that do not count.

    Raises:
        EngineError: `repeats` is below 1 or `warmup` below 0.
    """
    return measure_interleaved({"call": call}, warmup=warmup, repeats=repeats)["call"]


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], *, warmup: int = 3, repeats: int = 20
) -> dict[str, Timing]:
    """How long each of `calls` takes, one of each in turn, `repeats` times.

    Raises:
        EngineError: `repeats` is below 1 or `warmup` below 0.
    """
    if repeats < 1 or warmup < 0:
        raise EngineError(f"repeats must be at least 1 and warmup at least 0, got {repeats} and {warmup}")
    for _ in range(warmup):
        for call in calls.values():
            call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start_s = perf_counter()
            call()
            seconds[name].append(perf_counter() - start_s)
    return {name: timing(taken) for name, taken in seconds.items()}


def describe_machine() -> Machine:
    """This machine: name, processor, cores, system, and the versions that timings depend on."""
    return Machine(
        name=platform.node() or "unnamed",
        processor=_processor(Path("/proc/cpuinfo")),
        cores=os.cpu_count() or 1,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        python=platform.python_version(),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def pin(core: int | None) -> None:
    """Keep this process on one core; None lets it run on all of them.  Nothing where the system cannot.

    Raises:
        EngineError: there is no such core.
    """
    if not hasattr(os, "sched_setaffinity"):
        return
    cores = range(os.cpu_count() or 1)
    wanted = cores if core is None else (core,)
    if core is not None and core not in cores:
        raise EngineError(f"core must be 0 to {len(cores) - 1}, got {core}")
    try:
        os.sched_setaffinity(0, wanted)
    except OSError as error:
        raise EngineError(f"this process may not run on core {core}: {error.strerror}") from error


@contextmanager
def pinned(core: int | None) -> Iterator[None]:
    """While entered, this process keeps to one core (None: stays free); then to those it was allowed before.

    Raises:
        EngineError: as `pin`.
    """
    before = allowed_cores()
    if core is not None:
        pin(core)
    try:
        yield
    finally:
        if core is not None and before:
            os.sched_setaffinity(0, before)


def allowed_cores() -> tuple[int, ...]:
    """The cores that this process may run on, in order; none where the system does not say."""
    return tuple(sorted(os.sched_getaffinity(0))) if hasattr(os, "sched_getaffinity") else ()


def _processor(cpuinfo: Path) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("model name", "Model"):
                return value.strip()
    return platform.processor() or platform.machine() or "unknown"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
