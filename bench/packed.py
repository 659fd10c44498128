"""Trained networks kept at a byte a weight: eight bits, and a scale for each output channel.

The network that is pruned and measured is the one that `unpack` gives, everywhere the same to the last bit: a file that
names its weights fits it wherever it is unpacked.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

SCALE = ".scale"


def pack(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of two and more dimensions as int8 with NAME.scale (out, 1, ...) beside them; the rest as it is."""
    packed: dict[str, Tensor] = {}
    for name, value in state.items():
        if value.ndim < 2:
            packed[name] = value
            continue
        largest = value.abs().amax(dim=tuple(range(1, value.ndim)), keepdim=True)
        scale = torch.where(largest > 0, largest / 127, torch.ones_like(largest))
        packed[name] = torch.round(value / scale).to(torch.int8)
        packed[name + SCALE] = scale
    return packed


def unpack(packed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state whose weights are the packed ones times their scales."""
    return {
        name: value.float() * packed[name + SCALE] if name + SCALE in packed else value
        for name, value in packed.items()
        if not name.endswith(SCALE)
    }
