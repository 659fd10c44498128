"""Streams side by side on a tiny bundle: every request once, what comes when, and the figures from the log alone."""

from pathlib import Path

import numpy as np
import pytest
from test_bench import bundle as bundle

from coinfer.bundle import Bundle
from coinfer.errors import DataError, PlanError
from coinfer.lab.cell import Cell, Effort
from coinfer.lab.record import write_log
from coinfer.lab.streams import Contender, Setting, Timing, measured, read_runs, run_streams
from coinfer.profile import Link, Slowdown
from coinfer.stages import price
from tiny_bundle import DEVICE, SPLIT32, pictures

CELL = Cell(link=Link(rate_bps=2e6, delay_s=0.002), slowdown=Slowdown(fp32=3, int8=3))
EFFORT = Effort(calibration=5, warmup=1, timings=6)


def test_contenders_take_turns_and_every_request_is_a_line(bundle: Bundle, tmp_path: Path) -> None:
    seen: list[Setting] = []

    def choose(setting: Setting) -> list[Contender]:
        seen.append(setting)
        return [
            Contender(name="alone", plan=SPLIT32, window=1),
            Contender(name="overlapped", plan=SPLIT32),
            Contender(name="device", plan=DEVICE, period_s=0.02),
        ]

    setting, runs = run_streams(bundle, pictures(12), CELL, choose, requests=20, chunk=8, effort=EFFORT)
    assert len(seen) == 1 and seen[0] is setting
    assert [len(run.requests) for run in runs] == [8] * 6 + [4] * 3
    for number in range(3):
        these = [run for run in runs if run.round == number]
        assert {run.contender.name for run in these} == {"alone", "overlapped", "device"}
        assert len({tuple(request.image for request in run.requests) for run in these}) == 1
    write_log(tmp_path / "log.jsonl.gz", runs)
    assert read_runs(tmp_path / "log.jsonl.gz") == runs
    rows = {row.contender.name: row for row in measured(runs, CELL)}
    for row in rows.values():
        assert (row.n, row.failed) == (20, 0) and 0 < row.efficiency <= 1.0
    for run in runs:
        ordered = sorted(run.requests, key=lambda request: request.start_s)
        if run.contender.name == "alone":
            # One at a time: none begins before the one before it has ended.
            assert all(b.start_s >= a.end_s for a, b in zip(ordered, ordered[1:], strict=False))
        if run.contender.name == "device":
            begins = np.array([request.start_s for request in run.requests])
            assert np.diff(begins) == pytest.approx(0.02, abs=1e-9)
            assert all(request.latency_s == request.end_s - request.start_s for request in run.requests)
    wire = sum(request.wire_bytes for run in runs if run.contender.name == "alone" for request in run.requests)
    assert rows["alone"].busy_s["uplink"] == pytest.approx(8 * wire / 2e6)
    assert setting.estimate(SPLIT32).latency_s > 0.004
    these = [run for run in runs if run.contender.name == "overlapped"]
    timings = [run.timing for run in these]
    assert [len(timing.requests) for timing in timings] == [6, 6, 4]
    assert all(run.timing.busy_s > 0 for run in runs)
    latest = setting.latest(SPLIT32, timings, CELL)
    assert latest.candidate(DEVICE) == setting.candidate(DEVICE)
    device_s = sum(timing.busy_s for timing in timings) / 16
    assert price(latest.courses(SPLIT32)[0].work, latest.conditions).busy_s["device"] == pytest.approx(device_s)
    tails_s = [request.tail_s for timing in timings for request in timing.requests]
    assert latest.candidate(SPLIT32).evidence.tail_s == pytest.approx(float(np.median(tails_s)))
    assert setting.latest(SPLIT32, [Timing()], CELL) == setting
    spread = latest.spread(SPLIT32, timings)
    assert {name: len(factors) for name, factors in spread.items()} == {"device": 16, "uplink": 16, "edge": 16}
    assert np.mean(spread["device"]) == pytest.approx(1.0) and np.mean(spread["uplink"]) == pytest.approx(1.0)
    assert set(latest.spread(DEVICE, [run.timing for run in runs if run.contender.name == "device"])) == {"device"}
    assert latest.spread(SPLIT32, [Timing()]) == {}


def test_what_is_no_stream_is_refused(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="window of 1 or more"):
        Contender(name="x", plan=0, window=0)
    with pytest.raises(PlanError, match="at least one contender"):
        run_streams(bundle, pictures(12), CELL, lambda _: [], requests=4, effort=EFFORT)
    with pytest.raises(PlanError, match="plan 99 is not on the menu"):
        run_streams(bundle, pictures(12), CELL, lambda _: [Contender(name="x", plan=99)], requests=4, effort=EFFORT)
    (tmp_path / "no.jsonl.gz").write_bytes(b"hello")
    with pytest.raises(DataError, match="not a benchmark's log"):
        read_runs(tmp_path / "no.jsonl.gz")
