"""What an installation must have, check by check: Python, packages, ONNX Runtime, and what the machine gives.

Each check gives a `Finding` (of packages one for each) and never raises; `doctor` prints them.  Where a check reads the
machine, the files that it reads are arguments, so that other machines' files tell what it would say there.
"""

from __future__ import annotations

import base64
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

from ..errors import CoinferError
from ..plan import Value
from ..units import format_bytes

State = Literal["ok", "warning", "wrong"]
# Of the memory that is left, and of the files that may be open.
LEAST_BYTES, FEW_BYTES = 64e6, 256e6
LEAST_FILES, FEW_FILES = 64, 1024
# y = x + x for x (N, 3), ONNX opset 17.
_DOUBLE = base64.b64decode(
    "CAk6RAoOCgF4CgF4EgF5IgNBZGQSBmRvdWJsZVoUCgF4Eg8KDQgBEgkKAxIBTgoCCANiFAoBeRIPCg0IARIJCgMSAU4KAggDQgQKABAR"
)
# What an extra is for, and whether a device does without it.
EXTRAS = {"edge": "to serve", "traces": "to send traces", "build": "to build bundles"}
# Modules that are not called as their packages are.
_MODULES = {"pillow": "PIL"}
_DOT_PRODUCT = {
    "avx512_vnni": "AVX-512 VNNI", "avx_vnni": "AVX VNNI", "amx_int8": "AMX", "asimddp": "dot product", "i8mm": "I8MM",
}  # fmt: skip


class Finding(Value, frozen=True, kw_only=True):
    """What one check has found; `advice` says what to do where something is not as it should be."""

    check: str
    state: State
    text: str
    advice: str = ""


def python() -> Finding:
    """Whether this Python is one that coinfer is for."""
    have = ".".join(map(str, sys.version_info[:3]))
    try:
        wanted = metadata.metadata("coinfer")["Requires-Python"]
    except metadata.PackageNotFoundError:
        text, advice = f"{have}; coinfer itself is not installed", "pip install it, rather than run its sources"
        return Finding(check="python", state="warning", text=text, advice=advice)
    if not _fits(have, wanted):
        advice = f"make an environment with Python {wanted}"
        return Finding(check="python", state="wrong", text=f"{have}, coinfer needs {wanted}", advice=advice)
    return Finding(check="python", state="ok", text=have)


def packages() -> Iterator[Finding]:
    """Each package that every machine needs, then each extra as a whole."""
    try:
        required = metadata.requires("coinfer") or []
    except metadata.PackageNotFoundError:
        return
    always = [line for line in required if "extra ==" not in line and _applies(line, "")]
    for line in always:
        name, bounds = _parts(line)
        problem = _problem(line) or _broken(name)
        advice = "" if problem is None else f'pip install "{name}{bounds}"'
        state: State = "ok" if problem is None else "wrong"
        if name == "constriction" and problem is not None:
            state, problem = "warning", f"{problem}; the numpy coder takes its place and is slower"
        yield Finding(check=name, state=state, text=problem or _version(name) or "", advice=advice)
    for extra, purpose in EXTRAS.items():
        mine = [line for line in required if _applies(line, extra) and not _applies(line, "")]
        found = _extra(extra, purpose, [line for line in mine if not line.startswith("coinfer")])
        if found is not None:
            yield found


def _extra(extra: str, purpose: str, lines: list[str]) -> Finding | None:
    problems = {_parts(line)[0]: problem for line in lines if (problem := _problem(line)) is not None}
    check, advice = f"extra {extra}", f'pip install "coinfer[{extra}]"'
    if not lines:
        return None
    if not problems:
        return Finding(check=check, state="ok", text=f"complete ({purpose})")
    if all(_version(_parts(line)[0]) is None for line in lines):
        return Finding(check=check, state="ok", text=f"not installed; it is needed {purpose} alone: {advice}")
    listed = ", ".join(f"{name} {problem}" for name, problem in problems.items())
    return Finding(check=check, state="warning", text=f"incomplete: {listed}", advice=f"{advice} {purpose}")


def _parts(line: str) -> tuple[str, str]:
    """A requirement's name and bounds: "numpy>=1.26" -> ("numpy", ">=1.26")."""
    found = re.match(r"\s*([A-Za-z0-9._-]+)(?:\[[^]]*\])?\s*([^;]*)", line)
    assert found is not None
    return found[1], found[2].strip()


def _applies(line: str, extra: str) -> bool:
    """Whether a requirement is one on this machine, with that extra ("" for none)."""
    _, _, marker = line.partition(";")
    if not marker.strip():
        return True
    from packaging.markers import Marker

    return Marker(marker.strip()).evaluate({"extra": extra})


def _problem(line: str) -> str | None:
    name, bounds = _parts(line)
    version = _version(name)
    if version is None:
        return "is missing"
    return None if _fits(version, bounds) else f"is {version}, coinfer needs {bounds}"


def _broken(name: str) -> str | None:
    try:
        importlib.import_module(_MODULES.get(name, name))
        return None
    except ImportError as error:
        return f"{_version(name)} does not load: {error}"


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _fits(version: str, bounds: str) -> bool:
    # ONNX Runtime brings this package along.
    from packaging.specifiers import SpecifierSet

    return SpecifierSet(bounds).contains(version, prereleases=True)


def coder() -> Finding:
    """Which range coder there is."""
    try:
        importlib.import_module("constriction")
    except ImportError as error:
        text = f"by numpy: constriction does not load ({error}); its bytes are the same, it is slower"
        advice = "pip install constriction, where it has a wheel"
        return Finding(check="range coder", state="warning", text=text, advice=advice)
    return Finding(check="range coder", state="ok", text="by constriction")


def engine() -> Finding:
    """Whether ONNX Runtime loads and computes."""
    try:
        import numpy as np

        from ..engine.onnx import Session
    except ImportError as error:
        advice = "pip install --force-reinstall onnxruntime numpy"
        return Finding(check="onnx runtime", state="wrong", text=f"does not load: {error}", advice=advice)
    try:
        with tempfile.TemporaryDirectory(prefix="coinfer-") as folder:
            path = Path(folder) / "double.onnx"
            path.write_bytes(_DOUBLE)
            (doubled,) = Session(path).run([np.array([[1, 2, 3]], np.float32)])
    except (CoinferError, OSError) as error:
        advice = "pip install --force-reinstall onnxruntime"
        return Finding(check="onnx runtime", state="wrong", text=f"does not compute: {error}", advice=advice)
    if doubled.tolist() != [[2, 4, 6]]:
        advice = "this build is not for this processor: try another version of onnxruntime"
        return Finding(check="onnx runtime", state="wrong", text=f"1, 2, 3 doubled is {doubled}", advice=advice)
    return Finding(check="onnx runtime", state="ok", text=f"{_version('onnxruntime')} loads and computes")


def processor(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    """Whether int8 has instructions of its own here."""
    try:
        lines = cpuinfo.read_text(errors="replace").splitlines()
    except OSError:
        return Finding(check="processor", state="ok", text="the system does not say which instructions it has")
    flags = {word for line in lines if re.match(r"(flags|Features)\s*:", line) for word in line.split()}
    found = [text for flag, text in _DOT_PRODUCT.items() if flag in flags]
    if found:
        return Finding(check="processor", state="ok", text=f"int8 has its own instructions: {', '.join(found)}")
    text = "no dot products of int8 (VNNI, or ARM's dotprod): int8 may gain little over fp32"
    advice = "time the bundle here with `coinfer profile` and hand it to `coinfer plan --device-profile`"
    return Finding(check="processor", state="warning", text=text, advice=advice)


def cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> Finding:
    """How many cores this process may use."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota(cpu_max)
    of = f"{allowed} of {os.cpu_count() or allowed}"
    if quota is not None and quota < 1:
        text = f"{of}, but {quota:.2g} of one by the container's limit: segments stall when it is used up"
        advice = "give the container one whole core at least (--cpus=1)"
        return Finding(check="cores", state="warning", text=text, advice=advice)
    return Finding(check="cores", state="ok", text=of if quota is None else f"{of}, {quota:g} by the container's limit")


def _quota(cpu_max: Path) -> float | None:
    try:
        quota, period = cpu_max.read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def memory(
    meminfo: Path = Path("/proc/meminfo"),
    limit: Path = Path("/sys/fs/cgroup/memory.max"),
    used: Path = Path("/sys/fs/cgroup/memory.current"),
) -> Finding:
    """How much memory is left for this process."""
    left = []
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
        left += [1024 * int(found[1])] if found else []
    except OSError:
        pass
    try:
        left.append(int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError):
        # No limit: no such file, or "max".
        pass
    if not left:
        return Finding(check="memory", state="ok", text="the system does not say how much is left")
    text = f"{format_bytes(max(0, min(left)))} are left"
    if min(left) < LEAST_BYTES:
        advice = "end other programs, or raise the container's limit"
        return Finding(check="memory", state="wrong", text=f"{text}, too little to run", advice=advice)
    if min(left) < FEW_BYTES:
        advice = "choose plans by `coinfer plan --max-device-memory`"
        return Finding(check="memory", state="warning", text=f"{text}: large segments may not fit", advice=advice)
    return Finding(check="memory", state="ok", text=text)


def clock() -> Finding:
    """Whether the clock that times requests never goes back."""
    info = time.get_clock_info("perf_counter")
    told = [time.perf_counter() for _ in range(10_000)]
    if not info.monotonic or info.adjustable or any(b < a for a, b in zip(told, told[1:], strict=False)):
        text = f"{info.implementation} may go back: latencies will be wrong"
        return Finding(check="clock", state="wrong", text=text, advice="use a system with a monotonic clock")
    return Finding(check="clock", state="ok", text=f"monotonic, in steps of {info.resolution:.0e} s")


def files() -> Finding:
    """How many files and connections may be open."""
    try:
        import resource
    except ImportError:
        return Finding(check="open files", state="ok", text="the system does not say how many")
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= FEW_FILES:
        text = "no limit" if soft == resource.RLIM_INFINITY else f"up to {soft}"
        return Finding(check="open files", state="ok", text=text)
    text, advice = f"up to {soft}; an edge has one for each device", "raise it: ulimit -n 65536, or LimitNOFILE="
    state: State = "warning" if soft >= LEAST_FILES else "wrong"
    return Finding(check="open files", state=state, text=text, advice=advice)


def scratch() -> Finding:
    """Whether temporary files can be written."""
    try:
        with tempfile.TemporaryFile(prefix="coinfer-") as file:
            file.write(bytes(65536))
            file.flush()
    except OSError as error:
        text = f"cannot be written: {(error.strerror or str(error)).lower()}"
        advice = "set TMPDIR to a folder that can be, with some room"
        return Finding(check="temporary files", state="wrong", text=text, advice=advice)
    return Finding(check="temporary files", state="ok", text=tempfile.gettempdir())


def installation() -> Iterator[Finding]:
    """All of them, in order."""
    try:
        importlib.import_module("packaging")
        yield python()
        yield from packages()
    except ImportError:
        text = "versions cannot be compared without the package packaging"
        yield Finding(check="packages", state="wrong", text=text, advice="pip install packaging")
    yield coder()
    yield engine()
    yield processor()
    yield cores()
    yield memory()
    yield clock()
    yield files()
    yield scratch()
