"""Networks whose channels are hard to follow: pieces, gates, recurrent and transposed layers, shared weights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_pruning import FEW, taught
from torch import Tensor, nn
from torch.nn import functional as F

from coinfer.compress.budget import Costs
from coinfer.compress.channels import Channels, Removal
from coinfer.compress.losses import Batch, cross_entropy
from coinfer.compress.pruned_file import Stage, load_pruned, save_pruned
from coinfer.compress.pruning import PruneRecipe, Pruning
from coinfer.compress.scores import scores_of
from coinfer.compress.series import crossing_groups
from coinfer.model.graph import capture

EXAMPLE = (torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(5)),)


class Between(nn.Module):
    """Two convolutions and what is between them."""

    def __init__(self, between: Callable[[Tensor], Tensor], read: int = 16) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(read, 12, 1)
        self.linear = nn.Linear(12, 4)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(torch.relu(self.two(self.between(self.one(x)))).mean((2, 3)))


class Up(nn.Module):
    """A transposed convolution in the middle."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(16, 12, 2, 2)
        self.norm = nn.BatchNorm2d(12)
        self.two = nn.Conv2d(12, 8, 1)
        self.linear = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm(self.up(torch.relu(self.one(x)))))
        return self.linear(torch.relu(self.two(y)).mean((2, 3)))


class Recurrent(nn.Module):
    """A GRU behind two convolutions."""

    def __init__(self, kind: type[nn.Module] = nn.GRU) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one = nn.Conv2d(3, 16, 3, padding=1)
        self.two = nn.Conv2d(16, 12, 3, padding=1)
        self.cells = kind(12, 16, batch_first=True)
        self.linear = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.two(torch.relu(self.one(x)))).mean(2).transpose(1, 2)
        return self.linear(self.cells(y)[0][:, -1])


class Named(nn.Module):
    """A layer that is called by keyword."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.linear = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 12, 1), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(input=torch.relu(self.two(input=torch.relu(self.one(x)))).mean((2, 3)))


class Twins(nn.Module):
    """One layer under two names."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.same = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 1)
        self.again, self.linear = self.same, nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.again(torch.relu(self.same(torch.relu(self.one(x))))))
        return self.linear(y.mean((2, 3)))


class Sure(nn.Module):
    """A stream that a norm averages over, and an answer so sure that nothing shows in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.norm = nn.Conv2d(3, 16, 4, 4), nn.LayerNorm(16)
        self.wide, self.thin, self.linear = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.one(x).flatten(2).transpose(1, 2)
        y = y + self.thin(torch.relu(self.wide(self.norm(y))))
        return torch.softmax(3e4 * self.linear(y.mean(1)), 1)


@pytest.mark.parametrize(
    ("between", "read"),
    [
        (lambda x: x * torch.sigmoid(x[:, -1:]), 16),
        (lambda x: x * x[:, :1], 16),
        (lambda x: x * torch.sigmoid(x.split([15, 1], 1)[1]), 16),
        (lambda x: x[:, 8:], 8),
        (lambda x: x.roll(1, 1), 16),
        (lambda x: F.glu(x, 1), 8),
    ],
    ids=["the last as a gate", "the first as a gate", "a piece as a gate", "half", "shifted", "halves as gates"],
)
def test_pieces_of_channels_keep_what_makes_them(between: Callable[[Tensor], Tensor], read: int) -> None:
    channels = Channels(Between(between, read).eval(), EXAMPLE)
    assert [group.name for group in channels.groups] == ["two"]
    assert "one" in channels.refused


def test_a_gate_by_the_largest_channel_is_found_out_where_it_goes() -> None:
    channels = Channels(Between(lambda x: x * torch.sigmoid(x.amax(1, keepdim=True))).eval(), EXAMPLE)
    assert not channels.refuse([Removal(group="two", places=(1,))])
    assert channels.refuse([Removal(group="two", places=(1,)), Removal(group="one", places=tuple(range(15)))])
    assert [group.name for group in channels.groups] == ["two"] and "one" in channels.refused


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_what_a_recurrent_layer_reads_stays_and_the_rest_goes(kind: type[nn.Module]) -> None:
    channels = Channels(Recurrent(kind).eval(), EXAMPLE)
    assert [group.name for group in channels.groups] == ["one"]
    assert "two" in channels.refused


def test_an_answer_that_is_sure_hides_nothing() -> None:
    channels = Channels(Sure().eval(), EXAMPLE)
    assert [group.name for group in channels.groups] == ["wide"]
    assert "something else than with it masked" in channels.refused["one"]


def test_transposed_convolutions_are_scored_and_counted() -> None:
    module = Up().eval()
    graph = capture(module, EXAMPLE[0])
    channels = Channels(module, EXAMPLE)
    assert {group.name for group in channels.groups} == {"one", "up", "two"}
    scores = scores_of("taylor", channels, lambda: [Batch(EXAMPLE[0], torch.tensor([1]))], cross_entropy())
    assert all(bool((values > 0).any()) for values in scores.values())
    sizes = scores_of("magnitude", channels, list, cross_entropy())["up"]
    wanted = module.up.weight.detach().double().square().sum((0, 2, 3)).sqrt()
    assert torch.allclose(sizes, wanted / wanted.mean())
    assert [group.name for group in crossing_groups(channels, graph, graph.cut("/relu#0"))] == ["one"]
    costs = Costs(channels, EXAMPLE)
    assert costs.of({}).macs == graph.num_macs
    fewer = costs.of({"one": 7, "up": 5})
    removals = [Removal(group="one", places=tuple(range(7))), Removal(group="up", places=tuple(range(5)))]
    with torch.no_grad():
        wanted = channels.masked(removals)(*EXAMPLE)
    channels.remove(removals)
    assert torch.allclose(module(*EXAMPLE), wanted, atol=1e-6)
    assert fewer.parameters == sum(weight.numel() for weight in module.parameters())
    assert fewer.macs == capture(module, EXAMPLE[0]).num_macs


def test_a_layer_called_by_keyword_is_scored() -> None:
    channels = Channels(Named().eval(), EXAMPLE)
    scores = scores_of("taylor", channels, lambda: [Batch(EXAMPLE[0], torch.tensor([1]))], cross_entropy())
    assert set(scores) == {"one", "two"} and all(bool((values > 0).any()) for values in scores.values())
    assert Costs(channels, EXAMPLE).of({}).macs == capture(Named(), EXAMPLE[0]).num_macs


def test_a_layer_under_two_names_is_pruned_kept_and_read(tmp_path: Path) -> None:
    module = Twins().eval()
    before = copy.deepcopy(module)
    pruned = Pruning(module, EXAMPLE, taught(module), PruneRecipe(keep=0.5, **FEW), folder=tmp_path).run()
    path = tmp_path / "twins.safetensors"
    lineage = [Stage(recipe=PruneRecipe(keep=0.5), rounds=pruned.rounds)]
    save_pruned(pruned.module, path, network="x", lineage=lineage)
    read = load_pruned(path, before, EXAMPLE, network="x").module
    assert torch.allclose(read(*EXAMPLE), pruned.module(*EXAMPLE), atol=1e-6)
