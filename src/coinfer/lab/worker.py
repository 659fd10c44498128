"""The device's process of a benchmark: `python -m coinfer.lab.worker BUNDLE --pixels FILE.npy --edge URL --core K`.

JSON lines in, JSON lines out; no torch.  It begins with one `Ready` line.  Each `Command` that comes on the
standard input is answered by one `Request` line for every image, in order, then one `Done` line.  It ends with its
standard input.

    -> {"plan": 3, "images": [17], "slowdown": {"fp32": 30, "int8": 60}, "mode": "single"}
    <- {"plan": 3, "image": 17, "answered": "edge", "latency_s": 0.0213, "head_s": 0.011, ...}
    <- {"rss_bytes": 61534208}

A request that fails is a line too, with `answered` "failed" and the error's text.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ..errors import CoinferError, DataError
from ..plan import Value
from ..profile import Slowdown
from .clock import now_s, sharpen_sleep, wait_until

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..runtime.device import Device
    from ..runtime.request import Answer


# Before a stream's first request comes.
BEGIN_S = 0.01


class Command(Value, frozen=True, kw_only=True):
    """What the worker is to do: these images (rows of the file) by this plan, one by one or as a stream.

    `arrivals_s`: when each request of a stream comes, from the stream's start; latencies then count from there, however
    long it waits to be taken.  Empty: as fast as they are taken.
    """

    plan: int
    images: tuple[int, ...]
    slowdown: Slowdown = Slowdown()
    mode: Literal["single", "stream"] = "single"
    window: int = 8
    arrivals_s: tuple[float, ...] = ()


class Ready(Value, frozen=True, kw_only=True):
    """The worker waits for commands: what it cost to get there, and that it did without torch."""

    import_s: float
    rss_import_bytes: int
    rss_bytes: int
    has_torch: bool


class Request(Value, frozen=True, kw_only=True):
    """One request's durations in seconds, and its bytes.

    `exchange_s` is from handing the bytes to the system until the reply's bytes are there; `wait_s`, `decode_s` and
    `tail_s` are the edge's own durations within it; `finish_s` is reading the reply.  `start_s` and `end_s` are on
    the worker's clock.  `exit` is the place in the plan of the exit that answered.
    """

    plan: int
    image: int
    answered: str
    start_s: float = 0.0
    end_s: float = 0.0
    latency_s: float = 0.0
    head_s: float = 0.0
    exit_s: float = 0.0
    encode_s: float = 0.0
    exchange_s: float = 0.0
    wait_s: float = 0.0
    decode_s: float = 0.0
    tail_s: float = 0.0
    finish_s: float = 0.0
    payload_bytes: int = 0
    wire_bytes: int = 0
    reply_wire_bytes: int = 0
    predicted: int | None = None
    error: str | None = None
    exit: int | None = None


class Done(Value, frozen=True, kw_only=True):
    """All requests of a command are answered; resident memory now, and how long the slowed core computed for them."""

    rss_bytes: int
    busy_s: float = 0.0


def main(arguments: list[str] | None = None) -> int:
    """Run the worker until its standard input ends; the exit code."""
    start_s = time.perf_counter()
    import numpy as np

    from ..bundle import load_bundle
    from ..engine.measure import pin
    from ..runtime.device import Device
    from .slow import SlowedDevice
    from .yardstick import LoopTimes, Yardstick

    import_s = time.perf_counter() - start_s
    rss_import_bytes = resident_bytes()
    parser = argparse.ArgumentParser(prog="coinfer.lab.worker", description="The device's process of a benchmark.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--pixels", type=Path, required=True, help="pictures (N, H, W, C) uint8, .npy")
    parser.add_argument("--edge", help="ws://HOST:PORT; without it device plans only")
    parser.add_argument("--core", type=int, help="the one core to run on")
    parser.add_argument("--yardstick", type=float, nargs=2, help="seconds of its two loops at the reference speed")
    parser.add_argument("--timeout", type=float, default=120.0, help="the longest silence of the link, in s")
    options = parser.parse_args(arguments)
    try:
        pin(options.core)
        pixels = np.load(options.pixels, allow_pickle=False, mmap_mode="r")
        yardstick = None
        if options.yardstick is not None:
            yardstick = Yardstick(LoopTimes(fp32_s=options.yardstick[0], int8_s=options.yardstick[1]))
        pace = SlowedDevice(Slowdown(), counts="cpu", yardstick=yardstick)
        bundle = load_bundle(options.bundle)
        with Device(bundle, edge=options.edge, pace=pace, timeout_s=options.timeout) as device:
            ready = Ready(
                import_s=import_s,
                rss_import_bytes=rss_import_bytes,
                rss_bytes=resident_bytes(),
                has_torch="torch" in sys.modules,
            )
            _write(ready)
            for line in sys.stdin.buffer:
                _obey(device, pace, pixels, line)
    except (CoinferError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        return 1
    return 0


def resident_bytes() -> int:
    """Resident memory of this process; where /proc is absent, the most it ever had."""
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _obey(device: Device, pace: Any, pixels: NDArray[Any], line: bytes) -> None:
    try:
        command = msgspec.json.decode(line, type=Command)
    except msgspec.MsgspecError as error:
        raise DataError(f"not a command: {error} (benchmark worker)") from error
    if command.arrivals_s and (len(command.arrivals_s) != len(command.images) or command.mode != "stream"):
        raise DataError(
            f"arrivals are of a stream, one for each image: got {len(command.arrivals_s)} for {len(command.images)} "
            f"images, mode {command.mode} (benchmark worker)"
        )
    if command.images and not 0 <= min(command.images) <= max(command.images) < len(pixels):
        raise DataError(f"images must be 0 to {len(pixels) - 1}, got {command.images} (benchmark worker)")
    pace.slowdown = command.slowdown
    before_s = pace.busy_s
    # Sessions are loaded before the clock runs; answers are written after it stopped.
    device.prepare(command.plan)
    is_stream = command.mode == "stream"
    lines = list(_streamed(device, pixels, command) if is_stream else _singly(device, pace, pixels, command))
    for request in lines:
        _write(request)
    _write(Done(rss_bytes=resident_bytes(), busy_s=pace.busy_s - before_s))


def _singly(device: Device, pace: Any, pixels: NDArray[Any], command: Command) -> Iterator[Request]:
    for image in command.images:
        # As a device that has one plan, and not as one that has just run another: awake, and with warm caches.
        pace.wake(partial(device.warm_up, pixels[image], plan=command.plan))
        try:
            yield _line(image, device.infer(pixels[image], plan=command.plan))
        except CoinferError as error:
            yield Request(plan=command.plan, image=image, answered="failed", error=str(error))


def _streamed(device: Device, pixels: NDArray[Any], command: Command) -> Iterator[Request]:
    # Pictures are read before and lines are made after: neither is work of the device.
    pictures = [pixels[image].copy() for image in command.images]
    answers: list[Answer] = []
    error_text: str | None = None
    # On both clocks: the device's own, and the one that the lab waits by.
    begin_s, zero_s = now_s() + BEGIN_S, now_s() - device.now_s()
    given = _as_they_come(pictures, command.arrivals_s, begin_s) if command.arrivals_s else iter(pictures)
    try:
        answers.extend(device.stream(given, plan=command.plan, window=command.window))
    except CoinferError as error:
        error_text = str(error)
    for place, (image, answer) in enumerate(zip(command.images, answers, strict=False)):
        line = _line(image, answer)
        if command.arrivals_s:
            came_s = begin_s - zero_s + command.arrivals_s[place]
            line = msgspec.structs.replace(line, start_s=came_s, latency_s=line.end_s - came_s)
        yield line
    for image in command.images[len(answers) :]:
        yield Request(plan=command.plan, image=image, answered="failed", error=error_text)


def _as_they_come(
    pictures: list[NDArray[Any]], arrivals_s: tuple[float, ...], begin_s: float
) -> Iterator[NDArray[Any]]:
    """Each picture when it is there, never before."""
    sharpen_sleep()
    for picture, at_s in zip(pictures, arrivals_s, strict=True):
        wait_until(begin_s + at_s)
        yield picture


def _line(image: int, answer: Answer) -> Request:
    outcome = answer.outcome
    seconds: dict[str, float] = {}
    for span in answer.spans:
        seconds[span.stage] = seconds.get(span.stage, 0.0) + span.end_s - span.start_s
    received_s = [span.end_s for span in answer.spans if span.stage == "exchange"]
    return Request(
        plan=outcome.plan,
        image=image,
        answered=outcome.answered,
        start_s=outcome.start_s,
        end_s=outcome.end_s,
        latency_s=outcome.latency_s,
        head_s=seconds.get("head", 0.0),
        exit_s=seconds.get("exit", 0.0),
        encode_s=seconds.get("encode", 0.0),
        exchange_s=seconds.get("exchange", 0.0),
        wait_s=seconds.get("wait", 0.0),
        decode_s=seconds.get("decode", 0.0),
        tail_s=seconds.get("tail", 0.0),
        finish_s=outcome.end_s - received_s[0] if received_s else 0.0,
        payload_bytes=outcome.payload_bytes,
        wire_bytes=outcome.wire_bytes,
        reply_wire_bytes=outcome.reply_wire_bytes,
        predicted=answer.label if answer.is_answered else None,
        exit=outcome.exit,
    )


def _write(line: Value) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(line) + b"\n")
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    sys.exit(main())
