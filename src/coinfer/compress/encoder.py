"""A light head: a small network that takes the place of all layers before a cut, down to the size of the code.

    picture (3, H, W) --halve--> w/2 channels --halve--> w channels --block--> --block--> w channels

Height and width halve by 4 x 4 convolutions of stride 2 whose channels double, and the compute goes where the map is
small: two residual blocks of two 3 x 3 convolutions (He et al., 2016) at the size of the code.  On a slow core a layer
costs a fixed time beside its multiply-accumulates, and those of a large map of few channels run at a fraction of the
speed.  `width_for` finds the widest head within a budget of multiply-accumulates.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..plan import TensorSpec

# Residual blocks at the code's size.
BLOCKS = 2
_STEP = 8


class LightHead(nn.Module):
    """From a picture (C, H, W) to a map of the code's size with `width` channels, half as many at each size before.

    Raises:
        ModelError: the sides of `code` (height, width) are not those of the picture over one power of two.
    """

    def __init__(self, picture: tuple[int, ...], code: tuple[int, int], width: int) -> None:
        super().__init__()
        channels = [picture[0], *_channels(_halvings(picture, code), width)]
        is_halved = len(channels) > 1
        layers = [_convolution(given, made, 4, 2) for given, made in pairwise(channels)]
        if not is_halved:
            layers = [_convolution(picture[0], width, 3, 1)]
        self.layers = nn.Sequential(*layers, *(_Block(width) for _ in range(BLOCKS)))
        self.output = TensorSpec(name="light", shape=(width, *code))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, *output.shape)."""
        result: Tensor = self.layers(x)
        return result


def num_macs(picture: tuple[int, ...], code: tuple[int, int], width: int, *, sent: int = 0) -> int:
    """Multiply-accumulates of a light head and of the reduction to `sent` channels behind it, for one picture.

    >>> num_macs((3, 32, 32), (8, 8), 64)
    11927552
    """
    halvings, area = _halvings(picture, code), code[0] * code[1]
    total = (BLOCKS * 2 * 9 * width + sent) * width * area
    if not halvings:
        return total + 9 * picture[0] * width * area
    channels = [picture[0], *_channels(halvings, width)]
    for k, (given, made) in enumerate(pairwise(channels)):
        total += 16 * given * made * area << 2 * (halvings - 1 - k)
    return total


def width_for(picture: tuple[int, ...], code: tuple[int, int], most_macs: float, *, sent: int = 0) -> int:
    """The widest light head, in steps of 8 channels, that takes at most `most_macs` with the reduction behind it.

    Raises:
        ModelError: not even 8 channels fit.
    """
    width = _STEP
    while num_macs(picture, code, width + _STEP, sent=sent) <= most_macs:
        width += _STEP
    needed = num_macs(picture, code, width, sent=sent)
    if needed > most_macs:
        raise ModelError(f"the smallest light head takes {needed} multiply-accumulates, allowed are {most_macs:.0f}")
    return width


def _halvings(picture: tuple[int, ...], code: tuple[int, int]) -> int:
    sides = picture[1:]
    halvings = max(0, (sides[0] // code[0]).bit_length() - 1)
    if len(picture) != 3 or (code[0] << halvings, code[1] << halvings) != sides:
        raise ModelError(
            f"a light head halves both sides of a picture (C, H, W) some times, {picture} does not give {code} so"
        )
    return halvings


def _channels(halvings: int, width: int) -> list[int]:
    """Channels after each halving, `width` after the last."""
    return [max(_STEP, width >> (halvings - 1 - k)) if k < halvings - 1 else width for k in range(halvings)]


def _convolution(channels: int, width: int, size: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, width, size, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 3, 1)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))
