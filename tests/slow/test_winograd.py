"""Convolutions by Winograd's filtering against torch's own in float64."""

from __future__ import annotations

import shutil

import pytest
import torch
from bench import winograd

pytestmark = pytest.mark.slow


@pytest.mark.skipif(
    not torch.backends.cpu.get_cpu_capability().startswith("AVX512") or not shutil.which("ninja"),
    reason="needs AVX-512 and ninja",
)
@pytest.mark.parametrize("size", [2, 3, 7, 8])
def test_winograd_gives_outputs_and_gradients_of_the_plain_convolution(size: int) -> None:
    assert max(winograd.errors(size, (48, 32), is_bfloat16=False)) < 1e-5
    assert max(winograd.errors(size, (48, 32), is_bfloat16=True)) < 0.05
