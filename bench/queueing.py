"""Many devices at one edge: what a request spends there by the model of waiting, in a simulation, and measured.

python -m bench.queueing NAME    an upload of the bundle out/NAME.streams, minutes; docs/results/raw/pipeline

Devices are threads that send Poisson requests to a real edge over loopback; the edge's work takes `LOAD` times as long,
so that the two cores of this machine are enough for both. What batches take is measured first, on an edge that is never
idle.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coinfer.bundle import Bundle, load_bundle
from coinfer.engine.measure import allowed_cores, pin
from coinfer.lab.clock import now_s, sharpen_sleep, wait_until
from coinfer.plan import Candidate
from coinfer.profile import Arrivals, Conditions, Link
from coinfer.report.results import Row, read_raw, write_raw
from coinfer.report.table import TextTable
from coinfer.runtime.device import Device
from coinfer.runtime.request import Answer
from coinfer.runtime.spawn import EdgeProcess
from coinfer.search.estimate import as_table, estimate
from coinfer.search.goal import Goal
from coinfer.search.solve import search
from coinfer.simulate.arrivals import poisson
from coinfer.simulate.fleet import simulate_fleet
from coinfer.stages import courses_of
from coinfer.units import format_duration

from .cells import OUT, note_commit, note_machine, pictures_of, show
from .solvers import RAW
from .tables import spread

LOAD, DEVICES, REQUESTS = 4.0, 8, 300
SIZES, BATCHES, SHARES = (1, 2, 4, 8, 16), (1, 4, 16), (0.3, 0.6, 0.8)
LOCAL = Link(rate_bps=1e12)
BEGIN_S = 0.3


def at_edge_s(answer: Answer) -> float:
    """Seconds from a request's arrival at the edge until its reply was ready."""
    return sum(span.end_s - span.start_s for span in answer.spans if span.clock == "edge")


def upload_of(bundle: Bundle) -> Candidate:
    """The upload of the highest rate without exits."""
    on_menu = {plan.number for plan in bundle.manifest.menu if plan.kind == "upload" and not plan.exits}
    found = [candidate for candidate in bundle.candidates() if candidate.plan.number in on_menu]
    goal = Goal(minimise="throughput", max_loss_points=bundle.manifest.max_loss_points)
    return found[search(as_table(found), Conditions(link=LOCAL), goal).best]


def timed(candidate: Candidate, bundle: Bundle, pictures: NDArray[Any], core: int) -> Candidate:
    """The candidate with the edge's times in use: what a batch of each size takes of it when it is never idle.

    That is more than decoding and computing by what a process of Python does beside them.
    """
    plan, period_s = candidate.plan.number, dict[int, float]()
    for size in SIZES:
        with (
            EdgeProcess(bundle.folder, core=core, max_batch=size, load=LOAD) as edge,
            Device(bundle, edge=edge.url, plan=plan) as device,
        ):
            many = [pictures[k % len(pictures)] for k in range(max(80, 16 * size))]
            # So many wait that every batch is full.
            ends_s = sorted(answer.outcome.end_s for answer in device.stream(many, window=2 * size))
            steady_s = ends_s[3 * size :]
            period_s[size] = size * (steady_s[-1] - steady_s[0]) / (len(steady_s) - 1)
            lone = [device.infer(picture) for picture in pictures[:20]]
            spans = [span for answer in lone for span in answer.spans if span.stage == "decode"]
            decode_s = float(np.median([span.end_s - span.start_s for span in spans]))
    evidence = msgspec.structs.replace(
        candidate.evidence,
        head_s=0.0,
        encode_s=0.0,
        decode_s=decode_s / LOAD,
        tail_s=(period_s[1] - decode_s) / LOAD,
        tail_batch_s={size: (seconds - size * decode_s) / LOAD for size, seconds in period_s.items()},
    )
    return msgspec.structs.replace(candidate, evidence=evidence)


def crowd(
    bundle: Bundle, plan: int, url: str, pictures: NDArray[Any], arrivals_s: NDArray[np.float64]
) -> NDArray[np.float64]:
    """(D, K) seconds at the edge of each device's requests."""
    found = np.zeros(arrivals_s.shape)
    begin_s = now_s() + BEGIN_S

    def run(row: int) -> None:
        def come() -> Iterator[NDArray[Any]]:
            sharpen_sleep()
            for k, at_s in enumerate(arrivals_s[row]):
                wait_until(begin_s + float(at_s), spin_s=0.0)
                yield pictures[(row * 7 + k) % len(pictures)]

        with Device(bundle, edge=url, plan=plan) as device:
            for k, answer in enumerate(device.stream(come(), window=32)):
                found[row, k] = at_edge_s(answer)

    threads = [threading.Thread(target=run, args=(row,)) for row in range(len(arrivals_s))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def measure(name: str) -> None:
    """A line for each size of batches and share of the edge's highest rate."""
    bundle, pictures = load_bundle(OUT / f"{name}.streams"), pictures_of(name).pixels[:500]
    candidate, cores = upload_of(bundle), allowed_cores()
    note_commit(RAW, f"{name}.queueing")
    note_machine(RAW)
    pin(cores[0])
    lines: list[dict[str, Any]] = []
    known = timed(candidate, bundle, pictures, cores[-1])
    for most in BATCHES:
        with EdgeProcess(bundle.folder, core=cores[-1], max_batch=most, load=LOAD) as edge:
            for place, share in enumerate(SHARES):
                show("queueing", len(lines), len(BATCHES) * len(SHARES), f"batches of {most}, {share:g} of the rate")
                base = Conditions(link=LOCAL, edge_load=LOAD, max_batch=most)
                rate_hz = share * estimate(known, base).throughput_hz / DEVICES
                arrivals_s = np.stack([poisson(rate_hz, REQUESTS, seed=100 * place + row) for row in range(DEVICES)])
                seen_s = crowd(bundle, candidate.plan.number, edge.url, pictures, arrivals_s)
                asked = Arrivals(rate_hz=rate_hz, is_random=True, devices=DEVICES)
                said_s = estimate(known, msgspec.structs.replace(base, arrivals=asked)).latency_s
                simulated_s = simulate_fleet(courses_of(known, {}), arrivals_s, base, max_batch=most).latency_s
                lines.append({
                    "max_batch": most, "share": share, "devices": DEVICES, "rate_hz": rate_hz * DEVICES,
                    "alone_s": estimate(known, base).latency_s, "said_s": said_s,
                    "simulated_s": float(simulated_s.mean()), "simulated_p95_s": float(np.percentile(simulated_s, 95)),
                    "measured_s": float(seen_s.mean()), "measured_p95_s": float(np.percentile(seen_s, 95)),
                    "n": seen_s.size, "label": candidate.plan.label,
                })  # fmt: skip
                write_raw(RAW / f"{name}.queueing.jsonl.gz", lines)


def queueing_rows(name: str) -> Iterator[Row]:
    """The model's and the simulation's errors of the mean time at the edge."""
    log = f"{name}.queueing.jsonl.gz"
    lines = read_raw(RAW / log)
    for key, what in (("queueing_error", "said_s"), ("queueing_simulated_error", "simulated_s")):
        errors = [abs(line["measured_s"] / line[what] - 1) for line in lines]
        for suffix, q in (("median", 50), ("max", 100)):
            yield Row(
                name=f"{key}_{suffix}", value=float(np.percentile(errors, q)), unit="share", how="measured",
                n=len(errors), against=f"mean time at the edge, {DEVICES} devices, batches of up to {max(BATCHES)}",
                spread=spread(errors), raw=log,
            )  # fmt: skip


def queueing_table(name: str) -> TextTable:
    """Every size of batches and share of the rate."""
    lines = read_raw(RAW / f"{name}.queueing.jsonl.gz")

    def cells(line: dict[str, Any]) -> Sequence[str]:
        names = ("alone_s", "said_s", "simulated_s", "measured_s", "simulated_p95_s", "measured_p95_s")
        return [format_duration(line[key]) for key in names]

    return TextTable(
        title=f"{DEVICES} devices at an edge {LOAD:g} times slower, Poisson requests: seconds at the edge",
        columns=(
            "batches of", "share of its rate", "a second", "alone", "model, mean", "simulated", "measured",
            "simulated p95", "measured p95", "n",
        ),
        rows=tuple(
            (str(line["max_batch"]), f"{line['share']:g}", f"{line['rate_hz']:.0f}", *cells(line), str(line["n"]))
            for line in lines
        ),
    )  # fmt: skip


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python -m bench.queueing NAME")
    measure(sys.argv[1])
