"""Rounds of pruning: the budget is met, a stopped one ends as one that was not, and what cannot be is said."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from coinfer.compress import pruning
from coinfer.compress.batches import Views
from coinfer.compress.budget import Costs, Unreachable
from coinfer.compress.channels import Channels
from coinfer.compress.pruning import PruneRecipe, Pruning
from coinfer.compress.unit_training import Teacher, teacher_of
from coinfer.data import Images
from coinfer.errors import DataError, ModelError
from coinfer.model.graph import capture
from tiny_nets import PREPROCESS

EXAMPLE = (torch.zeros(1, 3, 16, 16),)
FEW = {"epochs": 1, "final_epochs": 1, "batch_size": 32, "scored": 64, "shift": 1}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(16, 16, 3, 2, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.two(self.one(x)).mean((2, 3)))


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def taught(module: nn.Module, *, is_labelled: bool = True) -> Teacher:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (128, 16, 16, 3), dtype=np.uint8)
    images = Images(pixels, rng.integers(0, 4, 128) if is_labelled else None)
    return teacher_of(capture(module, torch.zeros(2, 3, 16, 16)), images, PREPROCESS, Views())


@pytest.mark.parametrize("budget", ["macs", "parameters"])
@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_the_budget_is_met_and_the_network_given_stays(module: nn.Module, budget: str, score: str) -> None:
    before = Costs(Channels(module, EXAMPLE), EXAMPLE).of({})
    weights = {name: value.clone() for name, value in module.state_dict().items()}
    recipe = PruneRecipe(keep=0.4, budget=budget, score=score, rounds=2, **FEW)
    pruned = Pruning(module, EXAMPLE, taught(module), recipe).run()
    assert len(pruned.rounds) == 2
    assert 0.3 < getattr(pruned.cost, budget) / getattr(before, budget) <= 0.4
    assert pruned.cost.parameters == sum(weight.numel() for weight in pruned.module.parameters())
    assert pruned.module(EXAMPLE[0]).shape == (1, 4)
    assert not pruned.module.training
    assert all(torch.equal(module.state_dict()[name], value) for name, value in weights.items())


def test_channels_of_a_region_are_counted_alone(module: nn.Module) -> None:
    recipe = PruneRecipe(keep=0.25, budget="channels", region=("two.*",), rounds=1, **FEW)
    pruned = Pruning(module, EXAMPLE, taught(module), recipe).run()
    assert pruned.module.two[0].out_channels == 4
    assert pruned.module.one[0].out_channels == 16


def test_a_latency_is_measured_until_it_is_near(module: nn.Module) -> None:
    asked: list[int] = []

    def latency_of(smaller: nn.Module) -> float:
        # A layer costs a fixed time beside its work: half of the latency cannot be had by half of the work.
        asked.append(smaller.one[0].out_channels)
        return 1e-3 + Costs(Channels(smaller, EXAMPLE), EXAMPLE).of({}).macs / 1e8

    recipe = PruneRecipe(keep=0.6, budget="latency", score="magnitude", rounds=1, **FEW)
    pruned = Pruning(module, EXAMPLE, taught(module), recipe, latency_of=latency_of).run()
    start, end = latency_of(module), latency_of(pruned.module)
    assert 0.5 < end / start <= 0.6 * 1.03
    assert len(asked) > 3


def test_a_latency_that_only_the_smallest_network_has_is_met(module: nn.Module) -> None:
    # By multiply-accumulates a tenth would empty layers: a seventh is left with four channels in each.
    recipe = PruneRecipe(keep=0.1, least=4, budget="latency", score="magnitude", rounds=1, **FEW)

    def latency_of(smaller: nn.Module) -> float:
        return 0.05 if smaller.one[0].out_channels == smaller.two[0].out_channels == 4 else 1.0

    pruned = Pruning(module, EXAMPLE, taught(module), recipe, latency_of=latency_of).run()
    assert [layer.out_channels for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d)] == [4, 4]


def test_every_phase_has_an_order_of_its_own(module: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[torch.Tensor] = []
    fit = pruning.fit

    def note(model: nn.Module, batches: object, *args: object, **options: object) -> object:
        shown.append(next(batches.epoch(0)).inputs)
        return fit(model, batches, *args, **options)

    monkeypatch.setattr(pruning, "fit", note)
    Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, rounds=2, **FEW)).run()
    assert len(shown) == 3 and not any(torch.equal(a, b) for a, b in zip(shown, shown[1:], strict=False))


def test_slimming_trains_with_a_penalty_before(module: nn.Module) -> None:
    steps: list[str] = []
    recipe = PruneRecipe(keep=0.5, score="slimming", rounds=1, sparse_epochs=2, strength=0.05, **FEW)

    def note(name: str, step: object) -> None:
        if name not in steps:
            steps.append(name)

    torch.manual_seed(1)
    Pruning(module, EXAMPLE, taught(module), recipe, progress=note).run()
    assert steps == ["sparse", "round 1", "final"]


@pytest.mark.parametrize("stop_at", [2, 5, 9])
def test_a_stopped_pruning_ends_as_one_that_was_not(module: nn.Module, tmp_path: Path, stop_at: int) -> None:
    recipe = PruneRecipe(keep=0.5, rounds=2, **FEW)
    whole = Pruning(module, EXAMPLE, taught(module), recipe).run()
    seen = 0

    def stop(name: str, step: object) -> None:
        nonlocal seen
        seen += 1
        if seen == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path, progress=stop).run()
    resumed = Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path).run()
    assert resumed.rounds == whole.rounds
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name
    again = Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path, progress=stop).run()
    assert again.cost == whole.cost


def test_what_a_round_refused_stays_when_a_stopped_run_goes_on(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = PruneRecipe(keep=0.5, rounds=2, **FEW)

    def refuse(channels: Channels, removals: object) -> bool:
        before = channels.groups
        channels.groups = tuple(group for group in before if group.name != "one.0")
        channels.refused["one.0"] = "for a reason"
        return len(channels.groups) < len(before)

    def stop(name: str, step: object) -> None:
        if name == "round 1":
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Channels, "refuse", refuse)
        Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path, progress=stop).run()
    resumed = Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path)
    pruned = resumed.run()
    assert resumed.refused["one.0"] == "for a reason" and pruned.module.one[0].out_channels == 16
    assert {removal.group for some in pruned.rounds for removal in some} == {"two.0"}


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("too much"), MemoryError(), RuntimeError("CUDA error: out of memory")],
    ids=["torch", "Python", "CUDA"],
)
def test_too_small_a_memory_halves_the_batch(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    sizes: list[int] = []
    fit = pruning.fit

    def small(model: nn.Module, batches: object, *args: object, **options: object) -> object:
        size = next(batches.epoch(0)).inputs.shape[0]
        sizes.append(size)
        if size > 16:
            raise error
        return fit(model, batches, *args, **options)

    monkeypatch.setattr(pruning, "fit", small)
    pruned = Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, rounds=1, **FEW)).run()
    assert sizes == [32, 16, 16]
    assert (pruned.taught.batch_size, pruned.taught.images) == (16, 128)
    monkeypatch.setattr(pruning, "LEAST_BATCH", 32)
    with pytest.raises(ModelError, match=r"memory is too small for batches of 32 pictures \(round 1 of Net\), .* 32 "):
        Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, rounds=1, **FEW)).run()


def test_a_run_that_was_killed_in_smaller_batches_goes_on_with_them(
    module: nn.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    recipe = PruneRecipe(keep=0.5, rounds=1, **{**FEW, "epochs": 3})
    fit = pruning.fit

    def small(model: nn.Module, batches: object, *args: object, **options: object) -> object:
        given = next(batches.epoch(0)).inputs
        if len(given) > 16:
            # As a real one: when some steps have been taken.
            with torch.no_grad():
                next(model.parameters()).add_(1.0)
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes")
        return fit(model, batches, *args, **options)

    def stop(step: str, progress: object) -> None:
        if progress.epoch == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "fit", small)
    whole = Pruning(module, EXAMPLE, taught(module), recipe).run()
    with pytest.raises(KeyboardInterrupt):
        Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path, progress=stop).run()
    resumed = Pruning(module, EXAMPLE, taught(module), recipe, folder=tmp_path).run()
    for name, value in whole.module.state_dict().items():
        assert torch.equal(resumed.module.state_dict()[name], value), name


class TwoOutputs(Net):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.two(self.one(x)).mean((2, 3))
        return self.linear(features), features


def test_of_several_outputs_the_first_is_learnt() -> None:
    torch.manual_seed(0)
    module = TwoOutputs().eval()
    pruned = Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.6, rounds=1, **FEW)).run()
    # The second output has the channels of the last layer: they stay.
    assert [out.shape[1] for out in pruned.module(EXAMPLE[0])] == [4, 16]


@pytest.mark.parametrize(("wide", "left"), [(22, 15), (23, 13), (16, 11)])
def test_a_number_of_channels_is_met_exactly(wide: int, left: int) -> None:
    torch.manual_seed(0)
    net = Net()
    net.one[0], net.one[1] = nn.Conv2d(3, wide, 3, padding=1, bias=False), nn.BatchNorm2d(wide)
    net.two[0] = nn.Conv2d(wide, 16, 3, 2, 1, bias=False)
    module = net.eval()
    step = PruneRecipe(keep=left / wide, budget="channels", region=("one.0", "one.1"), **{**FEW, "rounds": 1})
    assert Pruning(module, EXAMPLE, taught(module), step).run().module.one[0].out_channels == left


def test_a_budget_out_of_reach_is_refused_or_met_as_far_as_it_can_be(module: nn.Module, tmp_path: Path) -> None:
    recipe = PruneRecipe(keep=0.01, least=4, rounds=1, **FEW)
    with pytest.raises(Unreachable, match="would empty layers"):
        Pruning(module, EXAMPLE, taught(module), recipe).run()
    nearest = PruneRecipe(keep=0.01, least=4, rounds=1, unreachable="nearest", **FEW)
    pruning = Pruning(module, EXAMPLE, taught(module), nearest, folder=tmp_path)
    pruned = pruning.run()
    assert [layer.out_channels for layer in pruned.module.modules() if isinstance(layer, nn.Conv2d)] == [4, 4]
    assert len(pruning.unmet) == 1 and '"' in pruning.unmet[0] and "keep more" not in pruning.unmet[0]
    slow = PruneRecipe(keep=0.01, least=4, rounds=1, unreachable="nearest", budget="latency", **FEW)
    same = Pruning(module, EXAMPLE, taught(module), slow, latency_of=lambda network: 1.0).run()
    assert [layer.out_channels for layer in same.module.modules() if isinstance(layer, nn.Conv2d)] == [4, 4]
    # What was told once is told by a run that goes on as well.
    again = Pruning(module, EXAMPLE, taught(module), nearest, folder=tmp_path)
    assert again.unmet == pruning.unmet and again.refused == pruning.refused and "linear" in again.refused


def test_the_latency_of_another_segment_is_another_pruning(module: nn.Module, tmp_path: Path) -> None:
    folders = {
        Pruning(
            module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, budget="latency", latency_at=cut, rounds=1, **FEW),
            latency_of=lambda network: 1.0, folder=tmp_path,
        ).folder
        for cut in (None, "/relu#0", "/relu#1")
    }  # fmt: skip
    assert len(folders) == 3


def test_what_makes_no_sense_is_refused(module: nn.Module) -> None:
    for keep in (0.0, 1.0, 1.5):
        with pytest.raises(ModelError, match=f"keeps a share above 0 and below 1, got {keep}"):
            PruneRecipe(keep=keep)
    with pytest.raises(ModelError, match="rounds, batch_size, least, multiple and scored of a pruning must be"):
        PruneRecipe(keep=0.5, multiple=0)
    for field in ("strength", "lr"):
        with pytest.raises(ModelError, match="nan"):
            PruneRecipe(keep=0.5, **{field: float("nan")})
    with pytest.raises(DataError, match="in batches of 500 needs as many pictures, got 128"):
        Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, batch_size=500))
    layers = (nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    plain = nn.Sequential(*layers).eval()
    with pytest.raises(ModelError, match="a sparse phase needs batch norms with scales, Sequential has none"):
        Pruning(plain, EXAMPLE, taught(plain), PruneRecipe(keep=0.5, score="magnitude", sparse_epochs=1, **FEW))
    unlabelled = taught(module, is_labelled=False)
    with pytest.raises(ModelError, match='"taylor" needs labels'):
        Pruning(module, EXAMPLE, unlabelled, PruneRecipe(keep=0.5, **FEW)).run()
    Pruning(module, EXAMPLE, unlabelled, PruneRecipe(keep=0.5, score="magnitude", rounds=1, **FEW)).run()
    with pytest.raises(ModelError, match='latency_of is for the budget "latency"'):
        Pruning(module, EXAMPLE, unlabelled, PruneRecipe(keep=0.5, budget="latency", **FEW))
    frozen = Net().eval().requires_grad_(requires_grad=False)
    with pytest.raises(ModelError, match="all weights of Net are frozen: those that may change must require gradients"):
        Pruning(frozen, EXAMPLE, taught(frozen), PruneRecipe(keep=0.5, rounds=1, **FEW)).run()
    words = r'0.001 of the multiply-acc.*\) would empty layers, ".*" first: with 1 channel left in each 0.0\d+ stays'
    with pytest.raises(ModelError, match=words + r'.*unreachable = "nearest"'):
        Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.001, rounds=1, **FEW)).run()
