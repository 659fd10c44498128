"""Folding against batch normalisation itself."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coinfer.model.fold import fold
from coinfer.model.graph import Graph, capture
from tiny_nets import make, pictures


class Pair(nn.Module):
    """Convolution with bias, normalisation without scale, and a second use of the convolution if `shared`."""

    def __init__(self, *, shared: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=1, groups=1)
        self.norm = nn.BatchNorm2d(4, affine=shared)
        self.shared = shared

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        z = self.norm(y)
        return (z + y if self.shared else z).mean((2, 3))


def pair(*, shared: bool) -> Graph:
    torch.manual_seed(0)
    net = Pair(shared=shared)
    nn.init.uniform_(net.norm.running_mean, -1, 1)
    nn.init.uniform_(net.norm.running_var, 0.5, 2)
    return capture(net, pictures(1))


def test_a_folded_pair_is_one_convolution() -> None:
    graph = pair(shared=False)
    folded = fold(graph.module, ["mean"], ["conv2d", "batch_norm"])
    assert folded.values == ("mean", "batch_norm")
    assert sum(node.target is torch.ops.aten.batch_norm.default for node in folded.module.graph.nodes) == 0
    mean, normalised = folded.module(pictures(3))
    torch.testing.assert_close(mean, graph.module(pictures(3)), rtol=0, atol=1e-6)
    assert normalised.shape == (3, 4, 8, 8)


def test_a_convolution_that_is_used_elsewhere_stays() -> None:
    graph = pair(shared=True)
    folded = fold(graph.module, ["mean"], ["conv2d", "batch_norm"])
    assert folded.values == ("mean", "conv2d", "batch_norm")
    assert torch.equal(folded.module(pictures(3))[0], graph.module(pictures(3)))


def test_the_captured_module_stays_as_it_was() -> None:
    graph = pair(shared=False)
    before = str(graph.module.graph)
    fold(graph.module, ["mean"], ["conv2d", "batch_norm"])
    assert str(graph.module.graph) == before


def test_outputs_may_repeat_or_be_inputs() -> None:
    class Repeats(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            y = torch.relu(x)
            return y, x, y

    graph = capture(make(Repeats), pictures(1))
    folded = fold(graph.module, ["relu", "x", "relu"], [])
    y, x, again = folded.module(pictures(2))
    assert torch.equal(x, pictures(2)) and torch.equal(y, again) and y is not again
