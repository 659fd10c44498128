"""Adaptation over recorded links: a device that chooses each request's plan, beside every fixed plan and an oracle.

    python -m bench.traces live        six traces, replayed for two minutes each: adaptive, and the best fixed plan
    python -m bench.traces compare     the live runs beside the simulator anew, from their logs
    python -m bench.traces simulate    all traces: adaptive, every fixed plan, the oracle; with the medians of the live
                                       runs' own times

One device asks every PERIOD_S.  The oracle knows the link's future and its own queue, and takes for each request the
plan with the earliest finish, the device alone included.  Raw logs go to docs/results/raw/runtime.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from coinfer.bundle import Bundle, load_bundle
from coinfer.data import load_source
from coinfer.engine.measure import allowed_cores, pin
from coinfer.lab.shape import ShapedLink
from coinfer.lab.trace import load_trace, mean_rate_bps
from coinfer.lab.yardstick import measure_loops
from coinfer.profile import Conditions, Link, Slowdown, Trace
from coinfer.report.results import read_raw, write_raw
from coinfer.runtime.control import Pilot
from coinfer.runtime.guarded import HEDGE
from coinfer.runtime.spawn import EdgeProcess
from coinfer.search.line import Line
from coinfer.simulate.adaptive import Ended, oracle, simulate_pilot

from .cells import note_commit, note_machine
from .epochs import say

RAW = Path("docs/results/raw/runtime")
TRACES = Path("../shared/data/traces")
NETWORK = "resnet56-units"
SLOWDOWN, PERIOD_S, DELAY_S, DOWN_BPS, DURATION_S = 100.0, 0.25, 0.01, 1e7, 120.0
# A robot that must have its answer within a period.
DEADLINE_S = PERIOD_S
CALIBRATION = 9
# Requests of a plan whose mean time is believed; and so many times a plan's median is a pause of the device.
ENOUGH, PAUSE = 5, 3.0
# How near the simulator must come to a live run's mean latency.
AGREES = 0.1
# Replayed live: the one measured uplink, two of 3G, one of 4G, two of 5G.
LIVE = (
    "mahimahi_lte/ATT-LTE-driving-2016.up",
    "hsdpa_3g_sabre/report.2010-09-14_2303CEST.json",
    "hsdpa_3g_sabre/report.2010-12-09_1222CET.json",
    "ghent_4g_sabre/report_train_0001.json",
    "ucc_5g/*Driving*2020.01.16*",
    "ucc_5g/*Static*2020.02.14*",
)


class Run(NamedTuple):
    """What a way of choosing gave on one trace."""

    mean_s: float
    p95_s: float
    p99_s: float
    late_share: float
    plans: dict[int, int]
    answered: dict[str, int]


def bundle() -> Bundle:
    return load_bundle(Path("out") / NETWORK)


def trace_files() -> list[Path]:
    """Every recorded link, by folder and name."""
    kinds = ("*.json", "*.csv", "*.up", "*.down")
    return sorted(path for kind in kinds for path in TRACES.glob(f"*/{kind}"))


def named(path: Path) -> str:
    """A trace's name in tables: its folder's first word, and what tells it from the others."""
    return f"{path.parent.name.split('_')[0]}/{path.name.removesuffix('.json').removesuffix('.csv')}"


def link_of(trace: Trace) -> Link:
    return Link(rate_bps=mean_rate_bps(trace), delay_s=DELAY_S, down_rate_bps=DOWN_BPS, trace=trace)


def summed(ended: list[Ended] | list[dict[str, Any]]) -> Run:
    """Figures of a run's requests."""
    rows = [one._asdict() if isinstance(one, Ended) else one for one in ended]
    latency_s = np.array([row["end_s"] - row["start_s"] for row in rows])
    p95_s, p99_s = np.percentile(latency_s, (95, 99))
    plans: dict[int, int] = {}
    answered: dict[str, int] = {}
    for row in rows:
        plans[row["plan"]] = plans.get(row["plan"], 0) + 1
        answered[row["answered"]] = answered.get(row["answered"], 0) + 1
    late = float(np.mean(latency_s > DEADLINE_S))
    return Run(float(latency_s.mean()), float(p95_s), float(p99_s), late, plans, answered)


def lines_from(rows: list[dict[str, Any]]) -> dict[int, Line]:
    """Lines of the plans from their measured stages; the link's own delays are left to the link."""
    lines = {}
    for row in rows:
        stages_s = row["stages_s"]
        crosses = row["wire_bytes"] > 0
        lines[row["plan"]] = Line(
            device_s=stages_s["head"] + stages_s["exit"] + stages_s["encode"],
            up_bits=8.0 * row["wire_bytes"],
            down_bits=8.0 * row["reply_wire_bytes"],
            edge_s=stages_s["decode"] + stages_s["tail"],
            share=1.0 if crosses else 0.0,
            exchange_s=row["exchange_s"],
        )
    return lines


class Own(NamedTuple):
    """What a live run says of its device: lines by the mean times that it took itself, and its pauses."""

    lines: dict[int, Line]
    pauses_s: list[float]


def own_times(lines: dict[int, Line], rows: list[dict[str, Any]]) -> Own:
    """The lines with the mean times of plans with enough requests, and each request's pause.

    The machine is faster or slower in one minute than in another; by how much the plans say that were used, and the
    others are taken to be so as well.  What took the device more than `PAUSE` times its plan's median is no property
    of the plan: somebody else had the core, and at a slowdown of 100 that is 100 times as long.
    """
    own_s = {row["request"]: sum(row["stages_s"].get(name, 0.0) for name in ("head", "exit", "encode")) for row in rows}
    edge_s = {row["request"]: row["stages_s"].get("decode", 0.0) + row["stages_s"].get("tail", 0.0) for row in rows}
    by_plan: dict[int, list[int]] = {}
    for row in rows:
        by_plan.setdefault(row["plan"], []).append(row["request"])
    pauses_s = [0.0] * len(rows)
    means: dict[int, tuple[float, float]] = {}
    for number, requests in by_plan.items():
        median_s = float(np.median([own_s[request] for request in requests]))
        steady = [request for request in requests if own_s[request] <= PAUSE * median_s]
        for request in set(requests) - set(steady):
            pauses_s[request] = own_s[request] - median_s
        if len(requests) >= ENOUGH:
            means[number] = (
                float(np.mean([own_s[request] for request in steady])),
                float(np.mean([edge_s[request] for request in steady])),
            )
    ratios = [own / lines[n].device_s for n, (own, _) in means.items() if lines[n].device_s > 0]
    ratio = float(np.median(ratios)) if ratios else 1.0
    own = {
        n: line._replace(device_s=means[n][0], edge_s=means[n][1])
        if n in means else line._replace(device_s=ratio * line.device_s)
        for n, line in lines.items()
    }  # fmt: skip
    return Own(own, pauses_s)


def conditions(held: Bundle) -> Conditions:
    """What a device assumes of itself and the link before it knows."""
    ratio = held.manifest.int8_slowdown_ratio
    return Conditions(
        link=Link(rate_bps=1e6, delay_s=DELAY_S),
        device=Slowdown(fp32=SLOWDOWN, int8=SLOWDOWN * ratio),
        exchange_s=held.profile().exchange_s,
    )


def allowed(held: Bundle, lines: Mapping[int, Line]) -> dict[int, Line]:
    """The plans that keep the goal's loss."""
    most = held.manifest.max_loss_points
    fine = {
        candidate.plan.number
        for candidate in held.candidates()
        if candidate.dropped is None and (candidate.evidence.loss_points or 0.0) <= most
    }
    return {number: line for number, line in lines.items() if number in fine}


def simulated(
    held: Bundle, lines: dict[int, Line], trace: Trace, plan: int | None, pauses_s: Sequence[float] = ()
) -> tuple[Pilot, list[Ended]]:
    """One way of choosing over one trace, in made-up time; what it takes is what was measured."""
    pilot = Pilot(held, conditions=conditions(held), plan=plan)
    # As a device that has rehearsed.
    pilot.rehearsed({known.number: lines[known.number].device_s for known in pilot.plans()})
    ended = simulate_pilot(pilot, lines, arrivals_s(trace), link_of(trace), hedge=HEDGE, pauses_s=pauses_s)
    return pilot, ended


def arrivals_s(trace: Trace) -> list[float]:
    """A request every period, for as long as the trace lasts, two minutes at most."""
    return (PERIOD_S * np.arange(int(min(DURATION_S, trace.duration_s) / PERIOD_S))).tolist()


class Live:
    """An edge, a shaped link and a device, each a process or a thread of its own."""

    def __init__(self, held: Bundle, scratch: Path) -> None:
        self.held, self.scratch = held, scratch
        cores = sorted(allowed_cores())
        self.device_core: int | None = cores[-1]
        self.edge_core: int | None = cores[0]
        images = load_source("cifar10").images("test")
        # The part that choices were not made on.
        rest = np.arange(len(images)) % 5 != 0
        self.pixels, self.labels = images.pixels[rest][:1500], images.labels[rest][:1500]  # type: ignore[index]
        np.save(scratch / "x.npy", self.pixels)
        # The emulated device keeps the speed that its core has now.
        self.loops = measure_loops()

    def device(self, url: str, out: Path, *options: object) -> subprocess.Popen[str]:
        ratio = self.held.manifest.int8_slowdown_ratio
        command = [sys.executable, "-m", "bench.trace_device", self.held.folder, self.scratch / "x.npy"]
        command += ["--edge", url, "--out", out, "--slowdown", SLOWDOWN, SLOWDOWN * ratio]
        command += ["--yardstick", self.loops.fp32_s, self.loops.int8_s, "--rtt", 2 * DELAY_S, *options]
        command += [] if self.device_core is None else ["--core", self.device_core]
        return subprocess.Popen(
            [str(word) for word in command], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def calibrate(self) -> dict[int, Line]:
        """Times of every plan, measured now over loopback."""
        out = self.scratch / "calibration.json"
        with EdgeProcess(self.held.folder, core=self.edge_core) as edge:
            process = self.device(edge.url, out, "--period", PERIOD_S, "--calibrate", CALIBRATION)
            process.communicate(timeout=600)
        return lines_from(msgspec.json.decode(out.read_bytes()))

    def run(self, trace: Trace, plan: int | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One way of choosing over one trace, in real time: what the device says of itself, and its requests."""
        out = self.scratch / "run.jsonl"
        count = len(arrivals_s(trace))
        before = Link(rate_bps=1e7, delay_s=DELAY_S, down_rate_bps=DOWN_BPS)
        with EdgeProcess(self.held.folder, core=self.edge_core) as edge:
            host, _, port = edge.url.removeprefix("ws://").rpartition(":")
            with ShapedLink((host, int(port)), link=before) as link:
                options = ["--period", PERIOD_S, "--count", count, *([] if plan is None else ["--plan", plan])]
                process = self.device(f"ws://127.0.0.1:{link.port}", out, *options)
                assert process.stdout is not None and process.stdin is not None
                try:
                    if process.stdout.readline().strip() != "ready":
                        raise SystemExit("the device's process ended before it was ready")
                    link.set(link_of(trace))
                    process.communicate("go\n", timeout=DURATION_S + 120)
                finally:
                    process.kill()
                    process.communicate()
        head, *rows = [msgspec.json.decode(line) for line in out.read_bytes().splitlines()]
        for row in rows:
            row["right"] = row["label"] == int(self.labels[row["request"] % len(self.labels)])
        return head, rows


def live() -> None:
    """Six traces in real time, adaptive and the fixed plan that the simulation likes best; goes on where it stopped."""
    held = bundle()
    pin(sorted(allowed_cores())[0])
    # A log of all six is of an earlier run.
    log_path = RAW / "traces_live.jsonl.gz"
    logs = read_raw(log_path) if log_path.is_file() else []
    logs = [] if len(logs) == 2 * len(LIVE) else logs[: len(logs) // 2 * 2]
    done = {log["trace"] for log in logs}
    with tempfile.TemporaryDirectory() as scratch:
        bench = Live(held, Path(scratch))
        for pattern in LIVE:
            path = _file_of(pattern)
            if named(path) in done:
                continue
            trace = load_trace(path)
            lines = bench.calibrate()
            fine = allowed(held, lines)
            fixed = min(fine, key=lambda number: summed(simulated(held, lines, trace, number)[1]).mean_s)
            for plan in (None, fixed):
                head, rows = bench.run(trace, plan)
                log = {
                    "trace": named(path), "plan": plan, "lines": {str(n): line for n, line in lines.items()},
                    "labels": {str(plan.number): plan.label for plan in held.manifest.menu},
                    "losses": head["losses"], "decisions": head["decisions"], "requests": rows,
                }  # fmt: skip
                logs.append(log | compared(held, trace, log))
                say(comparison(logs[-1]))
                write_raw(log_path, logs)
    places = {named(_file_of(pattern)): place for place, pattern in enumerate(LIVE)}
    write_raw(log_path, sorted(logs, key=lambda log: places[log["trace"]]))
    note_commit(RAW, "traces_live")
    note_machine(RAW)


def _file_of(pattern: str) -> Path:
    """The first trace of that name."""
    return sorted(TRACES.glob(pattern))[0]


def compared(held: Bundle, trace: Trace, log: dict[str, Any]) -> dict[str, Any]:
    """What the simulator makes of a live run: by times from before it, and by the run's own; and the oracle's mean."""
    before = {int(number): Line(*line) for number, line in log["lines"].items()}
    own = own_times(before, log["requests"])
    by_before = summed(simulated(held, before, trace, log["plan"])[1])
    by_own = summed(simulated(held, own.lines, trace, log["plan"], own.pauses_s)[1])
    best = oracle(allowed(held, own.lines), arrivals_s(trace), link_of(trace), pauses_s=own.pauses_s)
    return {
        "own_lines": {str(number): line for number, line in own.lines.items()},
        "pauses": sum(pause_s > 0 for pause_s in own.pauses_s), "paused_s": sum(own.pauses_s),
        "before_mean_s": by_before.mean_s, "simulated_mean_s": by_own.mean_s, "oracle_mean_s": summed(best).mean_s,
    }  # fmt: skip


def comparison(log: dict[str, Any]) -> str:
    """The same in a line."""
    got = summed(log["requests"])
    return (
        f"{log['trace']} {'adaptive' if log['plan'] is None else 'plan ' + str(log['plan'])}: "
        f"{1e3 * got.mean_s:.1f} ms live, {1e3 * log['before_mean_s']:.1f} simulated, "
        f"{1e3 * log['simulated_mean_s']:.1f} by its own times, {1e3 * log['oracle_mean_s']:.1f} oracle, "
        f"{log['pauses']} pauses of {log['paused_s']:.1f} s in all, {got.answered}"
    )


def compare() -> None:
    """What the simulator makes of the live runs, anew."""
    held = bundle()
    traces = {named(path): load_trace(path) for path in trace_files()}
    logs = read_raw(RAW / "traces_live.jsonl.gz")
    for log in logs:
        log |= compared(held, traces[log["trace"]], log)
        say(comparison(log))
    write_raw(RAW / "traces_live.jsonl.gz", logs)


def simulate() -> None:
    """All traces, every way of choosing; then where the simulator does not agree with a live run within a tenth."""
    held = bundle()
    lines = median_lines()
    fine = allowed(held, lines)
    rows = []
    for path in trace_files():
        trace = load_trace(path)
        started_s = time.perf_counter()
        best = summed(oracle(fine, arrivals_s(trace), link_of(trace)))
        pilot, ended = simulated(held, lines, trace, None)
        adaptive = summed(ended)
        fixed = {number: summed(simulated(held, lines, trace, number)[1]) for number in fine}
        rows.append(
            {
                "trace": named(path), "how": "simulated", "mean_rate_bps": mean_rate_bps(trace),
                "oracle": best._asdict(), "adaptive": adaptive._asdict(), "switches": pilot.num_decisions - 1,
                "fixed": {str(number): run._asdict() for number, run in fixed.items()}, **known_of(held),
            }
        )  # fmt: skip
        least = min(fixed, key=lambda number: fixed[number].mean_s)
        say(
            f"{named(path)}: oracle {1e3 * best.mean_s:.1f} ms, adaptive {adaptive.mean_s / best.mean_s:.3f} of it, "
            f"{adaptive.mean_s / fixed[least].mean_s:.3f} of plan {least}; {time.perf_counter() - started_s:.0f} s"
        )
    write_raw(RAW / "traces_simulated.jsonl.gz", rows)
    note_commit(RAW, "traces_simulated")
    off = {
        f"{log['trace']} {'adaptive' if log['plan'] is None else log['plan']}": error
        for log in read_raw(RAW / "traces_live.jsonl.gz")
        if abs(error := log["simulated_mean_s"] / summed(log["requests"]).mean_s - 1) > AGREES
    }
    for name, error in off.items():
        say(f"the simulator is {100 * error:+.0f} % off the live run of {name}: the rows of that trace say no more")


def known_of(held: Bundle) -> dict[str, dict[str, Any]]:
    """Labels, accuracies in percent and losses in points of the menu, on the images that choices were made on."""
    on_menu = {plan.number: plan for plan in held.manifest.menu}
    known = {str(c.plan.number): c.evidence for c in held.candidates() if c.plan.number in on_menu}
    return {
        "labels": {str(number): plan.label for number, plan in on_menu.items()},
        "accuracies": {number: evidence.accuracy for number, evidence in known.items()},
        "losses": {number: evidence.loss_points for number, evidence in known.items()},
    }


def median_lines() -> dict[int, Line]:
    """Of every plan the median of the live runs' times."""
    logs = read_raw(RAW / "traces_live.jsonl.gz")
    numbers = logs[0]["own_lines"]
    columns = {n: np.array([log["own_lines"][n] for log in logs]) for n in numbers}
    return {int(n): Line(*map(float, np.median(rows, axis=0))) for n, rows in columns.items()}


if __name__ == "__main__":
    {"live": live, "compare": compare, "simulate": simulate}[sys.argv[1]]()
