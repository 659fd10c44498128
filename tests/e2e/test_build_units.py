"""A build with trained units: they are candidates like any other, and cross the link as training saw it."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from coinfer.build.bottlenecks import UnitTrainer
from coinfer.build.evaluate import Deployed
from coinfer.build.job import Job
from coinfer.build.make import assemble, build
from coinfer.build.sections import BottleneckJob, BuildJob, DataJob, ModelJob
from coinfer.build.teachers import Teachers
from coinfer.bundle import Bundle, load_bundle
from coinfer.compress.unit_training import rates_of
from coinfer.data import load_source
from coinfer.errors import CutError, JobError
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model
from coinfer.plan import Preprocess
from tiny_nets import OWN_DIGITS

UNITS = BottleneckJob(
    cuts=("/relu#1",), widths=(8,), strides=(2,), bits=5, refine=1, prices=(0.001, 0.05),
    epochs=(30, 30, 0), mirror=False, mixes=0,
)  # fmt: skip


def job(bottleneck: BottleneckJob, *, rounds: tuple[int, ...] = (50, 200)) -> Job:
    return Job(
        model=ModelJob(source="own_units:factory", mean=(0.0,), std=(1.0,)),
        data=DataJob(source="digits"),
        build=BuildJob(rounds=rounds, report_images=200, calibration_images=64),
        bottleneck=bottleneck,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("units")
    (folder / "own_units.py").write_text(OWN_DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return build(job(UNITS), folder / "bundle")


def units_of(bundle: Bundle) -> list:
    return [c for c in bundle.candidates() if "c8s2b5v2r1" in c.plan.variant]


def test_each_rate_of_a_unit_is_a_candidate_in_both_precisions(built: Bundle) -> None:
    units = units_of(built)
    assert {(c.plan.precision, c.plan.codec.rate) for c in units} == {(p, r) for p in ("fp32", "int8") for r in (0, 1)}
    assert {c.plan.cut for c in units} == {"/relu#1"}
    assert all(c.plan.kind == "split" and c.plan.crossing[0].shape == (8, 2, 2) for c in units)
    dearer = {c.plan.codec.rate: c.evidence.payload_bytes for c in units if c.plan.precision == "fp32"}
    assert dearer[1] <= dearer[0]
    alive = [c for c in units if c.dropped is None]
    assert alive and all(c.evidence.loss_points < 10 for c in alive)


def test_a_unit_crosses_the_link_as_it_was_weighed(built: Bundle, tmp_path: Path) -> None:
    alive = [c for c in units_of(built) if c.dropped is None]
    other = assemble(built.folder.with_name("bundle.work"), [c.plan.number for c in alive], tmp_path / "units")
    images = load_source("digits").drawn("validation", 200)
    for candidate in alive:
        classes, num_bytes, _ = Deployed(
            other.folder, other.plan(candidate.plan.number), other.manifest.outputs
        ).classify(images.pixels)
        assert 100 * np.mean(classes == images.labels) == pytest.approx(candidate.evidence.accuracy, abs=0.51)
        assert np.mean(num_bytes) == pytest.approx(candidate.evidence.payload_bytes, abs=1.0)


def test_a_second_build_finds_its_units(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    unit, done = sorted((folder / "bundle.work" / "units").iterdir(), key=lambda file: file.suffix, reverse=True)
    assert (unit.suffix, done.suffix) == (".safetensors", ".json")
    made = unit.stat().st_mtime_ns
    stages: list[str] = []
    build(job(UNITS), folder / "bundle", progress=lambda stage, *_: stages.append(stage))
    assert unit.stat().st_mtime_ns == made and not any("alone" in stage for stage in stages)
    unit.unlink()
    build(job(UNITS), folder / "bundle", progress=lambda stage, *_: stages.append(stage))
    assert unit.is_file() and any("alone" in stage for stage in stages)
    # The same unit from its file, in a job that trains nothing.
    given = BottleneckJob(units=(str(unit),))
    again = build(job(given), folder / "given", work=folder / "bundle.work")
    assert {c.plan.label for c in units_of(again)} == {c.plan.label for c in units_of(load_bundle(built.folder))}


@pytest.mark.parametrize(("loss", "least", "most"), [(2.0, 2, 7), (100.0, 1, 1)])
def test_the_fewest_bits_are_searched_by_halving(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loss: float, least: int, most: int
) -> None:
    monkeypatch.chdir(built.folder.parent)
    module = build_model("own_units:factory").module
    graph = capture(module, torch.zeros(2, 1, 8, 8))
    preprocess, source = Preprocess(mean=(0.0,), std=(1.0,)), load_source("digits")
    asked = msgspec.structs.replace(
        UNITS, bits="search", bits_loss=loss, prices=(0.0,), epochs=(20, 0, 0), strides=(1,), widths=(4,)
    )
    stages: list[str] = []

    def note(stage: str, *rest: object) -> None:
        stages.append(stage)

    teachers = Teachers(module, graph, source, preprocess, source.drawn("validation", 1000), progress=note)
    grid = UnitTrainer(job(asked), graph, "ab" * 32, teachers, tmp_path, progress=note)
    for task in grid.tasks():
        task.run()
    (unit,) = grid.units
    assert (grid.num_cells, grid.num_begun, grid.num_finished) == (8, 4, 1)
    # With any loss allowed, halving goes all the way down; else it stops where the accuracy breaks.
    assert least <= unit.divided.unit.spec.bits <= most
    tried = {stage.split()[2].rstrip(":") for stage in stages if stage.startswith("unit ")}
    assert len(tried) == 4 and {"c4s1b8r1", "c4s1b4r1"} <= tried
    if loss < 100:
        assert rates_of(unit.divided, source.drawn("validation", 1000), preprocess)[0].accuracy > 40


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cuts": ("layer9#0",)}, CutError, "no cut"),
        ({"cuts": ("layer9*",)}, JobError, "fits none"),
        ({"cuts": ("*",), "widths": (999,)}, JobError, "fits none of the .* where widths and strides fit"),
        ({"widths": (999,)}, Exception, "at most"),
        ({"strides": (3,)}, CutError, "does not divide 4 x 4"),
    ],
)
def test_units_that_do_not_fit_are_refused_before_anything_is_trained(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, change: dict, error: type[Exception], words: str
) -> None:
    monkeypatch.chdir(built.folder.parent)
    stages: list[str] = []
    wanted = job(msgspec.structs.replace(UNITS, **change))
    with pytest.raises(error, match=words):
        build(
            wanted, built.folder.with_name("none"), work=built.folder.with_name("bundle.work"),
            progress=lambda stage, *_: stages.append(stage),
        )  # fmt: skip
    assert not built.folder.with_name("none").exists()
    assert not any("unit" in stage or "answers" in stage for stage in stages)
