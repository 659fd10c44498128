"""Two hundred devices at one edge: how much of the tail's own throughput is served, how fairly, how late.

    python -m bench.load --devices 200 --seconds 20

ResNet-56 is divided behind layer1 (from `out/resnet56-units.work`, which `python -m bench.pipeline build
resnet56-units` leaves; --bundle takes any other bundle with a split plan).  The edge has one core, and so has the tail
alone; the devices have the other: connections of the real protocol on loopback, which send payloads that were coded
beforehand.

    raw          the tail in ONNX Runtime alone, on the edge's core, in batches as large as the edge's
    saturation   every device asks again as soon as it has its answer          load_efficiency = served / raw
    1x, 3x       requests come at so many times the rate that was served, whatever becomes of them; the edge refuses
                 those that would wait too long; the others are timed at the device, from being sent to being answered

Raw and saturation take turns.  `efficiency_cpu` is the same ratio by the processor's time that both took of a request:
other processes of the machine do not matter to it.  Written: load.json with the figures, load.jsonl.gz with a line for
each device and step.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import msgspec
import numpy as np
import psutil
import websockets
from numpy.typing import NDArray

from coinfer.bundle import Bundle, load_bundle, new_folder, write_manifest
from coinfer.codec import calibrate, save_tables
from coinfer.engine.measure import allowed_cores, pin
from coinfer.engine.segments import Segments
from coinfer.engine.sides import run_side
from coinfer.plan import CodecSpec, Plan
from coinfer.protocol import Busy, DeviceConnection, Reply, Terms
from coinfer.runtime.edge import EdgeLimits
from coinfer.runtime.spawn import EdgeProcess

from .answers import pictures_of
from .figures import RAW, keep_figures, rounded

JOB, NETWORK, CUT = "resnet56-units", "resnet56", "layer1.8#0"
CODEC = CodecSpec(transform="uniform", bits=8, per_channel=True, coder="zstd")
CALIBRATION = 200
BATCHES = (1, 2, 4, 8, 16, 32)
# Of the batches that are as good as the best, the largest: what the edge does once for each is shared by more.
AS_GOOD = 0.98
# The edge's own default.
MAX_WAIT_S = EdgeLimits().max_wait_s
PAYLOADS = 32
LOADS = (1.0, 3.0)
# So long a step may take to answer all that was asked in it.
LEFT_S = 10.0


class Step(NamedTuple):
    """What one device had of one step: answers, refusals, failures, and the latency of each answer."""

    answered: int
    refused: int
    failed: int
    latency_s: list[float]
    edge_s: list[float]


class Course(NamedTuple):
    """One step of all devices."""

    name: str
    offered_hz: float | None
    seconds: float
    devices: list[Step]
    # Mean of the edge's batches, the share of the time that the devices' process computed, and the seconds that the
    # edge's process computed for each answer.
    batch: float
    busy: float
    edge_cpu_s: float

    @property
    def served_hz(self) -> float:
        """Answers a second."""
        return sum(device.answered for device in self.devices) / self.seconds

    @property
    def fairness(self) -> float:
        """The most answers of a device over the least."""
        counts = [device.answered for device in self.devices]
        return max(counts) / max(1, min(counts))


def divided_bundle(target: Path, codec: CodecSpec = CODEC) -> Bundle:
    """The network of the finished build in one piece, and divided behind its first stage, as a bundle at `target`."""
    # What needs torch: neither the tail alone nor the devices do.
    from coinfer.model.export import cut_onnx, load_whole

    from .cells import pictures_of as pictures_of_job
    from .cells import workshop_of

    workshop = workshop_of(JOB)
    manifest, work = workshop.manifest, workshop.folder
    whole = load_whole(work / "segments" / f"{NETWORK}.fp32.onnx")
    crossing = whole.cut(CUT).specs
    tables = "tables/crossing.safetensors" if codec.transform == "uniform" else None
    menu = (
        Plan(number=0, kind="device", variant=NETWORK, head="segments/whole.onnx"),
        Plan(
            number=1, kind="split", variant=NETWORK, cut=CUT, codec=codec, crossing=crossing,
            head="segments/head.onnx", tail="segments/tail.onnx", tables=tables,
        ),
    )  # fmt: skip
    with new_folder(target) as folder:
        for name in ("segments", "tables"):
            (folder / name).mkdir()
        (folder / "segments/whole.onnx").write_bytes(whole.path.read_bytes())
        cut_onnx(whole, CUT, head=folder / "segments/head.onnx", tail=folder / "segments/tail.onnx")
        (folder / "samples.safetensors").write_bytes((work / "samples.safetensors").read_bytes())
        if tables is not None:
            segments = Segments(lambda name: folder / name, manifest.outputs)
            features = segments.head(menu[1]).run((pictures_of_job(JOB).pixels[:CALIBRATION],))
            save_tables(calibrate(codec, crossing, features), folder / tables)
        write_manifest(
            folder, msgspec.structs.replace(manifest, menu=menu, reference_plan=0, conditions=None, cuts=(CUT,))
        )
    return load_bundle(target)


def split_of(bundle: Bundle) -> Plan:
    """The plan that is asked for: the first split."""
    return next(plan for plan in bundle.manifest.menu if plan.kind == "split")


def payloads_of(bundle: Bundle) -> list[bytes]:
    """What devices send, coded beforehand."""
    segments, plan = Segments(bundle.path, bundle.manifest.outputs), split_of(bundle)
    pictures = pictures_of(bundle)[:PAYLOADS]
    return [segments.codec(plan).encode(run_side(plan, "device", segments, (one[None],)).values) for one in pictures]


# The tail alone.


class Alone(NamedTuple):
    """What the tail alone does: samples a second, and seconds of the processor for each."""

    hz: float
    cpu_s: float


def raw_throughput(bundle: Bundle, batches: Sequence[int], seconds: float) -> dict[int, Alone]:
    """The tail alone by the size of the batch, on this core and in one thread, as at the edge."""
    segments, plan = Segments(bundle.path, bundle.manifest.outputs), split_of(bundle)
    decoded = [segments.codec(plan).decode(payload) for payload in payloads_of(bundle)]
    tail = segments.tail(plan)
    found = {}
    for batch in batches:
        rows = [decoded[k % len(decoded)] for k in range(batch)]
        joined = [np.concatenate(parts) for parts in zip(*rows, strict=True)]
        tail.run(joined)
        begun_s, busy_s = time.perf_counter(), _busy_s()
        done = 0
        while (took_s := time.perf_counter() - begun_s) < seconds:
            tail.run(joined)
            done += batch
        found[batch] = Alone(done / took_s, (_busy_s() - busy_s) / done)
    return found


def raw_process(bundle: Bundle, batches: Sequence[int], seconds: float, core: int | None) -> dict[int, Alone]:
    """The same in a process of its own on that core."""
    command = [sys.executable, "-m", "bench.load", "--bundle", str(bundle.folder), "--seconds", str(seconds)]
    command += ["--tail", *map(str, batches)] + ([] if core is None else ["--core", str(core)])
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {int(batch): Alone(*one) for batch, one in json.loads(found).items()}


# The devices.


class Simulated:
    """A device that does nothing but ask: one connection, payloads that were coded beforehand."""

    def __init__(self, url: str, terms: Terms, plan: int, payloads: Sequence[bytes], place: int) -> None:
        self._url, self._connection = url, DeviceConnection(terms)
        self._plan, self._payloads, self._number = plan, payloads, place
        self._sent_s: dict[int, float] = {}
        self._all_back = asyncio.Event()
        self._clear()

    def _clear(self) -> None:
        self._refused = self._failed = 0
        self._latency_s: list[float] = []
        self._edge_s: list[float] = []

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Simulated]:
        """While entered, it has its connection."""
        options = {"compression": None, "ping_interval": None, "max_size": 1 << 20, "proxy": None, "open_timeout": 60}
        async with websockets.connect(self._url, **options) as socket:  # type: ignore[arg-type]
            self._socket = socket
            await socket.send(self._connection.hello())
            self._connection.receive(await socket.recv())
            yield self

    async def ask(self) -> None:
        """Send the next request."""
        self._number += 1
        payload = self._payloads[self._number % len(self._payloads)]
        self._all_back.clear()
        self._sent_s[self._number] = time.perf_counter()
        await self._socket.send(self._connection.request(self._number, self._plan, payload))

    async def hear(self) -> float:
        """Take the edge's next message; after how many seconds it wants to be asked again."""
        event = self._connection.receive(await self._socket.recv())
        took_s = time.perf_counter() - self._sent_s.pop(event.request)  # type: ignore[union-attr]
        if isinstance(event, Reply):
            self._latency_s.append(took_s)
            self._edge_s.append(sum(event.durations) * 1e-6)
        elif isinstance(event, Busy):
            self._refused += 1
        else:
            self._failed += 1
        if not self._sent_s:
            self._all_back.set()
        return event.retry_after_s if isinstance(event, Busy) else 0.0

    async def saturate(self, until_s: float) -> Step:
        """Ask again as soon as there is an answer, or when a busy edge says so."""
        self._clear()
        while time.perf_counter() < until_s:
            await self.ask()
            if (wait_s := await self.hear()) > 0:
                await asyncio.sleep(wait_s)
        return self._step()

    async def offer(self, begin_s: float, until_s: float, period_s: float, phase: float) -> Step:
        """Ask at fixed times, whatever comes of it, and then wait for all answers."""
        self._clear()
        listening = asyncio.create_task(self._listen())
        at_s = begin_s + phase * period_s
        while at_s < until_s:
            await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
            await self.ask()
            at_s += period_s
        async with asyncio.timeout(LEFT_S):
            if self._sent_s:
                await self._all_back.wait()
        listening.cancel()
        return self._step()

    async def _listen(self) -> None:
        while True:
            await self.hear()

    def _step(self) -> Step:
        return Step(len(self._latency_s), self._refused, self._failed, self._latency_s, self._edge_s)


class Crowd:
    """All devices, in this process."""

    def __init__(self, edge: EdgeProcess, bundle: Bundle, devices: int, seed: int) -> None:
        url = edge.url
        self._edge = psutil.Process(edge.pid)
        terms, plan, payloads = Terms.of(bundle), split_of(bundle).number, payloads_of(bundle)
        self._url, self._chance = url, random.Random(seed)
        self._devices = [Simulated(url, terms, plan, payloads, place) for place in range(devices)]
        self._entered = AsyncExitStack()

    async def __aenter__(self) -> Crowd:
        for device in self._devices:
            await self._entered.enter_async_context(device.connected())
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._entered.aclose()

    async def saturate(self, seconds: float) -> Course:
        """As much as the edge serves."""
        until_s = time.perf_counter() + seconds
        return await self._run("saturation", None, [device.saturate(until_s) for device in self._devices])

    async def offer(self, name: str, rate_hz: float, seconds: float) -> Course:
        """Requests at a rate, shared by all devices."""
        begin_s = time.perf_counter() + 0.1
        period_s = len(self._devices) / rate_hz
        steps = [
            device.offer(begin_s, begin_s + seconds, period_s, self._chance.random()) for device in self._devices
        ]
        return await self._run(name, rate_hz, steps)

    async def _run(self, name: str, offered_hz: float | None, steps: list[Coroutine[Any, Any, Step]]) -> Course:
        before, begun_s = self._batches(), time.perf_counter()
        busy_s, edge_s = _busy_s(), _busy_s(self._edge)
        devices = await asyncio.gather(*steps)
        seconds = time.perf_counter() - begun_s
        busy_s, edge_s = _busy_s() - busy_s, _busy_s(self._edge) - edge_s
        batches, requests = (now - then for now, then in zip(self._batches(), before, strict=True))
        answered = sum(device.answered for device in devices)
        return Course(
            name, offered_hz, seconds, devices, requests / max(1, batches), busy_s / seconds, edge_s / max(1, answered)
        )

    def _batches(self) -> tuple[float, float]:
        """How many batches the edge has computed, and requests in them."""
        with urllib.request.urlopen(self._url.replace("ws:", "http:") + "/metrics", timeout=30) as answer:
            page = answer.read().decode()
        count, total = (
            float(re.search(rf"^coinfer_batch_size_{what} (\S+)", page, re.MULTILINE)[1])  # type: ignore[index]
            for what in ("count", "sum")
        )
        return count, total


def _busy_s(process: psutil.Process | None = None) -> float:
    times = (process or psutil.Process()).cpu_times()
    return float(times.user + times.system)


# The whole.


def load(
    bundle: Bundle, *, devices: int, seconds: float, rounds: int, raw: Path = RAW, raw_s: float = 3.0, seed: int = 0,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:  # fmt: skip
    """Measure all steps, write what was found, and give the figures."""
    cores = allowed_cores()
    edge_core, own_core = (cores[-1], cores[0]) if len(cores) > 1 else (None, None)
    alone = raw_process(bundle, BATCHES, raw_s, edge_core)
    best = max(one.hz for one in alone.values())
    batch = max(size for size, one in alone.items() if one.hz >= AS_GOOD * best)
    tell(f"the tail alone: {', '.join(f'{size}: {one.hz:.1f} /s' for size, one in alone.items())}; batches of {batch}")
    if own_core is not None:
        pin(own_core)
    raws = [raw_process(bundle, (batch,), raw_s, edge_core)[batch]]
    courses: list[Course] = []
    options = ("--max-wait", str(MAX_WAIT_S), "--connections", str(devices + 10))

    async def steps(edge: EdgeProcess) -> None:
        async with Crowd(edge, bundle, devices, seed) as crowd:
            await crowd.saturate(min(2.0, seconds))
            for _ in range(rounds):
                courses.append(await crowd.saturate(seconds))
                raws.append(raw_process(bundle, (batch,), raw_s, edge_core)[batch])
                tell(f"served {courses[-1].served_hz:.1f} /s of {raws[-1].hz:.1f} /s, "
                     f"{1e3 * courses[-1].edge_cpu_s:.2f} ms of the processor, alone {1e3 * raws[-1].cpu_s:.2f} ms")
            served_hz = median(course.served_hz for course in courses)
            for times in LOADS:
                courses.append(await crowd.offer(f"{times:g}x", times * served_hz, seconds))
                tell(f"{times:g}x: p95 {_p95(courses[-1]):.3f} s")

    try:
        with EdgeProcess(bundle.folder, max_batch=batch, core=edge_core, options=options) as edge:
            asyncio.run(steps(edge))
    finally:
        if own_core is not None:
            psutil.Process().cpu_affinity([*cores])
    figures = figures_of(courses, alone, raws, batch, devices)
    keep_figures(raw, "load", figures, _lines(courses))
    return figures


def figures_of(
    courses: Sequence[Course], alone: dict[int, Alone], raws: Sequence[Alone], batch: int, devices: int
) -> dict[str, Any]:
    """The figures; the efficiency of a round is against the mean of the tail alone before and behind it."""
    saturated = [course for course in courses if course.offered_hz is None]
    efficiency = [
        course.served_hz / ((before.hz + after.hz) / 2)
        for course, before, after in zip(saturated, raws, raws[1:], strict=False)
    ]
    cpu = [
        (before.cpu_s + after.cpu_s) / 2 / course.edge_cpu_s
        for course, before, after in zip(saturated, raws, raws[1:], strict=False)
    ]
    return {
        "load_devices": devices,
        "load_efficiency": rounded(median(efficiency)),
        "load_fairness": rounded(max(course.fairness for course in saturated)),
        "load_bound_s": MAX_WAIT_S,
        "load_p95_s": {course.name: rounded(_p95(course)) for course in courses if course.offered_hz is not None},
        "max_batch": batch,
        "raw_hz_by_batch": {str(size): rounded(one.hz) for size, one in alone.items()},
        "raw_hz": [rounded(one.hz) for one in raws],
        "efficiency_cpu": [rounded(one) for one in cpu],
        "efficiency": [rounded(one) for one in efficiency],
        "steps": [_told(course) for course in courses],
    }


def _told(course: Course) -> dict[str, Any]:
    answered = sum(device.answered for device in course.devices)
    refused = sum(device.refused for device in course.devices)
    latency_s = _all(course, "latency_s")
    return {
        "step": course.name, "offered_hz": rounded(course.offered_hz), "seconds": rounded(course.seconds),
        "served_hz": rounded(course.served_hz), "answered": answered, "refused": refused,
        "refused_share": rounded(refused / max(1, answered + refused)),
        "failed": sum(device.failed for device in course.devices), "fairness": rounded(course.fairness),
        "batch": rounded(course.batch), "devices_busy": rounded(course.busy),
        "edge_cpu_ms": rounded(1e3 * course.edge_cpu_s),
        "latency_s": {f"p{p}": rounded(float(np.percentile(latency_s, p))) for p in (50, 95, 99)},
        "at_edge_p95_s": rounded(float(np.percentile(_all(course, "edge_s"), 95))),
    }  # fmt: skip


def _all(course: Course, name: str) -> NDArray[np.float64]:
    return np.concatenate([np.array(getattr(device, name), np.float64) for device in course.devices])


def _p95(course: Course) -> float:
    return float(np.percentile(_all(course, "latency_s"), 95))


def _lines(courses: Sequence[Course]) -> list[dict[str, Any]]:
    return [
        {
            "course": place, "step": course.name, "device": number, "answered": device.answered,
            "refused": device.refused, "failed": device.failed,
            "latency_ms": [round(1e3 * one, 2) for one in device.latency_s],
        }
        for place, course in enumerate(courses)
        for number, device in enumerate(course.devices)
    ]  # fmt: skip


def main() -> int:
    """0 when it is done; in the process of the tail alone too."""
    parser = argparse.ArgumentParser(prog="python -m bench.load", description=__doc__.splitlines()[0])
    parser.add_argument("--devices", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each step")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--bundle", type=Path, help="another one than ResNet-56 divided behind layer1")
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--tail", nargs="+", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--core", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.tail is not None:
        if given.core is not None:
            pin(given.core)
        print(json.dumps(raw_throughput(load_bundle(given.bundle), given.tail, given.seconds)))
        return 0
    divided = Path("out") / f"{NETWORK}-layer1"
    bundle = divided_bundle(divided) if given.bundle is None else load_bundle(given.bundle)
    figures = load(
        bundle, devices=given.devices, seconds=given.seconds, rounds=given.rounds, raw=given.raw,
        tell=lambda line: print(f"{time.strftime('%H:%M:%S')} {line}", flush=True),
    )  # fmt: skip
    for name in ("load_devices", "load_efficiency", "load_fairness", "load_p95_s"):
        print(f"{name}: {figures[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
