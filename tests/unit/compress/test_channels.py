"""Channels that can go: what is removed equals what is masked, what cannot be removed is named."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from coinfer.compress.channels import Channels, Removal, replay
from coinfer.errors import ModelError
from coinfer.model.zoo import build_model
from tiny_nets import Branches, Chain, Residual, Transformer

ZOO = ("resnet20", "resnet18-half", "vgg16", "googlenet", "vit-tiny", "scene-resnet")


class Mobile(nn.Module):
    """A depthwise layer between two pointwise ones, then a flattened map into a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Sequential(nn.Conv2d(3, 6, 1, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.deep = nn.Sequential(nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False), nn.BatchNorm2d(6), nn.ReLU6())
        self.thin = nn.Conv2d(6, 4, 1)
        self.hidden = nn.Linear(4 * 8 * 8, 7)
        self.linear = nn.Linear(7, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.max_pool2d(self.thin(self.deep(self.wide(x))), 2)
        return self.linear(torch.relu(self.hidden(y.flatten(1))))


def example(size: int = 16) -> tuple[Tensor]:
    return (torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1)),)


def awake(module: nn.Module) -> nn.Module:
    """With batch norms that do something: a channel that is gone would show."""
    torch.manual_seed(0)
    for layer in module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias, 0, 0.2)
            layer.running_mean.normal_(0, 0.2)
            layer.running_var.uniform_(0.5, 1.5)
    return module.eval()


def some_of_each(channels: Channels, share: float) -> list[Removal]:
    return [Removal(group=g.name, places=tuple(range(int(g.size * share)))) for g in channels.groups]


def assert_removed_is_masked(module: nn.Module, given: tuple[Tensor], share: float) -> None:
    channels = Channels(module, given)
    removals = some_of_each(channels, share)
    before = sum(weight.numel() for weight in module.parameters())
    with torch.no_grad():
        wanted = channels.masked(removals)(*given)
        channels.remove(removals)
        got = module(*given)
    assert torch.allclose(got, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    assert sum(weight.numel() for weight in module.parameters()) < (1 - share / 2) * before


@pytest.mark.parametrize("make", [Chain, Residual, Mobile])
def test_what_is_removed_equals_what_is_masked(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    assert_removed_is_masked(awake(make()), example(), 0.5)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_networks_of_the_zoo_lose_channels_everywhere(name: str, share: float) -> None:
    torch.manual_seed(0)
    model = build_model(name)
    assert model.input_shape is not None
    module = awake(model.module)
    given = example(model.input_shape[-1])
    assert_removed_is_masked(module, given, share)
    module.train()
    module(*given).sum().backward()
    assert all(weight.grad is not None for weight in module.parameters())


def test_groups_name_who_makes_and_who_reads() -> None:
    torch.manual_seed(0)
    channels = Channels(awake(Mobile()), example())
    group = channels.group("wide.0")
    assert (group.kind, group.size) == ("channels", 6)
    assert {part.name for part in group.makers} == {"wide.0", "wide.1", "deep.0", "deep.1"}
    assert {part.name for part in group.readers} == {"thin"}
    (reader,) = channels.group("thin").readers
    assert reader.name == "hidden"
    assert reader.roots.tolist() == [channel for channel in range(4) for _ in range(64)]


def test_classes_norms_over_channels_and_padded_sums_are_refused_by_name() -> None:
    torch.manual_seed(0)
    assert Channels(awake(Chain()), example()).refused == {"head": "the network's output has its channels"}
    padded = Channels(awake(Residual()), example())
    assert {group.name for group in padded.groups} == {"layer1.0.conv1", "layer2.0.conv1"}
    stream = Channels(awake(Transformer()), example())
    assert {group.name for group in stream.groups} == {"block.mlp.0"}
    assert "masked" in "".join(Channels(build_model("vit-tiny").module, example(32)).refused.values())
    with pytest.raises(ModelError, match=r'"left.0": without some of its channels the network fails'):
        Channels(awake(Branches()), example())


class Uneven(nn.Module):
    """Layers whose channels go in pairs or not at all: two groups, and halves that gate each other."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=2)
        self.gates, self.last = nn.Conv2d(16, 12, 1), nn.Conv2d(6, 8, 1)
        self.linear = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.gates(torch.relu(self.b(torch.relu(self.a(x))))).chunk(2, 1)
        return self.linear(torch.relu(self.last(first * torch.sigmoid(second))).mean((2, 3)))


def test_channels_that_go_evenly_or_not_at_all_stay() -> None:
    torch.manual_seed(0)
    channels = Channels(Uneven().eval(), example())
    assert [group.name for group in channels.groups] == ["last"]
    assert {"a", "b", "gates"} & set(channels.refused)


def test_channels_of_the_picture_itself_stay() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 3, 3, groups=3), nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 5, 1)).eval()
    channels = Channels(net, example())
    assert [group.name for group in channels.groups] == ["1"]
    assert channels.refused["0"] == "no layer makes its channels: they are the input's own"


def test_a_module_that_cannot_be_traced_is_named() -> None:
    class Stubborn(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise RuntimeError("not today")

    with pytest.raises(ModelError, match=r'cannot be traced: not today \(last in "1"\)$'):
        Channels(nn.Sequential(nn.Conv2d(3, 8, 1), Stubborn()).eval(), example())


class Blind(nn.Module):
    """A convolution that has no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(8, 8, 1)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise RuntimeError("no gradients here")
        return self.inner(x)


def test_a_module_that_cannot_be_traced_is_left_out_where_it_is_ignored() -> None:
    torch.manual_seed(0)
    first, last = nn.Conv2d(3, 8, 1), (nn.Conv2d(8, 6, 1), nn.ReLU(), nn.Conv2d(6, 5, 1))
    net = nn.Sequential(first, Blind(), *last).eval()
    with pytest.raises(ModelError, match=r'no gradients here \(last in "1"\); .* left out by ignore'):
        Channels(net, example())
    again = copy.deepcopy(net)
    channels = Channels(net, example(), ignore=["1"])
    assert [group.name for group in channels.groups] == ["2"]
    assert channels.refused["0"].startswith("no gradient leads") and channels.refused["1.inner"]
    removal = Removal(group="2", places=(1, 4))
    wanted = channels.masked([removal])
    channels.remove([removal])
    replay(again, example(), [[removal]], ignore=["1"])
    with torch.no_grad():
        assert torch.allclose(net(*example()), wanted(*example()), atol=1e-6)
        assert torch.equal(net(*example()), again(*example()))
    assert "forward" not in vars(net[1])


def test_frozen_layers_have_channels_and_stay_frozen() -> None:
    torch.manual_seed(0)
    module = awake(Mobile())
    groups = [group.name for group in Channels(module, example()).groups]
    for name, weight in module.named_parameters():
        weight.requires_grad_(name.startswith("linear"))
    channels = Channels(module, example())
    assert [group.name for group in channels.groups] == groups
    channels.remove([Removal(group=name, places=(0,)) for name in groups])
    assert {name for name, weight in module.named_parameters() if weight.requires_grad} == {
        name for name, _ in module.named_parameters() if name.startswith("linear")
    }


def test_norms_of_single_pictures_go_with_their_layer() -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU(), nn.Conv2d(8, 6, 3))
    net = nn.Sequential(*layers, nn.InstanceNorm2d(6), nn.ReLU(), nn.Conv2d(6, 5, 3)).eval()
    nn.init.uniform_(net[1].bias, -1, 1)
    channels = Channels(net, example())
    assert {group.name for group in channels.groups} == {"0", "3"}
    removals = [Removal(group="0", places=(1, 2, 3, 6)), Removal(group="3", places=(0, 5))]
    masked = channels.masked(removals)
    channels.remove(removals)
    with torch.no_grad():
        assert torch.allclose(net(*example()), masked(*example()), atol=1e-5)


def test_a_pattern_that_fits_no_layer_is_refused() -> None:
    for what in ("region", "ignore"):
        with pytest.raises(ModelError, match=f'{what} "depp.*" fits no layer of Mobile; near are deep'):
            Channels(awake(Mobile()), example(), **{what: ["depp.*"]})


class Detached(nn.Module):
    """Layers before a detach, one behind it, one that is not called."""

    def __init__(self) -> None:
        super().__init__()
        self.early, self.wide = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1)
        self.last, self.unused = nn.Conv2d(6, 5, 1), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.relu(self.wide(self.early(x).detach()))).mean((2, 3))


def test_layers_that_no_gradient_reaches_are_named() -> None:
    torch.manual_seed(0)
    channels = Channels(Detached().eval(), example())
    assert [group.name for group in channels.groups] == ["wide"]
    assert {name for name, why in channels.refused.items() if "no gradient leads" in why} == {"early", "unused"}
    plain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 5, 1)).eval()
    plain.forward = torch.no_grad()(plain.forward)
    with pytest.raises(ModelError, match="of Sequential cannot be traced: no gradient leads from its outputs"):
        Channels(plain, example())


def test_a_region_needs_the_layers_and_not_their_norms() -> None:
    torch.manual_seed(0)
    module = awake(Mobile())
    assert [group.name for group in Channels(module, example(), region=["wide.0", "deep.0"]).groups] == ["wide.0"]
    with pytest.raises(ModelError, match=r'"wide.0": "deep.0" makes these channels as well, and is not in the region'):
        Channels(module, example(), region=["wide.0"])


def test_heads_go_whole() -> None:
    torch.manual_seed(0)
    model = build_model("vit-tiny").module
    channels = Channels(model, example(32), region=["blocks.1.attention.*"])
    (group,) = channels.groups
    assert (group.name, group.kind, group.size) == ("blocks.1.attention", "heads", 4)
    channels.remove([Removal(group="blocks.1.attention", places=(1,))])
    assert model.blocks[1].attention.num_heads == 3
    assert model.blocks[1].attention.qkv.weight.shape == (3 * 96, 128)
    assert channels.group("blocks.1.attention").size == 3


def test_a_region_keeps_the_rest() -> None:
    torch.manual_seed(0)
    module = awake(build_model("scene-resnet").module)
    channels = Channels(module, example(64), region=["layer2.*"])
    assert {group.name for group in channels.groups} == {"layer2.0.conv1", "layer2.0.conv2", "layer2.1.conv1"}
    with pytest.raises(ModelError, match=r"no channel .* in the region \['linear'\]; \"linear\": the network"):
        Channels(module, example(64), region=["linear"])


def test_removals_are_replayed_round_by_round() -> None:
    torch.manual_seed(0)
    module = awake(build_model("resnet20").module)
    again = copy.deepcopy(module)
    channels = Channels(module, example(32))
    rounds = []
    for places in ((0, 3), (1,)):
        rounds.append([Removal(group=group.name, places=places) for group in channels.groups])
        channels.remove(rounds[-1])
    replay(again, example(32), rounds)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in module.state_dict().items()}
    assert torch.equal(again(*example(32)), module(*example(32)))


@pytest.mark.parametrize(
    ("group", "places", "words"),
    [
        ("wide.0", (6,), r'group "wide.0" has places 0 to 5, each once, got \(6,\)'),
        ("wide.0", (1, 1), "each once"),
        ("thin", (0, 1, 2, 3), 'all 4 channels of "thin" would go: at least one must stay'),
        ("linear", (0,), '"linear" is no group of channels that can be removed: the network\'s output'),
        ("wild", (0,), "the groups are"),
    ],
)
def test_what_cannot_be_removed_is_refused_and_nothing_is_lost(group: str, places: tuple[int, ...], words: str) -> None:
    torch.manual_seed(0)
    module = awake(Mobile())
    channels = Channels(module, example())
    before = module(*example())
    with pytest.raises(ModelError, match=words):
        channels.remove([Removal(group="hidden", places=(0,)), Removal(group=group, places=places)])
    assert torch.equal(module(*example()), before)
