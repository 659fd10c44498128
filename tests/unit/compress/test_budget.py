"""Costs without some channels equal the costs of the network after they are gone; the choice meets its target."""

from __future__ import annotations

import math

import pytest
import torch
from test_channels import Mobile, awake, example, some_of_each

from coinfer.compress.budget import Costs, choose
from coinfer.compress.channels import Channels
from coinfer.compress.scores import magnitude
from coinfer.errors import ModelError
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model

NETS = {"resnet20": 32, "googlenet": 32, "vit-tiny": 32, "scene-resnet": 64}


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


def test_a_target_out_of_reach_says_how_far_it_can_go() -> None:
    torch.manual_seed(0)
    channels = Channels(awake(Mobile()), example())
    costs, scores = Costs(channels, example()), magnitude(channels)
    with pytest.raises(ModelError, match=r'1 parameters would empty layers, ".*" first: with 2 channels left in each'):
        choose(channels, scores, lambda gone: costs.of(gone).parameters, 1.0, least=2, unit="parameters")
    with pytest.raises(ModelError, match="keeps at least 1 channel, got least = 0"):
        choose(channels, scores, lambda gone: costs.of(gone).parameters, 1.0, least=0)
