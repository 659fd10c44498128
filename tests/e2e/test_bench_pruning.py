"""The bench of pruning for seconds: a small network of its own, built, measured cut by cut, made into rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from coinfer.build.job import Job
from coinfer.build.make import build
from coinfer.build.sections import BuildJob, DataJob, GoalJob, ModelJob, PruneJob
from coinfer.report.results import read_raw
from tiny_nets import OWN_DIGITS

ROOT = Path(__file__).parents[2]
JOB = Job(
    model=ModelJob(source="own_units:factory", mean=(0.0,), std=(1.0,)),
    data=DataJob(source="digits"),
    goal=GoalJob(max_loss=20.0),
    build=BuildJob(
        rounds=(50, 200), report_images=100, calibration_images=64, cuts=("/relu#0", "/relu#1"), precisions=("fp32",)
    ),
    prune=PruneJob(
        keep=(0.6,), rounds=1, epochs=0, final_epochs=8, cuts=("/relu#1",), counts=3, cut_epochs=3,
        mirror=False, lr=0.01, batch_size=32, labels=0.8,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("bench")
    (folder / "own_units.py").write_text(OWN_DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        patch.chdir(folder)
        bench = importlib.import_module("bench.pruning")
        patch.setattr(bench, "job_of", lambda name: JOB)
        patch.setattr(bench, "OUT", folder)
        patch.setattr(bench, "RAW", folder / "raw")
        patch.setattr(bench, "note_commit", lambda raw, name: None)
        build(JOB, folder / "tiny")
        bench.measure_cuts("tiny")
    return read_raw(folder / "raw" / "tiny.cuts.jsonl.gz")


def test_every_step_is_measured_at_its_cuts_on_both_parts(lines: list[dict[str, Any]]) -> None:
    assert {line["cut"] for line in lines if line["step"] == "original"} == {None, "/relu#0", "/relu#1"}
    series = [line for line in lines if line["step"] == "step 2" and line["part"] == "validation"]
    assert {line["cut"] for line in series} == {"/relu#1"} and len(series) >= 2
    assert all(line["head_s"] > 0 and line["head"]["call"] == 1 for line in series)
    assert {line["part"] for line in lines if line["step"] == "step 1"} == {"validation", "test"}
    whole = {line["step"]: line for line in lines if line["cut"] is None}
    assert whole["step 1"]["parameters"] < whole["original"]["parameters"] == 16 * 10 + 32 + 32 * 145 + 512 * 10 + 10


def test_rows_follow_from_the_lines(lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    monkeypatch.setattr(results, "read_raw", lambda path: lines)
    monkeypatch.setattr(results, "job_of", lambda name: JOB)
    monkeypatch.setitem(results.TITLES, "tiny", "a tiny network")
    log = results.Log("tiny")
    rows = {row.name: row for row in (*results.step1_rows(log), *results.transmission_rows(log, {}))}
    rows |= {row.name: row for row in (*results.end_to_end_rows(log), *results.predictor_rows(log))}
    assert rows["flops_x"].value > 1 / 0.6
    assert rows["latency_x"].value > 0 and rows["end_to_end_x"].value > 0
    chosen, reported = log.chosen("/relu#1")
    (original,) = log.at("/relu#1", "original")
    assert rows["transmission_x@/relu#1"].value == original["elements"] / chosen["elements"] > 1
    assert rows["transmission_loss@/relu#1"].value == reported["loss_points"]
    assert (reported["part"], reported["network"]) == ("test", chosen["network"])
    # No segment of the series may decide both sides of its own prediction.
    assert rows["predictor_error_median"].n < len(log.segments())
    assert msgspec.json.encode(rows["flops_x"])
    assert len(results.cut_table(log, {}).rows) == 2


def test_series_of_another_job_count_where_they_are_narrower(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    best = next(line["network"] for line in lines if (line["step"], line["part"]) == ("step 2", "test"))
    narrower = [line | {"network": "mine", "base": "other", "elements": 1} for line in lines if line["network"] == best]
    known = {"tiny": lines, "narrow": narrower}
    monkeypatch.setattr(results, "read_raw", lambda path: known[path.name.partition(".")[0]])
    monkeypatch.setattr(results, "job_of", lambda name: JOB)
    monkeypatch.setattr(results, "RAW", tmp_path)
    alone = results.Log("tiny", "narrow")
    (tmp_path / "narrow.cuts.jsonl.gz").touch()
    log = results.Log("tiny", "narrow")
    (before,) = [row for row in results.transmission_rows(alone, {}) if row.name == "transmission_x@/relu#1"]
    (after,) = [row for row in results.transmission_rows(log, {}) if row.name == "transmission_x@/relu#1"]
    (original,) = log.at("/relu#1", "original")
    assert after.value == original["elements"] > before.value
    assert (before.raw, after.raw) == ("tiny.cuts.jsonl.gz", "narrow.cuts.jsonl.gz") and "of other" in after.against
    # Step 1 and the predictor's segments are the job's own.
    assert (log.step1, log.segments()) == (alone.step1, alone.segments())


def test_a_packed_network_is_the_same_wherever_it_is_unpacked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    packed = importlib.import_module("bench.packed")
    weights = torch.tensor([[[-127.0, 0.4]], [[0.0, 0.0]], [[2.54, 1.27]]])
    state = {"conv.weight": weights, "bn.weight": torch.tensor([0.3]), "bn.num_batches_tracked": torch.tensor(7)}
    kept = packed.pack(state)
    assert kept["conv.weight"].dtype == torch.int8
    assert kept["conv.weight"].tolist() == [[[-127, 0]], [[0, 0]], [[127, 64]]]
    assert kept["conv.weight.scale"].flatten().tolist() == pytest.approx([1.0, 1.0, 0.02])
    found = packed.unpack(kept)
    assert set(found) == set(state) and found["bn.num_batches_tracked"] == 7
    assert found["conv.weight"][0].tolist() == [[-127.0, 0.0]]
    assert torch.equal(found["bn.weight"], state["bn.weight"])
    again = packed.pack(found)
    assert all(torch.equal(again[name], kept[name]) for name in kept if kept[name].dtype == torch.int8)
