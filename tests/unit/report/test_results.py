from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest

from coinfer.errors import DataError
from coinfer.files import write_atomically
from coinfer.report import Results, Row, read_raw, read_results, results_markdown, write_raw, write_results

ROW = Row(name="regret_max", value=1.02, unit="ratio", how="measured", n=30, raw="main.jsonl.gz", spread=(1.0, 1.04))
SPEEDUP = Row(name="speedup_best_baseline@resnet56/30/1M", value=2.5, unit="x", how="estimated", n=1, against="upload")
RESULTS = Results(commit="abc1234", date="2025-01-02", machine="2 cores", command="make bench", rows=(ROW, SPEEDUP))


def test_results_survive_the_file(tmp_path: Path):
    path = tmp_path / "new" / "main.json"
    write_results(path, RESULTS)
    assert read_results(path) == RESULTS


def test_the_file_has_the_agreed_keys_in_the_agreed_order(tmp_path: Path):
    write_results(tmp_path / "main.json", RESULTS)
    written = json.loads((tmp_path / "main.json").read_text())
    assert list(written) == ["commit", "date", "machine", "command", "rows"]
    for row in written["rows"]:
        assert list(row) == ["name", "value", "unit", "against", "how", "n", "spread", "raw"]
    assert written["rows"][0]["spread"] == [1.0, 1.04]
    assert written["rows"][1]["against"] == "upload"


def test_equal_results_are_equal_bytes(tmp_path: Path):
    for name in ("a", "b"):
        write_results(tmp_path / f"{name}.json", RESULTS)
        write_raw(tmp_path / f"{name}.jsonl.gz", [{"request": 1, "latency_s": 0.5}])
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert (tmp_path / "a.jsonl.gz").read_bytes() == (tmp_path / "b.jsonl.gz").read_bytes()


def test_a_raw_log_says_neither_when_nor_by_what_name_it_was_packed(tmp_path: Path):
    write_raw(tmp_path / "a.jsonl.gz", [{"x": 1}])
    header = (tmp_path / "a.jsonl.gz").read_bytes()[:10]
    assert header[3] == 0 and header[4:8] == bytes(4)


def test_a_raw_log_survives(tmp_path: Path):
    lines = [{"request": k, "latency_s": k / 7, "plan": "split layer2#0"} for k in range(50)]
    write_raw(tmp_path / "a.jsonl.gz", [*lines, ROW])
    assert read_raw(tmp_path / "a.jsonl.gz")[:50] == lines
    assert read_raw(tmp_path / "a.jsonl.gz")[50]["name"] == "regret_max"
    assert gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).count(b"\n") == 51


@pytest.mark.parametrize("content", [b"no gzip", gzip.compress(b"no json\n"), gzip.compress(b'{"a": 1}\n' * 99)[:-9]])
def test_what_is_no_raw_log_is_refused_by_name(tmp_path: Path, content: bytes):
    (tmp_path / "odd.gz").write_bytes(content)
    with pytest.raises(DataError, match="odd.gz is not a raw log"):
        read_raw(tmp_path / "odd.gz")


def test_missing_or_foreign_files_are_refused(tmp_path: Path):
    with pytest.raises(DataError, match="no results file"):
        read_results(tmp_path / "none.json")
    with pytest.raises(DataError, match="no raw log"):
        read_raw(tmp_path / "none.gz")
    (tmp_path / "odd.json").write_text('{"rows": 3}')
    with pytest.raises(DataError, match="odd.json is not a results file"):
        read_results(tmp_path / "odd.json")


@pytest.mark.parametrize("fields", [{"value": math.nan}, {"value": math.inf}, {"spread": (1.0, math.nan)}, {"n": 0}])
def test_a_row_is_of_finite_figures(fields):
    with pytest.raises(DataError, match='row "x"'):
        Row(**{"name": "x", "value": 1.0, "unit": "s", "how": "measured", "n": 1, **fields})


def test_two_rows_of_one_name_are_refused(tmp_path: Path):
    doubled = Results(commit="c", date="d", machine="m", command="c", rows=(ROW, ROW))
    with pytest.raises(DataError, match='got "regret_max" 2 times'):
        write_results(tmp_path / "main.json", doubled)
    assert list(tmp_path.iterdir()) == []


def test_markdown_has_every_row_and_its_source():
    text = results_markdown(RESULTS)
    assert text.startswith("Commit abc1234, 2025-01-02, 2 cores. Made by `make bench`.")
    assert "| regret_max | 1.02 | ratio | 1 to 1.04 |  | measured | 30 | main.jsonl.gz |" in text
    assert "| speedup_best_baseline@resnet56/30/1M | 2.5 | x |  | upload | estimated | 1 |  |" in text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path):
    path = tmp_path / "kept.txt"
    write_atomically(path, b"old")
    with pytest.raises(TypeError):
        write_atomically(path, "text instead of bytes")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
