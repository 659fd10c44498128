"""A light head: a small network that takes the place of all layers before a cut, down to the size of the code.

    picture (3, H, W) --stem, stride 2--> w channels --block--> --halve--> 2w --block--> ... --block--> (_, h, w)

A stage is one residual block of two 3 x 3 convolutions (He et al., 2016); between stages height and width halve and
the channels double.  Its compute is chosen, not given: `width_for` finds the widest head within a budget of
multiply-accumulates.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from ..plan import TensorSpec


class LightHead(nn.Module):
    """From a picture (C, H, W) to a map of the code's size; `width` channels at first, doubled at each halving.

    Raises:
        ModelError: the sides of `code` (height, width) are not those of the picture over one power of two.
    """

    def __init__(self, picture: tuple[int, ...], code: tuple[int, int], width: int) -> None:
        super().__init__()
        halvings = _halvings(picture, code)
        layers: list[nn.Module] = [_convolution(picture[0], width, 2 if halvings else 1)]
        for stage in range(1, max(halvings, 1)):
            layers += [_Block(width * 2 ** (stage - 1)), _convolution(width * 2 ** (stage - 1), width * 2**stage, 2)]
        channels = width * 2 ** max(halvings - 1, 0)
        self.layers = nn.Sequential(*layers, _Block(channels))
        self.output = TensorSpec(name="light", shape=(channels, *code))

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) to (N, *output.shape)."""
        result: Tensor = self.layers(x)
        return result


def num_macs(picture: tuple[int, ...], code: tuple[int, int], width: int) -> int:
    """Multiply-accumulates of a light head for one picture, without what follows it.

    >>> num_macs((3, 32, 32), (8, 8), 32)
    10838016
    """
    halvings = _halvings(picture, code)
    area = picture[1] * picture[2] // (4 if halvings else 1)
    total = 9 * picture[0] * width * area
    for stage in range(max(halvings, 1)):
        channels = width * 2**stage
        total += 2 * 9 * channels**2 * area
        if stage + 1 < halvings:
            area //= 4
            total += 9 * channels * 2 * channels * area
    return total


def width_for(picture: tuple[int, ...], code: tuple[int, int], most_macs: float) -> int:
    """The widest light head, in steps of 4 channels, within `most_macs`.

    Raises:
        ModelError: not even 4 channels fit.
    """
    width = 4
    while num_macs(picture, code, width + 4) <= most_macs:
        width += 4
    if num_macs(picture, code, width) > most_macs:
        needed = num_macs(picture, code, width)
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


def _convolution(channels: int, width: int, stride: int) -> nn.Sequential:
    layer = nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU())


class _Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels, 1)
        self.second = nn.Sequential(nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))
