"""The device's process of bench.traces: a guarded device that answers a picture every period, or times every plan.

    python -m bench.trace_device BUNDLE PIXELS --edge URL --out FILE --slowdown F I --yardstick F I --period S --count N
        [--plan K]
    python -m bench.trace_device BUNDLE PIXELS --edge URL --out FILE --slowdown F I --yardstick F I --period S
        --calibrate N

It says "ready" when it is connected, and begins when it reads a line.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean, median
from typing import Any

import msgspec
import numpy as np

from coinfer.bundle import Bundle, load_bundle
from coinfer.engine.measure import pin
from coinfer.lab.clock import sharpen_sleep
from coinfer.lab.slow import SlowedDevice
from coinfer.lab.yardstick import LoopTimes, Yardstick
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.runtime.device import Device
from coinfer.runtime.guarded import GuardedDevice
from coinfer.runtime.request import Answer
from coinfer.timeline import Timeline

STAGES = ("head", "exit", "encode", "decode", "tail")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("pixels", type=Path)
    parser.add_argument("--edge", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--slowdown", type=float, nargs=2, required=True)
    parser.add_argument("--yardstick", type=float, nargs=2, required=True)
    parser.add_argument("--rtt", type=float, default=0.02)
    parser.add_argument("--period", type=float, default=0.1)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--plan", type=int, default=None)
    parser.add_argument("--calibrate", type=int, default=0)
    parser.add_argument("--core", type=int, default=None)
    given = parser.parse_args()
    if given.core is not None:
        pin(given.core)
    sharpen_sleep()
    bundle, pixels = load_bundle(given.bundle), np.load(given.pixels)
    factors = Slowdown(fp32=given.slowdown[0], int8=given.slowdown[1])
    # What others compute on its core meanwhile, this process's own threads too, is not stretched with it.
    loops = LoopTimes(fp32_s=given.yardstick[0], int8_s=given.yardstick[1])
    pace = SlowedDevice(factors, counts="cpu", yardstick=Yardstick(loops))
    if given.calibrate:
        rows = calibrate(bundle, pixels, pace, given)
        given.out.write_bytes(msgspec.json.encode(rows))
        return
    # What a device would know of itself when it is installed; the rate is for it to find out.
    assumed = Conditions(
        link=Link(rate_bps=1e6, delay_s=given.rtt / 2), device=factors, exchange_s=bundle.profile().exchange_s
    )
    timeline = Timeline()
    with GuardedDevice(
        bundle, edge=given.edge, plan=given.plan, conditions=assumed, pace=pace, timeline=timeline, seed=0
    ) as device:
        # As `coinfer run` does.
        device.rehearse(pixels[0])
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(0.0005)
        say("ready")
        sys.stdin.readline()
        begin_s = time.perf_counter()
        zero_s = device.now_s()
        xs = camera(pixels, given.count, given.period, begin_s)
        answers = [shown(answer, zero_s) for answer in device.stream(xs, window=8)]
        # Leaving cuts the link once more.
        num_lost = device.keeper.num_lost
    changes = [msgspec.to_builtins(decision) | {"at_s": decision.at_s - zero_s} for decision in timeline.decisions]
    lines = [{"losses": num_lost, "decisions": changes}, *answers]
    given.out.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in lines))


def camera(pixels: np.ndarray, count: int, period_s: float, begin_s: float) -> Iterator[np.ndarray]:
    """A picture every period."""
    for number in range(count):
        time.sleep(max(0.0, begin_s + number * period_s - time.perf_counter()))
        yield pixels[number % len(pixels)]


def shown(answer: Answer, zero_s: float) -> dict[str, Any]:
    """One request of the log."""
    outcome = answer.outcome
    return {
        "request": answer.request,
        "plan": outcome.plan,
        "answered": outcome.answered,
        "start_s": round(outcome.start_s - zero_s, 6),
        "end_s": round(outcome.end_s - zero_s, 6),
        "wire_bytes": outcome.wire_bytes,
        "label": answer.label if answer.is_answered else None,
        "stages_s": stages_of(answer),
    }


def stages_of(answer: Answer) -> dict[str, float]:
    """Seconds of each stage."""
    found: dict[str, float] = {}
    for span in answer.spans:
        if span.stage in (*STAGES, "wait"):
            found[span.stage] = round(found.get(span.stage, 0.0) + span.end_s - span.start_s, 7)
    return found


def calibrate(
    bundle: Bundle, pixels: np.ndarray, pace: SlowedDevice, given: argparse.Namespace
) -> list[dict[str, Any]]:
    """Mean seconds of the stages of every plan, and of what a request takes beyond them; bytes on the wire.

    The pictures come as in a run, one every period.
    """
    rows = []
    with Device(bundle, edge=given.edge, pace=pace) as device:
        for plan in bundle.manifest.menu:
            device.prepare(plan.number)
            xs = camera(pixels, given.calibrate + 2, given.period, time.perf_counter())
            answers = list(device.stream(xs, plan=plan.number))
            timed = [(stages_of(answer), answer) for answer in answers[2:]]
            stages = {name: fmean([stages_s.get(name, 0.0) for stages_s, _ in timed]) for name in STAGES}
            beyond = [
                answer.outcome.latency_s - sum(seconds for name, seconds in stages_s.items() if name != "wait")
                for stages_s, answer in timed
            ]
            rows.append(
                {
                    "plan": plan.number,
                    "label": plan.label,
                    "stages_s": stages,
                    "exchange_s": max(0.0, median(beyond)) if plan.kind != "device" else 0.0,
                    "wire_bytes": median([answer.outcome.wire_bytes for answer in answers]),
                    "reply_wire_bytes": median([answer.outcome.reply_wire_bytes for answer in answers]),
                }
            )
            say(f"{plan.label}: {1e3 * sum(stages.values()):.2f} ms")
    return rows


def say(text: str) -> None:
    print(text, flush=True)


if __name__ == "__main__":
    main()
