"""Trainings with 3 x 3 convolutions by Winograd's minimal filtering: faster on a CPU with AVX-512 (VGG-16 twice).

    python -m bench.winograd bench.pruning train vgg16      any bench and its words
    python -m bench.winograd errors                         against torch's own convolutions

Needs a C++ compiler and ninja (`pip install ninja`).  Products are of the type that torch's own would be of: in float32
the results differ by 3e-6, as sums in another order do; in bfloat16 by 3 % (0.3 % for torch's own), which a training
does not feel (docs/design-notes.md).  Networks are measured and evaluated with torch's own convolutions.
"""

from __future__ import annotations

import runpy
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import cpp_extension

SOURCE = Path(__file__).with_suffix(".cpp")
LANES = 16
# Of tiles that make 4 x 4 outputs; smaller pictures are made of 2 x 2.
TILE = 4
_torchs_own = nn.Conv2d.forward


@cache
def _built() -> Any:
    flags = ["-O3", "-march=native", "-fopenmp", "-ffast-math"]
    return cpp_extension.load("coinfer_winograd", [str(SOURCE)], extra_cflags=flags)


class _Convolution(torch.autograd.Function):
    """x (N, C, H, W) and weight (K, C, 3, 3) to (N, K, H, W), in autocast's type or else in that of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
        pictures = x.permute(0, 2, 3, 1).to(dtype).contiguous()
        lines = weight.permute(0, 2, 3, 1).contiguous()
        made, *kept = _built().forward(pictures, lines, min(x.shape[2:]) < TILE)
        ctx.save_for_backward(*kept)
        ctx.dtype = x.dtype
        return made.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor | None, Tensor]:
        weight, tiles = ctx.saved_tensors
        slope = slopes[0].permute(0, 2, 3, 1).to(weight.dtype).contiguous()
        of_x, of_weight = _built().backward(slope, weight, tiles, ctx.needs_input_grad[0])
        of_x = of_x.permute(0, 3, 1, 2).to(ctx.dtype) if ctx.needs_input_grad[0] else None
        return of_x, of_weight.permute(0, 3, 1, 2)


def _is_for(conv: nn.Conv2d, x: Tensor) -> bool:
    return (
        conv.training
        and x.device.type == "cpu"
        and x.ndim == 4
        and conv.kernel_size == (3, 3)
        and conv.stride == conv.padding == conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
        and conv.in_channels % LANES == conv.out_channels % LANES == 0
    )


def _forward(conv: nn.Conv2d, x: Tensor) -> Tensor:
    if not _is_for(conv, x):
        return _torchs_own(conv, x)
    made: Tensor = _Convolution.apply(x, conv.weight)  # type: ignore[no-untyped-call]
    return made if conv.bias is None else made + conv.bias.to(made.dtype).view(1, -1, 1, 1)


def install() -> None:
    """From now on every convolution that this is for, in training mode, is made so."""
    if not torch.backends.cpu.get_cpu_capability().startswith("AVX512"):
        raise SystemExit(f"bench.winograd needs AVX-512; this is {torch.backends.cpu.get_cpu_capability()}")
    _built()
    nn.Conv2d.forward = _forward  # type: ignore[method-assign]


def errors(size: int, channels: tuple[int, int], *, is_bfloat16: bool) -> tuple[float, float, float]:
    """How far outputs and both gradients are from torch's own in float64, as shares of their norms."""
    torch.manual_seed(0)
    conv = nn.Conv2d(*channels, 3, padding=1)
    x = torch.randn(8, channels[0], size, size).relu()

    def all_of(dtype: torch.dtype, own: Any) -> list[Tensor]:
        module, given = nn.Conv2d(*channels, 3, padding=1, dtype=dtype), x.to(dtype).requires_grad_()
        module.load_state_dict(conv.state_dict())
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_bfloat16 and own is _forward):
            made = own(module, given)
        made.backward(torch.randn(made.shape, generator=torch.Generator().manual_seed(1)).to(made.dtype))
        return [t.double() for t in (made.detach(), given.grad, module.weight.grad) if t is not None]

    exact, found = all_of(torch.float64, _torchs_own), all_of(torch.float32, _forward)
    shares = [float((a - b).norm() / b.norm()) for a, b in zip(found, exact, strict=True)]
    return shares[0], shares[1], shares[2]


def main(words: list[str]) -> None:
    """Compare, or run a bench."""
    if words == ["errors"]:
        for size, channels in ((32, (64, 64)), (8, (256, 128)), (7, (32, 48)), (2, (512, 512))):
            for is_bfloat16 in (False, True):
                found = errors(size, channels, is_bfloat16=is_bfloat16)
                what = "bfloat16" if is_bfloat16 else "float32"
                print(f"{size} x {size}, {channels} channels, {what}: " + ", ".join(f"{share:.1e}" for share in found))
        return
    if not words or not words[0].startswith("bench."):
        raise SystemExit("usage: python -m bench.winograd errors, or a bench and its words: bench.pruning train vgg16")
    install()
    sys.argv = words
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
