"""The harness end to end on a tiny bundle: two processes, a shaped link, a log from which the rows come again."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle, load_bundle, write_manifest
from coinfer.errors import LinkError, PlanError
from coinfer.lab.bench import Cell, Effort, measure_overhead, run_cells
from coinfer.lab.choose import fixed_plans
from coinfer.lab.record import CellLine, RequestLine, read_log
from coinfer.lab.spawn import WorkerProcess
from coinfer.lab.summary import summarise
from coinfer.lab.worker import Command
from coinfer.plan import Candidate, Evidence
from coinfer.profile import Link, Slowdown
from tiny_bundle import DEVICE, MENU, SPLIT16, SPLIT32, UPLOAD, make_tiny_bundle, pictures

PIXELS = pictures(12)
LABELS = np.zeros(12, np.int64)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with evidence that was never measured."""
    folder = tmp_path_factory.mktemp("bench") / "tiny"
    made = make_tiny_bundle(folder)
    sizes = {"device": 0.0, "upload": 198.0, "split": 1030.0}
    known = [
        Candidate(
            plan=plan,
            evidence=Evidence(
                split="validation",
                num_images=10,
                accuracy=0.5,
                accuracy_ci=0.1,
                loss_points=0.0,
                loss_ci_points=0.0,
                payload_bytes=sizes[plan.kind],
                payload_bytes_p95=sizes[plan.kind],
                reply_bytes=20.0,
                head_s=1e-4,
                encode_s=1e-4,
                decode_s=1e-4,
                tail_s=1e-4,
            ),
        )
        for plan in MENU
    ]
    (folder / "evidence.json").write_bytes(msgspec.json.encode(known))
    write_manifest(folder, made.manifest)
    return load_bundle(folder)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """No test leaves a child or a thread behind."""
    threads = set(threading.enumerate())
    yield
    assert _children() == []
    assert set(threading.enumerate()) <= threads


def _children() -> list[int]:
    tasks = Path("/proc/self/task")
    if not tasks.exists():
        return []
    found = [int(pid) for task in tasks.iterdir() for pid in (task / "children").read_text().split()]
    return [pid for pid in found if "coinfer" in Path(f"/proc/{pid}/cmdline").read_bytes().decode()]


def test_a_cell_is_measured_and_its_log_gives_the_same_rows(bundle: Bundle, tmp_path: Path) -> None:
    log = tmp_path / "raw" / "cells.jsonl.gz"
    cells = [Cell(link=Link(rate_bps=5e5, delay_s=0.001), slowdown=Slowdown(fp32=2, int8=4))]
    effort = Effort(requests=3, warmup=1, calibration=2, stream=6)
    pick = fixed_plans(SPLIT32, UPLOAD, DEVICE)
    told: list[tuple[str, int, int]] = []
    summary = run_cells(
        bundle, PIXELS, LABELS, cells, log, pick=pick, effort=effort, tell=lambda *args: told.append(args[:3])
    )
    lines = read_log(log)
    assert summarise(lines) == summary
    assert told[-1] == ("cells", 1, 1)
    (row,) = summary.cells
    assert (row.chosen.plan, row.rate_bps, row.slowdown) == (SPLIT32, 5e5, 2)
    assert {plan.plan: plan.latency_s.n for plan in summary.plans} == {SPLIT32: 3, UPLOAD: 3, DEVICE: 3}
    assert row.was_measured_again and row.regret >= 1
    assert summary.header.ready.has_torch is False and summary.header.bundle == bundle.digest
    requests = [line for line in lines if isinstance(line, RequestLine)]
    assert {line.request.answered for line in requests if line.request.plan == SPLIT32} == {"edge"}
    # A round is the same picture through every plan.
    main = [line for line in requests if line.phase == "main"]
    assert len({(line.round, line.request.image) for line in main}) == 3 and len(main) == 9
    # No request is faster than the link and the delays, and its bytes are those that the protocol counts.
    split = next(plan for plan in summary.plans if plan.plan == SPLIT32)
    assert split.wire_bytes == split.payload_bytes + 8 + 4 + 4 + 40
    for line in main:
        floor_s = 0 if line.request.plan == DEVICE else line.request.wire_bytes * 8 / 5e5 + 0.002
        assert line.request.latency_s >= floor_s
    (stream,) = summary.streams
    assert (stream.n, stream.failed) == (6, 0)


def test_cells_of_one_device_are_measured_together_and_keep_their_names(bundle: Bundle, tmp_path: Path) -> None:
    cells = [
        Cell(link=Link(rate_bps=1e7), slowdown=Slowdown(fp32=3, int8=3)),
        Cell(link=Link(rate_bps=5e7)),
        Cell(link=Link(rate_bps=1e8), slowdown=Slowdown(fp32=3, int8=3)),
    ]
    effort = Effort(requests=1, warmup=0, calibration=1, finalists=False)
    log = tmp_path / "x.gz"
    summary = run_cells(bundle, PIXELS, None, cells, log, pick=fixed_plans(SPLIT16), effort=effort)
    assert {cell.cell: (cell.rate_bps, cell.slowdown) for cell in summary.cells} == {
        "0": (1e7, 3),
        "1": (5e7, 1),
        "2": (1e8, 3),
    }
    assert [line.link.rate_bps for line in read_log(log) if isinstance(line, CellLine)] == [5e7, 1e7, 1e8]
    assert all(plan.accuracy_seen is None for plan in summary.plans)


def test_the_overhead_is_measured_on_loopback(bundle: Bundle, tmp_path: Path) -> None:
    measured = measure_overhead(bundle, PIXELS, tmp_path / "x.gz", effort=Effort(requests=2))
    (row,) = summarise(read_log(tmp_path / "x.gz")).overheads
    assert row == measured
    assert 0 < row.seconds.p50 < 1 and row.is_direct and row.seconds.n == 2 * 5


def test_nonsense_is_refused_before_anything_starts(bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="at least one cell"):
        run_cells(bundle, PIXELS, None, [], tmp_path / "x.gz")
    with pytest.raises(PlanError, match="finite"):
        run_cells(bundle, PIXELS, None, [Cell(link=Link(rate_bps=float("inf")))], tmp_path / "x.gz")


def test_a_worker_that_dies_is_an_error_that_quotes_it(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", PIXELS)
    with pytest.raises(LinkError, match=r"ended with code 1: .*nowhere"):
        WorkerProcess(tmp_path / "nowhere", tmp_path / "pixels.npy")
    with WorkerProcess(bundle.folder, tmp_path / "pixels.npy") as worker:
        assert worker.run(Command(plan=DEVICE, images=(1,)))[0].answered == "device"
        os.kill(worker.pid, 9)
        with pytest.raises(LinkError, match="ended with code -9"):
            worker.run(Command(plan=DEVICE, images=(1,)))


ORPHANS = """
import sys
from pathlib import Path
from coinfer.lab.spawn import WorkerProcess
from coinfer.runtime.spawn import EdgeProcess
edge = EdgeProcess(Path(sys.argv[1]))
worker = WorkerProcess(Path(sys.argv[1]), Path(sys.argv[2]), edge=edge.url)
print(edge.pid, worker.pid, flush=True)
sys.stdin.read()
"""


def test_no_process_outlives_a_benchmark_that_is_killed(bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", PIXELS)
    command = [sys.executable, "-c", ORPHANS, str(bundle.folder), str(tmp_path / "pixels.npy")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bench:
        assert bench.stdout is not None
        pids = [int(word) for word in bench.stdout.readline().split()]
        assert len(pids) == 2
        bench.kill()
    limit_s = time.monotonic() + 30
    while (left := [pid for pid in pids if _runs(pid)]) and time.monotonic() < limit_s:
        os.sched_yield()
    assert left == []


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie (nobody may be there to reap it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
