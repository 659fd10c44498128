"""Costs without some channels equal the costs of the network after they are gone; the choice meets its target."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch
from test_channels import Mobile, awake, example, some_of_each
from torch import nn

from coinfer.compress.budget import Costs, Unreachable, choose
from coinfer.compress.channels import Channels
from coinfer.compress.scores import magnitude
from coinfer.errors import ModelError
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model

NETS = {"resnet20": 32, "googlenet": 32, "vit-tiny": 32, "scene-resnet": 64}


class Wide(nn.Module):
    """Two convolutions of 20 and 24 channels, and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 20, 3), nn.Conv2d(20, 24, 3)
        self.linear = nn.Linear(24, 10)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 3, H, W) to logits (N, 10)."""
        return self.linear(self.conv2(self.conv1(inputs).relu()).relu().mean((2, 3)))


@pytest.mark.parametrize("name", [*NETS, "mobile"])
def test_costs_are_those_of_the_network_without_the_channels(name: str) -> None:
    torch.manual_seed(0)
    module = awake(Mobile() if name == "mobile" else build_model(name).module)
    given = (example(NETS.get(name, 16))[0][:1],)
    channels = Channels(module, given)
    costs = Costs(channels, given)
    assert costs.of({}).parameters == sum(weight.numel() for weight in module.parameters())
    if name != "vit-tiny":
        # What a captured network counts has attention's own products, too.
        assert costs.of({}).macs == pytest.approx(capture(module, *given).num_macs)
    removals = some_of_each(channels, 0.4)
    expected = costs.of({removal.group: len(removal.places) for removal in removals})
    channels.remove(removals)
    after = Costs(channels, given).of({})
    assert expected == pytest.approx(after)
    assert after.parameters == sum(weight.numel() for weight in module.parameters())


def test_the_least_needed_channels_go_until_the_target_is_met() -> None:
    torch.manual_seed(0)
    module = awake(Mobile())
    channels = Channels(module, example())
    costs = Costs(channels, example())
    scores = {group.name: torch.arange(group.size, dtype=torch.float64) for group in channels.groups}
    scores["thin"] += 100
    scores["hidden"][:] = math.inf
    target = 0.6 * costs.of({}).macs
    removals = {r.group: r.places for r in choose(channels, scores, lambda gone: costs.of(gone).macs, target)}
    assert set(removals) == {"wide.0"}
    count = len(removals["wide.0"])
    assert removals["wide.0"] == tuple(range(count))
    assert costs.of({"wide.0": count}).macs <= target < costs.of({"wide.0": count - 1}).macs


@pytest.mark.parametrize("share", [0.9, 0.6, 0.3])
def test_a_multiple_stays_of_each_group_and_no_step_more_of_any_would_fit(share: float) -> None:
    torch.manual_seed(0)
    channels = Channels(awake(Wide()), example())
    costs, scores = Costs(channels, example()), magnitude(channels)
    size = {group.name: group.size for group in channels.groups}
    assert size == {"conv1": 20, "conv2": 24}

    def macs(gone: Mapping[str, int]) -> float:
        return costs.of(gone).macs

    target = share * macs({})
    gone = {r.group: len(r.places) for r in choose(channels, scores, macs, target, multiple=8)}
    kept = {name: size[name] - gone.get(name, 0) for name in size}
    steps = {"conv1": (8, 16, 20), "conv2": (8, 16, 24)}
    assert all(kept[name] in steps[name] for name in size)
    assert macs(gone) <= target
    for name, count in gone.items():
        more = next(step for step in steps[name] if step > kept[name])
        assert macs(gone | {name: count - (more - kept[name])}) > target


def test_channels_that_stay_bound_a_multiple() -> None:
    torch.manual_seed(0)
    channels = Channels(awake(Wide()), example())
    costs, scores = Costs(channels, example()), magnitude(channels)
    scores["conv1"][:9] = math.inf
    with pytest.raises(Unreachable, match="a multiple of 8, left in each") as caught:
        choose(channels, scores, lambda gone: costs.of(gone).macs, 1.0, multiple=8)
    # 9 stay, so that 16 do; the other group keeps the least there is.
    assert {r.group: len(r.places) for r in caught.value.removals} == {"conv1": 4, "conv2": 16}
    assert all(place >= 9 for r in caught.value.removals if r.group == "conv1" for place in r.places)


def test_heads_go_one_by_one_whatever_multiple_of_channels_stays() -> None:
    torch.manual_seed(0)
    channels = Channels(awake(build_model("vit-tiny").module), example(32))
    costs, scores = Costs(channels, example(32)), magnitude(channels)
    heads = [group for group in channels.groups if group.kind == "heads"]
    scores |= {group.name: scores[group.name] * 1e-6 for group in heads}
    target = 0.99 * costs.of({}).macs
    removals = choose(channels, scores, lambda gone: costs.of(gone).macs, target, multiple=16)
    assert {r.group for r in removals} <= {group.name for group in heads}
    assert min(len(r.places) for r in removals) == 1


def test_layers_that_are_not_called_count_with_the_rest() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Conv2d(3, 8, 1), nn.Linear(8, 4)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            words = self.first(x).flatten(2).transpose(1, 2)
            return self.last(self.attention(words, words, words, need_weights=False)[0].mean(1))

    class Stands(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attends, self.free = Attends(), nn.Sequential(nn.Conv2d(3, 6, 1), nn.Conv2d(6, 4, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.attends(x) + self.free(x).mean((2, 3))

    torch.manual_seed(0)
    module = Stands().eval()
    channels = Channels(module, example())
    assert [group.name for group in channels.groups] == ["free.0"]
    assert Costs(channels, example()).of({}).parameters == sum(weight.numel() for weight in module.parameters())


def test_a_target_out_of_reach_says_how_far_it_can_go() -> None:
    torch.manual_seed(0)
    channels = Channels(awake(Mobile()), example())
    costs, scores = Costs(channels, example()), magnitude(channels)
    with pytest.raises(ModelError, match=r'parameters \(1\) would .*, ".*" first: with 2 channels left in each'):
        choose(channels, scores, lambda gone: costs.of(gone).parameters, 1.0, least=2, unit="parameters")
    with pytest.raises(ModelError, match="keeps at least 1 channel, got least = 0"):
        choose(channels, scores, lambda gone: costs.of(gone).parameters, 1.0, least=0)
