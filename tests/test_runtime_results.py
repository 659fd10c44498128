"""The runtime's page of results says what the raw logs say."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from bench import runtime_results
from bench.figures import RAW
from bench.tables import DOCS


def test_the_runtimes_rows_are_those_of_the_raw_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = json.loads((DOCS / "runtime.json").read_text())
    monkeypatch.setattr(runtime_results, "DOCS", tmp_path)
    runtime_results.main()
    found = json.loads((tmp_path / "runtime.json").read_text())
    assert found["rows"] == committed["rows"] and found["machine"] == committed["machine"]
    tables = [line for line in (tmp_path / "runtime.md").read_text().splitlines() if line.startswith("|")]
    assert tables == [line for line in (DOCS / "runtime.md").read_text().splitlines() if line.startswith("|")]


# What each bench of the runtime leaves, with every name that the page reads.
CHAOS = {
    "chaos_requests": 4, "chaos_lost": 0, "chaos_duplicated": 0, "chaos_wrong": 0, "computed_twice": 0,
    "computed_at_edge": 3, "local_share": 0.25, "fallback_share": 0.2, "faults": 3,
    "notice_s": {"median": 0.1, "p95": 0.2, "max": 0.2, "n": 2},
    "return_s": {"median": None, "p95": None, "max": None, "n": 0},
    "by_fault": {
        "all": {
            "reset": {
                "struck": 2, "noticed": 2, "notice_s": {"median": 0.1, "p95": 0.2, "max": 0.2},
                "return_s": {"median": None, "p95": None, "max": None},
            }
        }
    },
    "by_setting": {"plain": {"notice_bound_s": 0.3}},
}  # fmt: skip
ONE = {
    "rss_growth_pct": 0.5, "rss_bytes": [1, 2], "fds": [9, 9], "most_fds": 10, "threads": [5, 5], "most_threads": 6,
    "tasks": [4, 4], "most_tasks": 5,
}
SOAK = {
    "soak_requests": 10, "soak_rss_growth_pct": 0.5, "reconnects": 3, "seconds": 1.0,
    "processes": {"device": ONE, "edge": ONE},
}  # fmt: skip
LOAD = {
    "load_devices": 2, "load_efficiency": 0.9, "load_fairness": 1.1, "load_bound_s": 2.0, "load_p95_s": {"3x": 1.0},
    "max_batch": 4, "steps": [{"step": "3x", "offered_hz": 9.0, "served_hz": 3.0, "refused_share": 0.6}],
}  # fmt: skip
TLS = {
    "tls_overhead_ms": 0.2, "pairs": 7,
    "more_bytes": {
        "request": {"up_wire_bytes": 22, "down_wire_bytes": 22},
        "connection_and_first_request": {"up_wire_bytes": 700, "down_wire_bytes": 1400},
    },
}  # fmt: skip


def test_whatever_the_benches_leave_comes_into_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = tmp_path / "runtime"
    raw.mkdir()
    told = {"date": "2000-01-01T00:00:00+00:00", "machine": "made up", "commit": "c", "command": "x"}
    for name, found in (("chaos", CHAOS), ("soak", SOAK), ("load", LOAD), ("tls", TLS)):
        (raw / f"{name}.json").write_text(json.dumps({**told, **found}))
    for name in ("fuzz.json", "fuzz_http.json"):
        shutil.copy(RAW / name, raw / name)
    monkeypatch.setattr(runtime_results, "RAW", raw)
    monkeypatch.setattr(runtime_results, "DOCS", tmp_path)
    runtime_results.main()
    rows = {row["name"]: row for row in json.loads((tmp_path / "runtime.json").read_text())["rows"]}
    asked = (
        *("chaos_requests", "chaos_lost", "chaos_duplicated", "chaos_wrong", "notice_s", "fuzz_inputs", "fuzz_crashes"),
        *("soak_requests", "soak_rss_growth_pct", "load_devices", "load_efficiency", "load_fairness"),
        "tls_overhead_ms",
    )
    assert set(asked) <= set(rows)
    assert rows["notice_s"]["n"] == 2 and "return_s" not in rows and rows["tls_request_bytes"]["value"] == 44
    page = (tmp_path / "runtime.md").read_text()
    assert "| reset | 2 | 2 | 0.10 | 0.20 |" in page and "2 devices at one edge" in page
