"""The unit around a cut: what it keeps at full width, what it costs in bits, and what it refuses."""

import pytest
import torch
from torch import nn

from coinfer.compress import bottleneck
from coinfer.compress.bottleneck import Unit, UnitSpec
from coinfer.compress.divided import Deployable, insert_unit
from coinfer.compress.quantiser import Quantiser
from coinfer.errors import CutError, ModelError
from coinfer.model.graph import capture
from coinfer.plan import TensorSpec

MAP = TensorSpec(name="x", shape=(8, 4, 4))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.first(x))
        return self.last((y + self.second(y)).mean((2, 3)))


@pytest.fixture
def graph():
    torch.manual_seed(0)
    return capture(Net(), torch.zeros(2, 3, 4, 4))


@pytest.mark.parametrize(("stride", "width"), [(1, 8), (2, 32), (4, 128)])
def test_at_full_width_nothing_but_the_quantising_is_lost(stride: int, width: int) -> None:
    torch.manual_seed(0)
    features = torch.relu(torch.randn(64, *MAP.shape))
    unit = Unit(MAP, UnitSpec(width=width, stride=stride))
    unit.start_from(features)
    restored, _ = unit(features)
    assert torch.allclose(unit.restore(unit.reduce(features)), features, atol=1e-4)
    assert (restored - features).abs().mean() < 0.02 * features.std()


def test_components_of_large_patches_are_found_without_their_covariance(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    # Of 4 components and nothing else, so that 4 channels lose nothing.
    patches = torch.randn(256, 4) @ torch.randn(4, MAP.shape[0] * 16)
    sides = (MAP.shape[1] // 4, MAP.shape[2] // 4)
    rows = patches.view(-1, sides[0] * sides[1], patches.shape[1]).transpose(1, 2)
    features = torch.nn.functional.fold(rows, MAP.shape[1:], 4, stride=4)
    monkeypatch.setattr(bottleneck, "_EXACT_COMPONENTS", 0)
    unit = Unit(MAP, UnitSpec(width=4, stride=4))
    unit.start_from(features)
    assert torch.allclose(unit.restore(unit.reduce(features)), features, atol=1e-3)


def test_tokens_are_reduced_by_a_linear_map() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(32, 6, 16)
    unit = Unit(TensorSpec(name="t", shape=(6, 16)), UnitSpec(width=16))
    unit.start_from(tokens)
    assert unit(tokens)[0].shape == tokens.shape
    assert (unit(tokens)[0] - tokens).abs().mean() < 0.02


def test_bits_are_the_cost_of_the_symbols_under_the_prior() -> None:
    torch.manual_seed(0)
    values = torch.randn(10, 3, 5)
    quantiser = Quantiser(3, 3, (1.0, 2.0))
    quantiser.start_from(values)
    for rate in (0, 1):
        _, bits = quantiser(values, rate)
        cost = -torch.log2(quantiser.shares[rate])
        symbols = quantiser.symbols(values, rate).long()
        by_hand = [sum(cost[c, s].item() for c in range(3) for s in symbols[n, c]) for n in range(10)]
        assert torch.allclose(bits, torch.tensor(by_hand), atol=1e-3)
    assert quantiser(values, 1)[1].sum() < quantiser(values, 0)[1].sum()


def test_the_prior_follows_the_symbols_in_training_alone() -> None:
    torch.manual_seed(0)
    quantiser = Quantiser(2, 2)
    quantiser.start_from(torch.randn(64, 2, 8, 8))
    # Three of four values lie in the second level of channel 0, all of channel 1 in the last.
    values = torch.stack([torch.tensor([-0.7, -0.7, -0.7, 0.7]), torch.full((4,), 9.0)]).expand(8, 2, 4)
    symbols = quantiser.symbols(values).float()
    before = quantiser.shares.clone()
    quantiser.eval()
    quantiser(values)
    assert torch.equal(quantiser.shares, before)
    quantiser.train()
    for _ in range(400):
        _, bits = quantiser(values)
    want = torch.stack([(symbols[:, c].flatten()[:, None] == torch.arange(4)).float().mean(0) for c in range(2)])
    assert torch.allclose(quantiser.shares[0], want, atol=1e-4)
    # Four symbols of a sample at the entropy of 3 : 1, four at nothing.
    assert torch.allclose(bits, torch.full((8,), 4 * 0.811278), atol=0.01)


def test_gradients_reach_features_grid_and_prior() -> None:
    values = torch.randn(4, 2, 6, requires_grad=True)
    quantiser = Quantiser(2, 4)
    quantiser.start_from(values.detach())
    restored, bits = quantiser(values)
    (restored.square().sum() + bits.sum()).backward()
    for tensor in (values, quantiser.centre, quantiser.log_step):
        assert tensor.grad is not None and tensor.grad.abs().sum() > 0


def test_a_network_with_a_unit_answers_as_before(graph) -> None:
    x = torch.randn(16, 3, 4, 4)
    divided = insert_unit(graph, graph.cut("/relu#0"), UnitSpec(width=8))
    (features,) = divided.head(x)
    divided.unit.start_from(features.detach())
    assert torch.allclose(divided(x), graph.module(x), atol=0.02)
    assert torch.allclose(Deployable(divided)(x), graph.module(x), atol=1e-4)
    divided.train()
    assert divided(x).bits.shape == (16,)


def test_what_does_not_fit_is_refused(graph) -> None:
    several = next(cut for cut in graph.cuts() if len(cut.specs) == 2)
    with pytest.raises(CutError, match="the nearest with one is"):
        insert_unit(graph, several, UnitSpec(width=1))
    with pytest.raises(ModelError, match="at most 8 channels, got 9"):
        Unit(MAP, UnitSpec(width=9))
    with pytest.raises(CutError, match="stride 3 does not divide 4 x 4"):
        Unit(MAP, UnitSpec(width=1, stride=3))
    with pytest.raises(CutError, match=r"float32 maps \(C, H, W\), tokens \(T, C\) or vectors \(C\)"):
        Unit(TensorSpec(name="v", shape=(2, 8, 4, 4)), UnitSpec(width=1))
    with pytest.raises(CutError, match="a unit on tokens or a vector has stride 1"):
        Unit(TensorSpec(name="v", shape=(8,)), UnitSpec(width=1, stride=2))
    with pytest.raises(ModelError, match="at most 8 channels, got 9"):
        Unit(TensorSpec(name="v", shape=(8,)), UnitSpec(width=9))
    for wrong in ({"width": 0}, {"width": 1, "bits": 9}, {"width": 1, "gains": (2.0, 1.0)}):
        with pytest.raises(ModelError, match="a unit's"):
            UnitSpec(**wrong)
