"""A network that coinfer's zoo does not have: two branches side by side, and a gate over channels.

`coinfer inspect shapes_net:make --input 3x48x48` shows its cuts; job.toml builds a bundle of it.
"""

import torch
from torch import Tensor, nn


def convolution(inputs: int, outputs: int, size: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, size, stride, padding=size // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


class TwoBranches(nn.Module):
    """A wide and a narrow convolution of the same input, joined, then weighed channel by channel."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.wide = convolution(inputs, outputs // 2, 3, stride=2)
        self.narrow = convolution(inputs, outputs // 2, 1, stride=2)
        self.gate = nn.Sequential(nn.Conv2d(outputs, outputs // 4, 1), nn.ReLU(), nn.Conv2d(outputs // 4, outputs, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([self.wide(x), self.narrow(x)], dim=1)
        return y * torch.sigmoid(self.gate(y.mean(dim=(2, 3), keepdim=True)))


class ShapesNet(nn.Module):
    """(N, 3, H, W) to (N, 4): circle, cross, square, triangle."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = convolution(3, 16, 3)
        self.body = nn.Sequential(TwoBranches(16, 32), TwoBranches(32, 48), TwoBranches(48, 64))
        self.classifier = nn.Linear(64, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.body(self.stem(x)).mean(dim=(2, 3)))


def make() -> nn.Module:
    """What job.toml names; its weights come from the job's `weights`."""
    return ShapesNet()
