"""The recipe end to end on a handful of scenes; its command; top-1 by hand."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from typer import Typer
from typer.testing import CliRunner

from coinfer.compress import recipes
from coinfer.compress.train import Schedule
from coinfer.data import Images, digits
from coinfer.errors import WeightsError
from coinfer.model.zoo import build_model
from coinfer.plan import Preprocess


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(digits, "_NUM_SCENES", {"train": 128, "validation": 20, "test": 20})
    monkeypatch.setattr(recipes, "CLOSE_UPS", Schedule(lr=0.1, epochs=1))
    monkeypatch.setattr(recipes, "SCENES", Schedule(lr=0.05, epochs=1))


def command():
    app = Typer(add_completion=False)
    app.command()(recipes.main)
    return app


def test_recipe_writes_weights_that_load_and_removes_its_checkpoints(tmp_path, few):
    seen = []
    accuracy = recipes.train_scene_resnet(
        tmp_path / "w.safetensors",
        close_ups=recipes.CLOSE_UPS,
        scenes=recipes.SCENES,
        progress=lambda phase, step: seen.append((phase, step.step, step.steps)),
    )
    assert seen == [("close-ups", 1, 1), ("scenes", 1, 1)]
    assert 0 <= accuracy <= 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["w.safetensors"]
    trained = build_model("scene-resnet", weights=tmp_path / "w.safetensors").module.state_dict()
    torch.manual_seed(0)
    fresh = build_model("scene-resnet").module.state_dict()
    assert not torch.equal(trained["conv1.weight"], fresh["conv1.weight"])
    assert int(trained["bn1.num_batches_tracked"]) == 2


def test_recipe_goes_on_from_its_checkpoints(tmp_path, few):
    class Stopped(Exception):
        pass

    def stop(phase, step):
        if phase == "scenes":
            raise Stopped

    schedules = {"close_ups": recipes.CLOSE_UPS, "scenes": recipes.SCENES}
    recipes.train_scene_resnet(tmp_path / "whole.safetensors", **schedules)
    with pytest.raises(Stopped):
        recipes.train_scene_resnet(tmp_path / "w.safetensors", progress=stop, **schedules)
    assert [entry.name for entry in tmp_path.glob("w.*")] == ["w.close-ups.checkpoint.safetensors"]
    seen = []
    recipes.train_scene_resnet(tmp_path / "w.safetensors", progress=lambda *step: seen.append(step), **schedules)
    assert {phase for phase, _ in seen} == {"scenes"}
    whole, resumed = (load_file(tmp_path / name) for name in ("whole.safetensors", "w.safetensors"))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


@pytest.fixture
def pictures(monkeypatch):
    """In place of CIFAR-10: pictures whose brightness is their class."""
    labels = np.arange(256) % 10
    noise = np.random.default_rng(0).integers(0, 10, (256, 32, 32, 3))
    images = Images((noise + 24 * labels[:, None, None, None]).astype(np.uint8), labels)

    class Few:
        def images(self, part):
            return images

    monkeypatch.setattr(recipes, "load_source", lambda name, data_dir=None: Few())
    return images


def test_a_network_is_trained_on_from_weights_and_goes_on_from_its_checkpoint(tmp_path, pictures):
    schedule = Schedule(lr=0.02, epochs=3)
    first, second = tmp_path / "first.safetensors", tmp_path / "second.safetensors"
    before = recipes.train_on_cifar10("resnet20", first, schedule=schedule)
    after = recipes.train_on_cifar10("resnet20", second, start=first, schedule=schedule)
    assert after > max(before, 0.15) and sorted(path.name for path in tmp_path.iterdir()) == [
        "first.safetensors",
        "second.safetensors",
    ]

    def stop(phase, step):
        if step.step == 4:
            raise KeyboardInterrupt

    stopped = tmp_path / "stopped.safetensors"
    with pytest.raises(KeyboardInterrupt):
        recipes.train_on_cifar10("resnet20", stopped, start=first, schedule=schedule, progress=stop)
    with pytest.raises(WeightsError, match="is of another training"):
        recipes.train_on_cifar10("resnet20", stopped, start=second, schedule=schedule)
    recipes.train_on_cifar10("resnet20", stopped, start=first, schedule=schedule)
    whole, resumed = load_file(second), load_file(stopped)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_teacher_is_learnt_from_and_asked_once(tmp_path, pictures, monkeypatch):
    schedule = Schedule(lr=0.02, epochs=2)
    torch.manual_seed(3)
    teacher = tmp_path / "teacher.safetensors"
    save_file(build_model("resnet20").module.state_dict(), teacher)
    seen, whole, stopped = [], tmp_path / "whole.safetensors", tmp_path / "stopped.safetensors"
    ask = recipes.seen_by

    def asked(module, pixels, preprocess, views):
        seen.append((len(pixels), views.num_views))
        return ask(module, pixels, preprocess, views)

    def stop(phase, step):
        if step.step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(recipes, "seen_by", asked)
    taught = {"teacher": ("resnet20", teacher), "schedule": schedule}
    recipes.train_on_cifar10("resnet20", whole, **taught)
    with pytest.raises(KeyboardInterrupt):
        recipes.train_on_cifar10("resnet20", stopped, progress=stop, **taught)
    assert (tmp_path / "stopped.answers.safetensors").is_file()
    with pytest.raises(WeightsError, match="is of another training"):
        recipes.train_on_cifar10("resnet20", stopped, schedule=schedule)
    recipes.train_on_cifar10("resnet20", stopped, **taught)
    assert seen == [(256, 4), (256, 4)]
    assert sorted(path.stem for path in tmp_path.iterdir()) == ["stopped", "teacher", "whole"]
    first, second, alone = load_file(whole), load_file(stopped), tmp_path / "alone.safetensors"
    assert all(torch.equal(first[name], second[name]) for name in first)
    recipes.train_on_cifar10("resnet20", alone, schedule=schedule)
    assert not torch.equal(load_file(alone)["conv1.weight"], first["conv1.weight"])


def test_command_wants_a_teacher_with_its_weights(tmp_path):
    result = CliRunner().invoke(command(), ["vgg16", "--teacher", "resnet56", "-o", str(tmp_path / "w.safetensors")])
    assert result.exit_code == 1
    assert "give --teacher and --teacher-weights, or neither" in result.stderr


def test_command_refuses_a_network_of_another_size(tmp_path):
    result = CliRunner().invoke(command(), ["resnet50", "-o", str(tmp_path / "w.safetensors")])
    assert result.exit_code == 1
    assert '"resnet50" is not for pictures of 3 x 32 x 32: it takes (3, 224, 224)' in result.stderr


def test_top1_counts_largest_logits():
    class Brightest(nn.Module):
        """Logits are the means of the channels."""

        def __init__(self):
            super().__init__()
            self.unused = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x.mean((2, 3))

    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (501, 4, 4, 3), dtype=np.uint8)
    labels = rng.integers(0, 3, 501)
    preprocess = Preprocess(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    expected = float((pixels.astype(int).sum((1, 2)).argmax(1) == labels).mean())
    assert recipes.top1(Brightest(), pixels, labels, preprocess) == expected
    assert np.isnan(recipes.top1(Brightest(), pixels, None, preprocess))
