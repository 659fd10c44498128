"""What this machine trains on, and what it computes fastest with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, at half the speed of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16"))


@torch.no_grad()
def layout_of(model: nn.Module, inputs: Tensor) -> torch.memory_format:
    """channels_last, unless the model views what its convolutions made, which takes the other layout alone."""
    if inputs.ndim != 4:
        return torch.contiguous_format
    was_training = model.training
    try:
        model.eval()(inputs.to(memory_format=torch.channels_last))
    except RuntimeError:
        return torch.contiguous_format
    finally:
        model.train(was_training)
    return torch.channels_last
