"""Tiny seeded networks with every form of graph that coinfer must cut; input (3, 16, 16) unless said otherwise."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from coinfer.plan import Preprocess

PREPROCESS = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


class Chain(nn.Module):
    """Convolutions in a row, with a dropout that does nothing in eval mode."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), nn.ReLU(inplace=True), nn.Dropout(0.5), nn.MaxPool2d(2)
        )
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class Block(nn.Module):
    """A residual block: one activation module that is called twice, a sum in place."""

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.act = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride = stride
        self.extra = out - width

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        short = x
        if self.stride != 1:
            short = F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 0, self.extra))
        y += short
        return F.relu(y)


class Residual(nn.Module):
    """Two residual blocks, the second of half the size and twice the width."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width, width, 1))
        self.layer2 = nn.Sequential(Block(width, 2 * width, 2))
        self.linear = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.linear(torch.flatten(F.adaptive_avg_pool2d(y, 1), 1))


class Branches(nn.Module):
    """Two branches and the input itself, joined: three values cross in its middle."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Conv2d(3, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.right = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(3, width, 3, padding=1), nn.ReLU())
        self.last = nn.Conv2d(2 * width + 3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        joined = torch.cat([self.left(x), self.right(x), x], 1)
        return self.last(joined).mean((2, 3))


class Twice(nn.Module):
    """A module called twice, functional operations, a skip from the input, and nested outputs of which one is inner."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())
        self.linear = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = self.block(self.conv(self.block(self.conv(x))))
        y = F.relu(y + x)
        pooled = y.mean((2, 3))
        return {"logits": self.linear(pooled), "inner": (pooled, [y])}


class Attention(nn.Module):
    """Self-attention written out, with reshapes that ask for the batch."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(batch, tokens, width))


class Encoder(nn.Module):
    """A transformer block around `attn`: ours, or torch's own nn.MultiheadAttention."""

    def __init__(self, width: int, heads: int, *, own: bool) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.norm2 = nn.LayerNorm(width)
        self.own = own
        self.attn: nn.Module = Attention(width, heads) if own else nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + (self.attn(y) if self.own else self.attn(y, y, y, need_weights=False)[0])
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A vision transformer: a class token repeated for each image of the batch."""

    def __init__(self, width: int = 8, *, own: bool = True) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width))
        self.place = nn.Parameter(torch.randn(1, 5, width))
        self.block = Encoder(width, 2, own=own)
        self.head = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        y = self.patch(x).flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.shape[0], -1, -1), y], 1) + self.place
        return self.head(self.block(y)[:, 0])


class Shuffle(nn.Module):
    """Channels divided, changed, joined and shuffled."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.other = nn.Conv2d(4, 4, 3, padding=1, groups=4)

    def forward(self, x: Tensor) -> Tensor:
        kept, changed = self.stem(x).chunk(2, 1)
        y = torch.cat([kept, self.other(changed)], 1)
        n, c, h, w = y.shape
        return y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w).amax((2, 3))


class WritesInPlace(nn.Module):
    """Writes into a view, and into values that were read before."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y[:, 0] = 1.0
        y += 1
        return y.relu_().mul_(2).mean((2, 3))


class TwoInputs(nn.Module):
    """Two inputs (4,), and outputs that are no tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 4)
        self.b = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, None, int]:
        return self.a(x) + self.b(y), None, 3


@torch.fx.wrap
def sorted_by_numpy(x: Tensor) -> Tensor:
    """Nothing that torch.export can follow."""
    return torch.from_numpy(np.sort(x.detach().numpy(), axis=1))


class ByNumpy(nn.Module):
    """Only torch.fx can capture it; it asks for shapes in every way; input (4,)."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 6)
        self.b = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> dict[str, object]:
        y = sorted_by_numpy(self.a(x))
        y = y.view(y.shape[0], -1)
        n, c = y.shape[0], y.size(1)
        z = torch.zeros(y.shape) + y.reshape(n, c)[:, :]
        return {"o": self.b(z), "p": [y, y.mean(1)]}


class Branching(nn.Module):
    """Does one thing or another, depending on data; input (4,)."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if y.sum() > 0:
            return y
        return -y


class HoldsBranching(nn.Module):
    """The module that cannot be captured lies inside; input (4,)."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Branching()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


class OneAtATime(nn.Module):
    """Takes a batch of one alone; input (3, 8, 8)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.linear = nn.Linear(4 * 36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.relu(self.conv(x)).view(1, -1))


class Noisy(nn.Module):
    """Gives another answer each time; input (4,)."""

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) + torch.randn_like(x)


TINY: dict[str, Callable[[], nn.Module]] = {
    "chain": Chain,
    "residual": Residual,
    "branches": Branches,
    "twice": Twice,
    "transformer": Transformer,
    "multihead": lambda: Transformer(own=False),
    "shuffle": Shuffle,
    "in place": WritesInPlace,
}


def make(factory: Callable[[], nn.Module]) -> nn.Module:
    """The network in eval mode, the same each time, with batch norms that change something."""
    torch.manual_seed(0)
    net = factory()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            nn.init.uniform_(module.running_mean, -0.5, 0.5)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return net.eval()


def scaled(pixels: np.ndarray) -> Tensor:
    """What PREPROCESS makes of pictures (N, H, W, 3) of uint8: (N, 3, H, W)."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255
    return (x - torch.tensor(PREPROCESS.mean)[:, None, None]) / torch.tensor(PREPROCESS.std)[:, None, None]


def pictures(count: int, *, seed: int = 1) -> Tensor:
    """Input for the tiny networks, (count, 3, 16, 16)."""
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(seed))

# An own model in a file of its own, as a user has one.
OWN_DIGITS = '''
"""A small network whose classifier is fitted to the digits by least squares: random features, no training loop."""
import numpy as np
import torch
from torch import nn
from coinfer.data import load_source


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.conv2 = nn.Conv2d(16, 32, 3, padding=1, stride=2)
        self.classifier = nn.Linear(32 * 16, 10)

    def features(self, x):
        x = torch.relu(self.norm(self.conv1(x)))
        return torch.relu(self.conv2(x)).flatten(1)

    def forward(self, x):
        return self.classifier(self.features(x))


def factory():
    torch.manual_seed(0)
    net = Net().eval()
    train = load_source("digits").images("train")
    x = torch.from_numpy(train.pixels).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        f = net.features(x).double()
        a = torch.cat([f, torch.ones(len(f), 1)], 1)
        target = torch.nn.functional.one_hot(torch.from_numpy(train.labels), 10).double()
        solved = torch.linalg.solve(a.T @ a + 1e-1 * torch.eye(a.shape[1], dtype=torch.double), a.T @ target)
        net.classifier.weight.copy_(solved[:-1].T)
        net.classifier.bias.copy_(solved[-1])
    return net
'''
