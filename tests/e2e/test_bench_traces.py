"""The bench of recorded links, for seconds: its device's process, a real edge, a shaped link, and its figures."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from bench import traces

from coinfer.lab.yardstick import LoopTimes
from coinfer.profile import Trace
from coinfer.search.line import Line
from tiny_bundle import DEVICE, MENU, UPLOAD, make_tiny_bundle, pictures


@pytest.fixture
def live(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> traces.Live:
    bundle = make_tiny_bundle(tmp_path / "tiny", has_evidence=True)
    made = traces.Live.__new__(traces.Live)
    made.held, made.scratch, made.device_core, made.edge_core = bundle, tmp_path, None, None
    made.loops = LoopTimes(fp32_s=1e-5, int8_s=1e-5)
    made.pixels, made.labels = pictures(40), np.zeros(40, np.int64)
    np.save(tmp_path / "x.npy", made.pixels)
    monkeypatch.setattr(traces, "SLOWDOWN", 1.0)
    monkeypatch.setattr(traces, "DURATION_S", 2.0)
    monkeypatch.setattr(traces, "PERIOD_S", 0.05)
    return made


def test_a_trace_is_replayed_and_every_plan_is_timed(live: traces.Live) -> None:
    lines = live.calibrate()
    assert set(lines) == {plan.number for plan in MENU}
    for plan in MENU:
        line = lines[plan.number]
        crosses = plan.kind != "device"
        assert (line.share, line.up_bits > 0, line.edge_s > 0) == (float(crosses), crosses, crosses)
    trace = Trace(name="t", start_s=(0.0, 1.0), rate_bps=(2e7, 1e5), duration_s=2.0)
    for plan in (None, UPLOAD):
        head, rows = live.run(trace, plan)
        assert [row["request"] for row in rows] == list(range(40))
        assert all(row["end_s"] >= row["start_s"] >= -0.01 for row in rows)
        assert {row["answered"] for row in rows} <= {"edge", "device", "fallback"}
        assert head["decisions"] and {row["plan"] for row in rows} <= {p.number for p in MENU}
        run = traces.summed(rows)
        assert sum(run.plans.values()) == sum(run.answered.values()) == 40 and run.mean_s > 0
        msgspec.json.encode(head)
    ended = traces.simulated(live.held, lines, trace, DEVICE)[1]
    assert traces.summed(ended).plans == {DEVICE: 40}


def test_a_pause_is_no_property_of_a_plan() -> None:
    line = Line(device_s=0.01, up_bits=8.0, down_bits=8.0, edge_s=0.001, share=1.0, exchange_s=0.0)
    own_s = [0.02, 0.03, 0.02, 0.5, 0.03, 0.025]
    rows = [
        {"request": number, "plan": 1, "stages_s": {"head": seconds, "tail": 0.002}}
        for number, seconds in enumerate(own_s)
    ]
    own = traces.own_times({1: line, 2: line}, rows)
    assert own.pauses_s == pytest.approx([0.0, 0.0, 0.0, 0.5 - 0.0275, 0.0, 0.0])
    assert own.lines[1] == pytest.approx(line._replace(device_s=0.025, edge_s=0.002))
    # A plan that was not taken is as much slower.
    assert own.lines[2] == pytest.approx(line._replace(device_s=0.025))
