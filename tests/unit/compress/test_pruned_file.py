"""A pruned network goes into a file and comes back; files that are none, or of another network, are refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_channels import awake, example
from torch import Tensor, nn

from coinfer.compress.channels import Channels, Removal
from coinfer.compress.pruned_file import Stage, load_pruned, save_pruned
from coinfer.compress.pruning import PruneRecipe
from coinfer.errors import WeightsError
from coinfer.model.zoo import build_model, weights_digest


@pytest.fixture
def module() -> nn.Module:
    torch.manual_seed(0)
    return awake(build_model("resnet20").module)


def pruned_twice(module: nn.Module, path: Path) -> nn.Module:
    network = weights_digest(module)
    smaller = awake(build_model("resnet20").module)
    smaller.load_state_dict(module.state_dict())
    channels = Channels(smaller, example(32))
    lineage = []
    for group, places in (("layer1.1.conv1", (0, 5, 7)), ("conv1", (2, 3))):
        removals = (Removal(group=group, places=places),)
        channels.remove(removals)
        lineage.append(Stage(recipe=PruneRecipe(keep=0.5, region=(group,)), rounds=(removals,)))
    save_pruned(smaller, path, network=network, lineage=lineage)
    return smaller


def test_a_pruned_network_comes_back_as_it_was(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    smaller = pruned_twice(module, path)
    before = weights_digest(module)
    loaded, lineage = load_pruned(path, module, example(32), network=before)
    assert torch.equal(loaded(*example(32)), smaller(*example(32)))
    assert [stage.recipe.region for stage in lineage] == [("layer1.1.conv1",), ("conv1",)]
    assert weights_digest(module) == before
    save_file(module.state_dict(), tmp_path / "whole.safetensors")
    assert path.stat().st_size < (tmp_path / "whole.safetensors").stat().st_size


def test_a_pruned_network_needs_no_weights_of_the_whole_one(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    smaller = pruned_twice(module, path)
    torch.manual_seed(1)
    loaded = load_pruned(path, build_model("resnet20").module, example(32), network=None).module
    assert torch.equal(loaded(*example(32)), smaller(*example(32)))


def test_other_files_are_refused(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    pruned_twice(module, path)
    network = weights_digest(module)
    with pytest.raises(WeightsError, match="made of another network: weights .*, these are abc"):
        load_pruned(path, module, example(32), network="abc")
    with pytest.raises(WeightsError, match="cannot be read"):
        load_pruned(tmp_path / "none.safetensors", module, example(32), network=network)
    plain = tmp_path / "plain.safetensors"
    save_file(load_file(path), plain)
    with pytest.raises(WeightsError, match="must be of format coinfer-pruned-1, got None"):
        load_pruned(plain, module, example(32), network=network)
    metadata = {"format": "coinfer-pruned-1", "network": network, "lineage": "[]"}
    save_file(load_file(path), plain, metadata=metadata)
    with pytest.raises(WeightsError, match="does not fit"):
        load_pruned(plain, module, example(32), network=network)
    lineage = '[{"recipe": {"keep": 0.5}, "rounds": [[{"group": "nowhere", "places": [0]}]]}]'
    save_file(load_file(path), plain, metadata=metadata | {"lineage": lineage})
    with pytest.raises(WeightsError, match='does not fit: .*"nowhere"|does not fit: no channel'):
        load_pruned(plain, module, example(32), network=network)


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("bn1.running_var", lambda value: -value, "variances below 0"),
        ("conv1.weight", lambda value: value.to(torch.complex64), "must be torch.float32, got torch.complex64"),
        ("linear.weight", lambda value: value.to(torch.int32), "must be torch.float32, got torch.int32"),
        ("linear.weight", lambda value: value * float("nan"), "no numbers"),
    ],
)
def test_weights_that_cannot_be_are_refused(
    module: nn.Module, tmp_path: Path, name: str, change: Callable[[Tensor], Tensor], words: str
) -> None:
    path = tmp_path / "small.safetensors"
    pruned_twice(module, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    state = load_file(path)
    save_file(state | {name: change(state[name])}, path, metadata=metadata)
    with pytest.raises(WeightsError, match=words):
        load_pruned(path, module, example(32), network=None)


def test_weights_kept_in_16_bits_are_32_in_the_network(module: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    pruned_twice(module, path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    half = {name: value.half() if value.ndim > 1 else value for name, value in load_file(path).items()}
    save_file(half, path, metadata=metadata)
    loaded = load_pruned(path, module, example(32), network=None).module.state_dict()
    assert {value.dtype for value in loaded.values()} == {torch.float32, torch.int64}
    assert all(torch.equal(loaded[name], value.to(loaded[name].dtype)) for name, value in half.items())
