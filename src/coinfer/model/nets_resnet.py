"""Residual networks: of He et al. for CIFAR and for 224 x 224, and the embedded default's.

One noun, `BasicBlock`, with three kinds of shortcut:

    x ──conv1─bn1─relu──conv2─bn2──(+)──relu──>
    └────────────shortcut───────────┘            identity where shape stays, else
                                                 pad (option A) or project (option B: 1x1 conv, bn)

Parameter names are those that published weights use: `linear` and `shortcut` for CIFAR,
`fc` and `downsample` (torchvision's) for 224 x 224.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv3x3(in_channels: int, out_channels: int, *, stride: int = 1) -> nn.Conv2d:
    """A 3 x 3 convolution that keeps the size (at stride 1), without bias."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class PadShortcut(nn.Module):
    """Option A of He et al., 2016 (arXiv:1512.03385, section 3.3): every second pixel, zero channels around.

    (N, C, H, W) -> (N, 2C, H/2, W/2), without parameters.  `take_out` removes channels of either side: `selection`
    (C', C, 1, 1) is then 1 where an input channel goes on as an output channel.
    """

    selection: Tensor | None

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.padding = (out_channels - in_channels) // 2
        self.register_buffer("selection", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Subsample and pad."""
        x = x[:, :, ::2, ::2]
        if self.selection is not None:
            return F.conv2d(x, self.selection)
        return F.pad(x, (0, 0, 0, 0, self.padding, self.padding))

    def take_out(self, places: Sequence[int], *, axis: int) -> None:
        """Remove output (`axis` 0) or input channels (1)."""
        selection = self._selected()
        gone = set(places)
        stay = [place for place in range(selection.shape[axis]) if place not in gone]
        self.selection = selection.index_select(axis, torch.tensor(stay, device=selection.device))
        self.out_channels, self.in_channels = self.selection.shape[:2]

    def mask(self, places: Tensor) -> None:
        """Make output channels zero."""
        self.selection = self._selected()
        self.selection[places] = 0

    def _selected(self) -> Tensor:
        if self.selection is not None:
            return self.selection.clone()
        return F.pad(torch.eye(self.in_channels)[:, :, None, None], (0, 0, 0, 0, 0, 0, self.padding, self.padding))


def projection(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Option B of He et al., 2016: a 1 x 1 convolution and batch norm."""
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride, bias=False), nn.BatchNorm2d(out_channels))


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut: (N, C, H, W) -> (N, C', H/stride, W/stride)."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int = 1, option: Literal["A", "B"] = "B"
    ) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride=stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Sequential()
        if stride != 1 or in_channels != out_channels:
            make = PadShortcut(in_channels, out_channels) if option == "A" else None
            self.shortcut = make or projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


def basic_stage(
    in_channels: int, out_channels: int, num_blocks: int, *, stride: int, option: Literal["A", "B"]
) -> nn.Sequential:
    """Blocks of one width; the first one changes size and width."""
    blocks = [BasicBlock(in_channels, out_channels, stride=stride, option=option)]
    blocks += [BasicBlock(out_channels, out_channels, option=option) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class CifarResNet(nn.Module):
    """He et al., 2016, section 4.2: 6n + 2 layers on 32 x 32 pictures, widths 16, 32, 64, option-A shortcuts.

    (N, 3, 32, 32) -> (N, num_classes).
    """

    def __init__(self, depth: int, *, num_classes: int = 10) -> None:
        super().__init__()
        num_blocks = (depth - 2) // 6
        self.conv1 = conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = basic_stage(16, 16, num_blocks, stride=1, option="A")
        self.layer2 = basic_stage(16, 32, num_blocks, stride=2, option="A")
        self.layer3 = basic_stage(32, 64, num_blocks, stride=2, option="A")
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class SceneResNet(nn.Module):
    """The embedded default's network: a strided stem and three stages of two blocks, 16, 32, 64 wide.

    (N, 3, 64, 64) -> (N, 10); 27 million multiply-accumulates, 0.7 MB of weights.  The last map is
    pooled by maximum, since one small digit must win against a picture full of other things.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, 16, stride=2)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = basic_stage(16, 16, 2, stride=1, option="B")
        self.layer2 = basic_stage(16, 32, 2, stride=2, option="B")
        self.layer3 = basic_stage(32, 64, 2, stride=2, option="B")
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.amax((2, 3)))  # type: ignore[no-any-return]


class CifarResNet18(nn.Module):
    """ResNet-18 with a 3 x 3 stem and no max-pool: (N, 3, 32, 32) -> (N, num_classes).

    `width` 64 is the usual network, 32 the half-width one (BBNet's, Zhou et al., 2021).
    """

    def __init__(self, *, width: int = 64, num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = conv3x3(3, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = basic_stage(width, width, 2, stride=1, option="B")
        self.layer2 = basic_stage(width, 2 * width, 2, stride=2, option="B")
        self.layer3 = basic_stage(2 * width, 4 * width, 2, stride=2, option="B")
        self.layer4 = basic_stage(4 * width, 8 * width, 2, stride=2, option="B")
        self.linear = nn.Linear(8 * width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.linear(x.mean((2, 3)))  # type: ignore[no-any-return]


class TorchvisionBasicBlock(nn.Module):
    """`BasicBlock` under torchvision's names (`downsample` exists only where the shape changes)."""

    expansion = 1

    def __init__(self, in_channels: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = conv3x3(in_channels, width, stride=stride)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width)
        self.bn2 = nn.BatchNorm2d(width)
        is_same = stride == 1 and in_channels == width
        self.downsample = None if is_same else projection(in_channels, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class BottleneckBlock(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions (He et al., 2016, figure 5), strided at the 3 x 3 (torchvision)."""

    expansion = 4

    def __init__(self, in_channels: int, width: int, *, stride: int = 1) -> None:
        super().__init__()
        out_channels = width * self.expansion
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride=stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out_channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_channels)
        is_same = stride == 1 and in_channels == out_channels
        self.downsample = None if is_same else projection(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Residual plus shortcut, rectified."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class ImageResNet(nn.Module):
    """ResNet for 224 x 224 under torchvision's names: (N, 3, 224, 224) -> (N, num_classes)."""

    def __init__(
        self,
        block: type[TorchvisionBasicBlock] | type[BottleneckBlock],
        num_blocks: tuple[int, int, int, int],
        *,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        stages = []
        in_channels = 64
        for index, count in enumerate(num_blocks):
            width = 64 * 2**index
            blocks = [block(in_channels, width, stride=1 if index == 0 else 2)]
            in_channels = width * block.expansion
            blocks += [block(in_channels, width) for _ in range(count - 1)]
            stages.append(nn.Sequential(*blocks))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.fc = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.maxpool(F.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3)))  # type: ignore[no-any-return]
