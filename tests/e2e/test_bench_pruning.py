"""The bench of pruning for seconds: a small network of its own, built, measured cut by cut, made into rows."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import numpy as np
import pytest
import torch

from coinfer.build.job import Job
from coinfer.build.make import build
from coinfer.build.sections import BuildJob, DataJob, GoalJob, ModelJob, PruneJob
from coinfer.compress.pruned_file import load_pruned
from coinfer.compress.train import save_tensors
from coinfer.data import Images
from coinfer.model.zoo import build_model
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
        keep=(0.6,), rounds=1, epochs=0, final_epochs=8, cuts=("/relu*",), counts=3, cut_epochs=3,
        mirror=False, lr=0.01, batch_size=32, labels=0.8,
    ),
)  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bench")


@pytest.fixture(scope="module")
def lines(folder: Path) -> list[dict[str, Any]]:
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
    assert {line["cut"] for line in series} == {"/relu#0", "/relu#1"} and len(series) >= 3
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


def test_a_cut_without_a_series_has_what_step_1_left(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    monkeypatch.setattr(results, "read_raw", lambda path: [x for x in lines if x["step"] != "step 2"])
    monkeypatch.setattr(results, "job_of", lambda name: JOB)
    log = results.Log("tiny")
    found, reported = log.chosen("/relu#0")
    assert (found["step"], found["network"]) == ("step 1", reported["network"])
    (row,) = [row for row in results.transmission_rows(log, {}) if row.name == "transmission_x@/relu#0"]
    assert row.against.endswith("of own_units_factory.k0.6 itself")


def test_slimming_is_measured_against_the_wide_network_where_that_was_trained(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    bench, results = (importlib.import_module(f"bench.{name}") for name in ("pruning", "pruning_results"))
    monkeypatch.setattr(results, "job_of", lambda name: JOB)
    monkeypatch.setattr(results, "FULL_WIDTH", {"macs": 4e6, "parameters": 50_000})
    # Of four images the wide one gets three, the other two, one of them a different one.
    wide, right = np.array([True, True, True, False]), np.array([True, False, False, True])
    known = [x | bench._against_wide(wide, right) if x["cut"] is None else x for x in lines]
    for given, against in ((known, "the full-width network (75.00 %)"), (lines, "the full-width one was not trained")):
        monkeypatch.setattr(results, "read_raw", lambda path, given=given: given)
        log = results.Log("tiny")
        rows = {row.name: row for row in results.slim_rows(log)}
        assert rows["slim_params_x"].value == 50_000 / log.step1["parameters"]
        assert rows["slim_flops_x"].value == 4e6 / results.macs_of(log.step1)
        assert against in rows["slim_loss"].against
        if given is known:
            assert rows["slim_loss"].value == pytest.approx(25.0)
            assert rows["slim_loss_half"].value == log.step1["loss_points"]
        else:
            assert "slim_loss_half" not in rows and rows["slim_loss"].value == log.step1["loss_points"]


def test_the_best_split_is_set_beside_both_rivals(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    device = SimpleNamespace(chosen=SimpleNamespace(kind="device"), ratios={"split": 1.25, "upload": 2.5})
    split = SimpleNamespace(chosen=SimpleNamespace(kind="split"), ratios={"device": 3.0, "upload": 1.5})
    rows = results.best_split_rows(SimpleNamespace(cells=[device, split]))
    assert {row.name: (row.value, row.spread) for row in rows} == {
        "best_split_over_device_only": (3.0, (0.8, 3.0)),
        "best_split_over_upload": (2.0, (1.5, 2.0)),
    }


def plan(label: str, typical_s: float, *roles: str) -> SimpleNamespace:
    kind = label.partition(" ")[0]
    n = SimpleNamespace(n=30)
    return SimpleNamespace(cell="0", label=label, kind=kind, typical_s=typical_s, roles=roles, latency_s=n, plan=7)


def test_over_the_shaped_link_the_unpruned_networks_split_is_what_is_bettered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    chosen = plan("device net.k0.2", 0.002, "chosen")
    rest = (
        plan("device net.k0.2 int8", 0.003), plan("upload net webp-q85", 0.02), plan("upload net jpeg-q85", 0.01),
        plan("split net a#0 uniform8-none", 0.016, "best split of net"),
        plan("split net.k0.2 a#0 uniform8-none", 0.005),
    )  # fmt: skip
    cell = SimpleNamespace(cell="0", chosen=chosen, slowdown=5.0, rate_bps=1.1e6)
    summary = SimpleNamespace(cells=[cell], plans=[chosen, *rest])
    lines = SimpleNamespace(
        lines=lambda what: [{"plan": 7, "loss_points": 0.25, "n": 8000}], log=Path("shaped.cells.jsonl.gz")
    )
    monkeypatch.setattr(results, "SHAPED_NET", lines)
    rows = {row.name: row for row in results.shaped_rows(summary, "net")}
    assert rows["end_to_end_shaped_x"].value == pytest.approx(8.0)
    assert (rows["end_to_end_shaped_loss"].value, rows["end_to_end_shaped_loss"].n) == (0.25, 8000)
    assert results.rivals_table(summary).rows == (
        (
            "5x", "1.1 Mbit/s", "device net.k0.2 int8: 3.0 ms", "upload net webp-q85: 20.0 ms",
            "split net.k0.2 a#0 uniform8-none: 5.0 ms",
        ),
    )  # fmt: skip


def test_a_network_is_kept_in_16_bits_and_read_again(
    lines: list[dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.syspath_prepend(str(folder))
    bench = importlib.import_module("bench.pruning")
    monkeypatch.setattr(bench, "OUT", folder)
    monkeypatch.setattr(bench, "PRUNED", tmp_path)
    name = next(line["network"] for line in lines if line["step"] == "step 1")
    bench.keep("tiny", name)
    module = build_model("own_units:factory").module
    read = load_pruned(tmp_path / f"{name}.safetensors", module, (torch.zeros(1, 1, 8, 8),), network=None)
    before = load_pruned(
        folder / "tiny.work" / "pruned" / f"{name}.safetensors", module, (torch.zeros(1, 1, 8, 8),), network=None
    )
    assert read.lineage == before.lineage
    for key, value in before.module.state_dict().items():
        torch.testing.assert_close(read.module.state_dict()[key], value, rtol=1e-3, atol=1e-4)


def test_a_network_is_trained_phase_after_phase_and_kept_where_it_is_small_enough(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    bench = importlib.import_module("bench.pruning")
    trained: list[tuple[Any, ...]] = []

    def train(name: str, out: Path, *, start: Path | None, teacher: tuple[str, Path], **rest: Any) -> float:
        trained.append((name, start and start.name, teacher[0], rest["schedule"].epochs))
        save_tensors(build_model(name).module.state_dict(), out)
        return 0.5

    pictures = Images(np.zeros((4, 32, 32, 3), np.uint8), np.zeros(4, np.int64))
    monkeypatch.setattr(bench, "train_on_cifar10", train)
    monkeypatch.setattr(bench, "load_source", lambda name: SimpleNamespace(images=lambda part: pictures))
    monkeypatch.setattr(bench, "WEIGHTS", tmp_path / "out")
    monkeypatch.setattr(bench, "KEPT", tmp_path / "zoo")
    for _ in range(2):
        bench.train("resnet18-half")
        bench.train("resnet18")
    assert trained == [
        ("resnet18-half", "cifar10_resnet18_half_warm_fp16.safetensors", "resnet56", 16),
        ("resnet18-half", "resnet18-half.trained1.safetensors", "resnet18", 32),
        ("resnet18", None, "resnet56", 40),
    ]
    assert [path.name for path in (tmp_path / "zoo").iterdir()] == ["resnet18-half.safetensors"]
    assert (tmp_path / "out" / "packed" / "resnet18.safetensors").is_file()
    build_model("resnet18", weights=tmp_path / "out" / "resnet18.safetensors")


def test_series_of_another_job_count_where_they_are_narrower(
    lines: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    results = importlib.import_module("bench.pruning_results")
    is_best = ("/relu#1", "step 2", "test")
    best = next(line["network"] for line in lines if (line["cut"], line["step"], line["part"]) == is_best)
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
