"""Networks whose values branch widely: SqueezeNet, a GoogLeNet-like one, a small vision transformer.

They are here because cuts through them carry several tensors, or tokens in place of maps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm_relu(in_channels: int, out_channels: int, size: int) -> nn.Sequential:
    """Convolution that keeps the size, batch norm, rectifier."""
    conv = nn.Conv2d(in_channels, out_channels, size, padding=size // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels), nn.ReLU())


class Inception(nn.Module):
    """Four parallel branches joined by channel (Szegedy et al., 2015, figure 2b); the 5 x 5 is two 3 x 3.

    `widths`: outputs of the 1 x 1, the 3 x 3, the double 3 x 3 and the pooling branch.
    """

    def __init__(self, in_channels: int, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        one, three, five, pool = widths
        self.one = conv_norm_relu(in_channels, one, 1)
        self.three = nn.Sequential(conv_norm_relu(in_channels, three // 2, 1), conv_norm_relu(three // 2, three, 3))
        self.five = nn.Sequential(
            conv_norm_relu(in_channels, five // 2, 1),
            conv_norm_relu(five // 2, five, 3),
            conv_norm_relu(five, five, 3),
        )
        self.pool = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv_norm_relu(in_channels, pool, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, sum(widths), H, W)."""
        return torch.cat((self.one(x), self.three(x), self.five(x), self.pool(x)), 1)


class CifarGoogLeNet(nn.Module):
    """A GoogLeNet-like network of seven inception modules: (N, 3, 32, 32) -> (N, num_classes)."""

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = conv_norm_relu(3, 48, 3)
        self.inception3a = Inception(48, (16, 32, 16, 16))
        self.inception3b = Inception(80, (24, 48, 24, 16))
        self.pool3 = nn.MaxPool2d(2)
        self.inception4a = Inception(112, (32, 64, 32, 32))
        self.inception4b = Inception(160, (32, 64, 32, 32))
        self.inception4c = Inception(160, (48, 96, 32, 32))
        self.pool4 = nn.MaxPool2d(2)
        self.inception5a = Inception(208, (64, 128, 48, 48))
        self.inception5b = Inception(288, (64, 128, 48, 48))
        self.linear = nn.Linear(288, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.pool3(self.inception3b(self.inception3a(self.stem(x))))
        x = self.pool4(self.inception4c(self.inception4b(self.inception4a(x))))
        x = self.inception5b(self.inception5a(x))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class Fire(nn.Module):
    """Squeeze by 1 x 1, then expand by 1 x 1 and by 3 x 3 side by side (torchvision's names)."""

    def __init__(self, in_channels: int, squeeze: int, expand: int) -> None:
        super().__init__()
        self.squeeze = nn.Conv2d(in_channels, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, 2 * expand, H, W)."""
        x = F.relu(self.squeeze(x))
        return torch.cat((F.relu(self.expand1x1(x)), F.relu(self.expand3x3(x))), 1)


class SqueezeNet(nn.Module):
    """SqueezeNet 1.1 (Iandola et al., 2016), torchvision's names: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(self, *, num_classes: int = 1000) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 64, 3, stride=2),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(64, 16, 64),
            Fire(128, 16, 64),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(128, 32, 128),
            Fire(256, 32, 128),
            nn.MaxPool2d(3, 2, ceil_mode=True),
            Fire(256, 48, 192),
            Fire(384, 48, 192),
            Fire(384, 64, 256),
            Fire(512, 64, 256),
        )
        self.classifier = nn.Sequential(nn.Dropout(0.5), nn.Conv2d(512, num_classes, 1), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x)).mean((2, 3))  # type: ignore[no-any-return]


class MultiheadAttention(nn.Module):
    """Self-attention of Vaswani et al., 2017 (arXiv:1706.03762, section 3.2): (N, T, C) -> (N, T, C)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Each token as a mixture of all tokens' values."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (3, N, heads, T, C/heads)
        query, key, value = qkv.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value)
        return self.out(y.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a shortcut: (N, T, C) -> (N, T, C)."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = MultiheadAttention(width, num_heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """Pre-norm residual block."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))  # type: ignore[no-any-return]


class VisionTransformer(nn.Module):
    """A small ViT (Dosovitskiy et al., 2021, arXiv:2010.11929) for 32 x 32: patches of 4, a class token.

    (N, 3, 32, 32) -> (N, num_classes).
    """

    def __init__(self, *, width: int = 128, depth: int = 6, num_heads: int = 4, num_classes: int = 10) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 65, width))
        self.blocks = nn.Sequential(*(TransformerBlock(width, num_heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2)
        tokens = torch.cat((self.class_token.expand(tokens.shape[0], -1, -1), tokens), 1) + self.positions
        tokens = self.norm(self.blocks(tokens))
        return self.linear(tokens[:, 0])  # type: ignore[no-any-return]
