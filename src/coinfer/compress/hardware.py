"""What this machine trains on, and what it computes fastest with."""

from __future__ import annotations

import ctypes
import platform
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

# Of glibc's malloc.h: above how many free bytes the heap shrinks (-1: never), how many blocks lie outside it.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def training_device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 in hardware; elsewhere it is emulated, at half the speed of float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("arm_bf16"))


@cache
def keep_freed_memory() -> bool:
    """Let the allocator keep what it frees, from now on; False where it is not glibc's.

    glibc returns large blocks to the system as they are freed, and every training step of a network asks for the same
    ones again: a fifth of a step of VGG-16 on two cores went into zeroed pages (docs/design-notes.md).
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return all(mallopt(parameter, value) == 1 for parameter, value in ((_TRIM_THRESHOLD, -1), (_MMAP_MAX, 0)))


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
