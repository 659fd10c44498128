"""Scores of channels against what they stand for, computed another way."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import Tensor, nn

from coinfer.compress.channels import Channels
from coinfer.compress.losses import Batch, cross_entropy
from coinfer.compress.scores import magnitude, scores_of, slimmed, slimming, taylor
from coinfer.errors import ModelError
from coinfer.model.zoo import build_model
from tiny_nets import Chain, Residual


class Gated(nn.Module):
    """Two readers of one sum, a linear layer behind a flattened map; `gate` scales each channel of what is read."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Conv2d(3, 4, 3, padding=1)
        self.right = nn.Conv2d(3, 4, 1)
        self.near = nn.Conv2d(4, 2, 1)
        self.far = nn.Linear(4 * 16, 3)
        self.last = nn.Linear(2 + 3, 5)
        self.gate: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.left(x) + self.right(x))
        if self.gate is not None:
            y = y * self.gate[:, :, None, None]
        near = self.near(y).mean((2, 3))
        far = torch.relu(self.far(nn.functional.adaptive_avg_pool2d(y, 4).flatten(1)))
        return self.last(torch.cat((near, far), 1))


def batches(count: int = 2) -> list[Batch]:
    draw = torch.Generator().manual_seed(3)
    return [
        Batch(torch.randn(6, 3, 16, 16, generator=draw), torch.randint(5, (6,), generator=draw)) for _ in range(count)
    ]


def test_taylor_is_the_slope_of_each_samples_loss_in_a_gate() -> None:
    torch.manual_seed(0)
    module = Gated().eval()
    channels = Channels(module, (torch.randn(2, 3, 16, 16),))
    scores = taylor(channels, batches(), cross_entropy())
    assert all(weight.grad is None for weight in module.parameters())
    wanted = torch.zeros(4, dtype=torch.float64)
    for batch in batches():
        for k in range(6):
            module.gate = torch.ones(1, 4, requires_grad=True)
            cross_entropy()(module(batch.inputs[k : k + 1]), Batch(batch.inputs, batch.labels[k : k + 1])).backward()
            wanted += module.gate.grad[0].double().abs()
    module.gate = None
    assert torch.allclose(scores["left"], wanted / wanted.norm(), rtol=1e-4)
    assert {name: len(value) for name, value in scores.items()} == {"left": 4, "near": 2, "far": 3}


def test_taylor_keeps_nothing_of_what_the_layers_read() -> None:
    def alive() -> int:
        gc.collect()
        return sum(type(thing) is Tensor and thing.shape == (6, 4, 16, 16) for thing in gc.get_objects())

    torch.manual_seed(0)
    module = Gated().eval()
    channels = Channels(module, (torch.randn(2, 3, 16, 16),))
    before = alive()
    taylor(channels, batches(), cross_entropy())
    assert alive() == before


def test_slimming_is_the_mean_scale_and_spares_what_has_none() -> None:
    torch.manual_seed(0)
    module = Residual().eval()
    module.layer1[0].bn1.weight.data = torch.tensor([0.5, -2.0, 0.0, 1.0])
    scores = slimming(Channels(module, (torch.randn(2, 3, 16, 16),)))
    assert scores["layer1.0.conv1"].tolist() == [0.5, 2.0, 0.0, 1.0]
    with pytest.raises(ModelError, match="needs batch norms"):
        slimming(Channels(Chain().eval(), (torch.randn(2, 3, 16, 16),)))
    mixed = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1))
    spared = slimming(Channels(mixed.eval(), (torch.randn(2, 3, 4, 4),)))
    assert spared["0"].tolist() == [math.inf] * 4
    assert spared["2"].tolist() == [1.0] * 6


def test_magnitude_adds_the_squares_of_all_that_make_a_channel() -> None:
    torch.manual_seed(0)
    module = Gated().eval()
    scores = magnitude(Channels(module, (torch.randn(2, 3, 16, 16),)))["left"]
    norms = (module.left.weight.flatten(1).square().sum(1) + module.right.weight.flatten(1).square().sum(1)).sqrt()
    assert torch.allclose(scores.float(), norms / norms.mean(), rtol=1e-5)


def test_heads_have_scores_too() -> None:
    torch.manual_seed(0)
    module = build_model("vit-tiny").module
    channels = Channels(module, (torch.randn(1, 3, 32, 32),))
    given = [Batch(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 3]))]
    for score in ("taylor", "magnitude"):
        heads = scores_of(score, channels, lambda: given, cross_entropy())["blocks.2.attention"]
        assert heads.shape == (4,)
        assert (heads > 0).all()


def test_taylor_without_labels_says_what_to_take() -> None:
    torch.manual_seed(0)
    channels = Channels(Chain().eval(), (torch.randn(2, 3, 16, 16),))
    with pytest.raises(ModelError, match='"taylor" needs labels, these pictures have none: take "slimming" or'):
        taylor(channels, [Batch(torch.randn(2, 3, 16, 16), None)], cross_entropy())


def test_the_penalty_is_the_sum_of_scales() -> None:
    torch.manual_seed(0)
    module = Residual()
    module.bn1.weight.data = torch.tensor([1.0, -2.0, 0.5, 0.0])
    batch = batches()[0]
    logits = torch.randn(6, 5)
    more = slimmed(cross_entropy(), module, 0.1)(logits, batch) - cross_entropy()(logits, batch)
    assert more.item() == pytest.approx(0.1 * (3.5 + 4 + 4 + 8 + 8), rel=1e-5)
