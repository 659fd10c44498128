"""Workshops of one small network of several kinds: grey pictures from a folder, a batch of one, more than memory."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coinfer.build import workshop as module
from coinfer.build.job import Job
from coinfer.build.make import build
from coinfer.build.sections import BuildJob, DataJob, ModelJob
from coinfer.build.workshop import Workshop, prepare
from coinfer.engine.onnx import Session

NETWORK = '''
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, flatten):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, padding=1)
        self.conv2 = nn.Conv2d(6, 8, 3, padding=1, stride=2)
        self.head = nn.Linear(8 * 36, 3)
        self.flatten = flatten

    def forward(self, x):
        return self.head(self.flatten(torch.relu(self.conv2(torch.relu(self.conv1(x))))))


def factory():
    torch.manual_seed(0)
    return Net(lambda x: x.view(x.size(0), -1)).eval()


def of_one():
    torch.manual_seed(0)
    return Net(lambda x: x.view(1, -1)).eval()

'''


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with grey pictures of three classes and the networks above, which is where we are."""
    chance = np.random.default_rng(0)
    for name in "abc":
        (tmp_path / "grey" / name).mkdir(parents=True)
        for number in range(40):
            pixels = chance.integers(0, 256, (12, 12), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "grey" / name / f"{number}.png")
    (tmp_path / f"nets_{tmp_path.name}.py").write_text(NETWORK)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def job(here: Path, factory: str = "factory") -> Job:
    return Job(
        model=ModelJob(source=f"nets_{here.name}:{factory}", mean=(0.5,), std=(0.25,)),
        data=DataJob(source=f"folder:{here / 'grey'}", size=(12, 12)),
        build=BuildJob(rounds=(10, 20), report_images=10, calibration_images=16, precisions=("fp32",)),
    )


def crossing(workshop: Workshop, pixels: np.ndarray) -> dict[str, list[np.ndarray]]:
    name = workshop.main
    cuts = workshop.cuts(name, "fp32")
    return {cut.name: list(values) for cut, values in workshop.features(name, "fp32", cuts, pixels)}


def test_features_that_memory_does_not_hold_are_the_same(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    workshop = prepare(job(here), here / "work")
    pixels = workshop.validation.pixels
    assert pixels.shape[1:] == (12, 12, 1)
    expected = crossing(workshop, pixels)
    before = sorted(path.name for path in workshop.folder.rglob("*"))
    monkeypatch.setattr(module, "FEATURE_BYTES", 100)
    in_files = crossing(workshop, pixels)
    assert all(isinstance(value, np.memmap) for values in in_files.values() for value in values)
    assert list(in_files) == list(expected) and len(expected) > 2
    for name, values in expected.items():
        assert all(np.array_equal(a, b) for a, b in zip(values, in_files[name], strict=True))
    assert sorted(path.name for path in workshop.folder.rglob("*")) == before


def test_a_network_that_takes_one_picture_at_a_time_is_built_like_any_other(here: Path) -> None:
    many = build(job(here), here / "many")
    one = build(job(here, "of_one"), here / "one")
    assert {plan.kind for plan in one.manifest.menu} == {plan.kind for plan in many.manifest.menu}
    accuracies = [
        next(c.reported.accuracy for c in b.candidates() if c.plan.number == b.manifest.reference_plan and c.reported)
        for b in (many, one)
    ]
    assert accuracies[0] == accuracies[1]


def test_an_export_is_used_again_only_while_it_answers_as_the_module_does(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = prepare(job(here), here / "work")
    path = first.folder / first.whole_name(first.main, "fp32")
    made, pictures = path.stat().st_mtime_ns, first.validation.pixels[:1]
    answer = Session(path).run([pictures])[0]
    prepare(job(here), here / "work")
    assert path.stat().st_mtime_ns == made
    text = (here / f"nets_{here.name}.py").read_text()
    (here / f"nets_{here.name}.py").write_text(text.replace("x: x.view(x.size(0)", "x: -x.view(x.size(0)"))
    monkeypatch.delitem(sys.modules, f"nets_{here.name}")
    prepare(job(here), here / "work")
    assert not np.allclose(Session(path).run([pictures])[0], answer)
