"""Rows from made-up lines, each figure checked by hand."""

import gzip
import math
from pathlib import Path

import msgspec
import pytest

from coinfer.errors import DataError
from coinfer.lab.record import (
    CalibrationLine,
    CellLine,
    EstimateLine,
    Header,
    Line,
    MenuPlan,
    Phase,
    RequestLine,
    read_log,
    write_log,
)
from coinfer.lab.summary import Summary, spread, summarise
from coinfer.lab.worker import Ready, Request
from coinfer.plan import Kind
from coinfer.profile import Link, Machine, Slowdown

DEVICE, UPLOAD, SPLIT, LOSSY = 1, 2, 3, 4
KINDS: dict[int, Kind] = {DEVICE: "device", UPLOAD: "upload", SPLIT: "split", LOSSY: "split"}
LINK = Link(rate_bps=1e6, delay_s=0.005)
SLOW = Slowdown(fp32=3, int8=6)


def header() -> Header:
    menu = tuple(
        MenuPlan(
            number=number,
            kind=kind,
            precision="fp32",
            label=f"plan {number}",
            loss_points=4.0 if number == LOSSY else 1.0,
            accuracy=0.9,
            num_images=8000,
            split="test",
        )
        for number, kind in KINDS.items()
    )
    return Header(
        coinfer="1",
        bundle="b",
        model="m",
        data="d",
        date="2000-01-01",
        machine=Machine(name="n", processor="p", cores=2, system="s", python="3", versions={}),
        cores=(0, 1),
        seed=0,
        max_loss_points=1.0,
        menu=menu,
        ready=Ready(import_s=0.1, rss_import_bytes=1, rss_bytes=2, has_torch=False),
        start_s=0.2,
    )


def cell(plans: tuple[int, ...] = (SPLIT, DEVICE, UPLOAD, LOSSY)) -> CellLine:
    estimates = tuple(
        EstimateLine(
            plan=plan,
            roles=("chosen",) if plan == SPLIT else ("other",),
            latency_s=0.1,
            stages_s={"head": 0.1},
            busy_s={"device": 0.01, "uplink": 0.5, "edge": 0.002, "downlink": 0.001},
        )
        for plan in plans
    )
    return CellLine(
        cell="0",
        link=LINK,
        slowdown=SLOW,
        load=1.0,
        device="emulated",
        exchange_s=0.001,
        chosen=SPLIT,
        baselines={"device": DEVICE, "upload": UPLOAD, "split": SPLIT},
        estimates=estimates,
    )


def asked(plan: int, phase: Phase, *latencies_s: float, name: str = "0") -> list[Line]:
    return [
        RequestLine(
            cell=name,
            phase=phase,
            round=k,
            label=1,
            request=Request(
                plan=plan,
                image=k,
                answered="edge",
                latency_s=latency_s,
                head_s=0.01,
                encode_s=0.002,
                finish_s=0.001,
                exchange_s=0.05,
                decode_s=0.004,
                tail_s=0.006,
                payload_bytes=100 + k,
                wire_bytes=200 + k,
                reply_wire_bytes=50,
                predicted=k % 2,
            ),
        )
        for k, latency_s in enumerate(latencies_s)
    ]


def lines() -> list[Line]:
    return [
        header(),
        cell(),
        *asked(SPLIT, "warmup", 9.0),
        *asked(SPLIT, "main", 0.10, 0.12, 0.11),
        *asked(DEVICE, "main", 0.22, 0.22, 0.22),
        *asked(UPLOAD, "main", 0.10, 0.33, 0.44),
        *asked(LOSSY, "main", 0.01, 0.01, 0.01),
    ]


def test_a_plans_row_has_its_median_spread_and_error() -> None:
    row = summarise(lines()).plans[0]
    assert (row.plan, row.kind, row.label, row.roles) == (SPLIT, "split", "plan 3", ("chosen",))
    assert (row.latency_s.p50, row.latency_s.n, row.failed) == (0.11, 3, 0)
    assert row.latency_s.p5 == pytest.approx(0.101) and row.latency_s.p95 == pytest.approx(0.119)
    assert row.estimate_error == pytest.approx(0.1)
    assert row.stages_s == {
        "head": 0.01,
        "encode": 0.003,
        "exchange": pytest.approx(0.04),
        "decode": 0.004,
        "tail": 0.006,
    }
    assert (row.payload_bytes, row.wire_bytes, row.reply_wire_bytes) == (101, 201, 50)
    assert (row.accuracy, row.num_images, row.accuracy_seen) == (0.9, 8000, pytest.approx(1 / 3))


def test_a_cells_row_compares_medians_and_leaves_out_who_loses_too_much() -> None:
    (row,) = summarise(lines()).cells
    assert row.ratios == {"device": pytest.approx(2.0), "upload": pytest.approx(3.0), "split": 1.0}
    assert row.speedup == pytest.approx(2.0)
    # The lossy plan is faster and does not count.
    assert (row.best, row.regret, row.was_measured_again) == (SPLIT, 1.0, False)
    assert (row.rate_bps, row.slowdown, row.load, row.device, row.stream) == (1e6, 3, 1.0, "emulated", None)


def test_regret_is_the_ratio_to_the_best_and_the_second_measurement_counts() -> None:
    slow = [*lines()[:3], *asked(SPLIT, "main", 0.22), *asked(DEVICE, "main", 0.20), *asked(UPLOAD, "main", 0.5)]
    slow += asked(LOSSY, "main", 0.01)
    assert (summarise(slow).cells[0].best, summarise(slow).regret_max) == (DEVICE, pytest.approx(1.1))
    again = [*slow, *asked(SPLIT, "final", 0.21, 0.21), *asked(DEVICE, "final", 0.20, 0.20)]
    row = summarise(again).cells[0]
    assert (row.best, row.regret, row.was_measured_again) == (DEVICE, pytest.approx(1.05), True)
    failed = [
        msgspec.structs.replace(line, request=msgspec.structs.replace(line.request, error="the edge is gone"))
        for line in (*asked(SPLIT, "final", 0.21), *asked(DEVICE, "final", 0.20))
        if isinstance(line, RequestLine)
    ]
    row = summarise([*slow, *failed]).cells[0]
    assert (row.best, row.regret, row.was_measured_again) == (DEVICE, pytest.approx(1.1), False)
    won = [*slow, *asked(SPLIT, "final", 0.19), *asked(DEVICE, "final", 0.20)]
    assert (summarise(won).cells[0].best, summarise(won).regret_max) == (SPLIT, 1.0)


def test_the_worst_estimate_is_the_one_furthest_off_on_either_side() -> None:
    early = cell()
    late = CellLine(
        **{name: getattr(early, name) for name in early.__struct_fields__ if name != "cell"},
        cell="1",
    )
    both = [*lines(), late]
    for plan in KINDS:
        both += asked(plan, "main", 0.05, name="1")
    assert summarise(both).estimate_error_max == pytest.approx(-0.5)


def test_a_stream_is_held_against_its_critical_resource() -> None:
    stream = asked(SPLIT, "stream", *[0.1] * 4)
    made: list[Line] = []
    for k, line in enumerate(stream):
        assert isinstance(line, RequestLine)
        fields = {name: getattr(line.request, name) for name in line.request.__struct_fields__}
        request = Request(**{**fields, "start_s": 1.0 + k * 0.01, "end_s": 1.02 + k * 0.02, "wire_bytes": 200})
        made.append(RequestLine(cell="0", phase="stream", round=k, label=1, request=request))
    summary = summarise([*lines(), *made])
    (row,) = summary.streams
    assert summary.cells[0].stream == row
    assert (row.n, row.failed, row.critical) == (4, 0, "device")
    assert row.throughput_hz == pytest.approx(4 / 0.08)
    # The uplink took 200 B at 1 Mbit/s, 1.6 ms, not the half second that was expected; the device 10 ms.
    assert row.bottleneck_hz == pytest.approx(100)
    assert row.efficiency == pytest.approx(0.5)
    broken = RequestLine(
        cell="0", phase="stream", round=9, request=Request(plan=SPLIT, image=0, answered="failed", error="gone")
    )
    (row,) = summarise([*lines(), *made, broken]).streams
    assert (row.failed, row.throughput_hz, row.efficiency) == (1, 0.0, 0.0)


def test_failed_requests_are_counted_and_never_hidden() -> None:
    failed = RequestLine(
        cell="0", phase="main", round=3, request=Request(plan=SPLIT, image=0, answered="failed", error="no")
    )
    row = summarise([*lines(), failed]).plans[0]
    assert (row.latency_s.n, row.failed) == (3, 1)
    none_left = [line for line in lines() if not (isinstance(line, RequestLine) and line.request.plan == SPLIT)]
    summary = summarise([*none_left, failed])
    assert (summary.plans[0].latency_s.p50, summary.plans[0].failed) == (math.inf, 1)
    assert summary.regret_max == math.inf


def test_overhead_is_what_lies_beyond_the_stages() -> None:
    line = CalibrationLine(cell="c", slowdown=Slowdown(), load=1.0, delay_s=0.005, is_direct=True)
    made = [line, *asked(SPLIT, "calibrate", 0.034, 0.036, name="c"), *asked(UPLOAD, "calibrate", 0.040, name="c")]
    (row,) = summarise([header(), *made, *asked(DEVICE, "calibrate", 7.0, name="c")]).overheads
    # 10 + 2 + 4 + 6 ms of stages and twice 5 ms of delay.
    assert (row.seconds.p50, row.seconds.n, row.is_direct) == (pytest.approx(0.004), 3, True)
    assert row.worst_plan_p50_s == pytest.approx(0.008)


def test_nothing_measured_is_infinite() -> None:
    assert spread([]).p50 == math.inf


def test_a_log_gives_the_same_rows_and_equal_lines_equal_bytes(tmp_path: Path) -> None:
    first, second = tmp_path / "new" / "a.gz", tmp_path / "b.gz"
    write_log(first, lines())
    write_log(second, iter(lines()))
    assert first.read_bytes() == second.read_bytes()
    summary = summarise(read_log(first))
    assert isinstance(summary, Summary) and summary == summarise(lines())
    assert [path.name for path in first.parent.iterdir()] == ["a.gz"]


def test_what_is_no_log_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    with pytest.raises(DataError, match=r"x\.gz"):
        read_log(path)
    path.write_bytes(b"not gzip")
    with pytest.raises(DataError, match="not a benchmark's log"):
        read_log(path)
    path.write_bytes(gzip.compress(b'{"line": "cell"}\n'))
    with pytest.raises(DataError, match="not a benchmark's log"):
        read_log(path)
    with pytest.raises(DataError, match="header"):
        summarise([cell()])


def test_a_plan_with_exits_is_compared_by_its_mean() -> None:
    given = header()
    menu = tuple(msgspec.structs.replace(plan, has_exits=plan.number == SPLIT) for plan in given.menu)
    summary = summarise(
        [
            msgspec.structs.replace(given, menu=menu),
            cell((SPLIT, DEVICE)),
            *asked(SPLIT, "main", 0.1, 0.1, 0.1, 0.5),
            *asked(DEVICE, "main", 0.1, 0.1, 0.1, 0.5),
        ]
    )
    split, device = summary.plans
    assert (split.typical_s, device.typical_s) == (pytest.approx(0.2), pytest.approx(0.1))
    assert summary.cells[0].regret == pytest.approx(2.0)
    assert split.estimate_error == pytest.approx(1.0)
