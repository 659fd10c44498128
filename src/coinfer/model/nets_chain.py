"""Networks that are, or nearly are, chains: VGG-16 with batch norm for CIFAR, MobileNetV2."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

_VGG16 = (64, 64, 0, 128, 128, 0, 256, 256, 256, 0, 512, 512, 512, 0, 512, 512, 512, 0)


class CifarVGG16(nn.Module):
    """VGG-16 (Simonyan and Zisserman, 2015) with batch norm and one linear classifier, for 32 x 32 pictures.

    (N, 3, 32, 32) -> (N, num_classes).  Convolutions have no bias.
    """

    def __init__(self, *, num_classes: int = 10) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        in_channels = 3
        for width in _VGG16:  # 0 stands for a max-pool
            if width == 0:
                layers.append(nn.MaxPool2d(2))
                continue
            conv = nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            in_channels = width
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(in_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.classifier(self.features(x).flatten(1))  # type: ignore[no-any-return]


class SameConv2d(nn.Conv2d):
    """A 3 x 3 convolution with TensorFlow's SAME padding: at stride 2 one column right, one row below.

    For inputs of even height and width, as all of MobileNetV2's strided layers have at 224 x 224.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Pad, then convolve."""
        if self.stride[0] == 2:
            x = F.pad(x, (0, 1, 0, 1))
        return super().forward(x)


def _conv(
    in_channels: int, out_channels: int, size: int, *, stride: int = 1, groups: int = 1, is_tensorflow: bool
) -> nn.Module:
    """One convolution: with its bias (batch norm folded in), or followed by batch norm."""
    if is_tensorflow:
        padding = size // 2 if stride == 1 else 0
        return SameConv2d(in_channels, out_channels, size, stride, padding, groups=groups)
    conv = nn.Conv2d(in_channels, out_channels, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class InvertedResidual(nn.Module):
    """Expand by 1 x 1, filter by 3 x 3 per channel, project by 1 x 1 unrectified; add where shapes agree."""

    def __init__(
        self, in_channels: int, out_channels: int, *, stride: int, expansion: int, is_tensorflow: bool
    ) -> None:
        super().__init__()
        width = in_channels * expansion
        self.expand = _conv(in_channels, width, 1, is_tensorflow=is_tensorflow) if expansion > 1 else None
        self.dw = _conv(width, width, 3, stride=stride, groups=width, is_tensorflow=is_tensorflow)
        self.project = _conv(width, out_channels, 1, is_tensorflow=is_tensorflow)
        self.is_residual = stride == 1 and in_channels == out_channels

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) -> (N, C', H/stride, W/stride)."""
        x_wide = x if self.expand is None else F.relu6(self.expand(x))
        y: Tensor = self.project(F.relu6(self.dw(x_wide)))
        return x + y if self.is_residual else y


class MobileNetV2(nn.Module):
    """Sandler et al., 2018 (arXiv:1801.04381, table 2), width 1.0: (N, 3, 224, 224) -> (N, num_classes).

    `is_tensorflow`: TensorFlow's SAME padding, and batch norms folded into biases, as weights that come from
    a TensorFlow Lite file need it.  The classifier is a 1 x 1 convolution either way.
    """

    def __init__(self, *, num_classes: int = 1000, is_tensorflow: bool = False) -> None:
        super().__init__()
        self.stem = _conv(3, 32, 3, stride=2, is_tensorflow=is_tensorflow)
        blocks = []
        in_channels = 32
        # Table 2's t, c, n, s: expansion, width, blocks, stride of the first.
        for expansion, width, count, stride in (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        ):
            for index in range(count):
                step = stride if index == 0 else 1
                blocks.append(
                    InvertedResidual(in_channels, width, stride=step, expansion=expansion, is_tensorflow=is_tensorflow)
                )
                in_channels = width
        self.blocks = nn.Sequential(*blocks)
        self.head = _conv(in_channels, 1280, 1, is_tensorflow=is_tensorflow)
        self.fc = nn.Conv2d(1280, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        x = self.blocks(F.relu6(self.stem(x)))
        x = F.relu6(self.head(x)).mean((2, 3), keepdim=True)
        return self.fc(x).flatten(1)  # type: ignore[no-any-return]
