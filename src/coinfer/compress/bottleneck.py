"""A trained pair around a cut, so that tens of bytes cross where kilobytes did.

    picture --head--> features (C, H, W) --reduce--> (c', H/s, W/s) --quantise--> symbols     device
    answer <--tail-- features <--restore-- values <--look up-- symbols                         edge

`reduce` is one convolution of size and stride s, C -> c' (on tokens (T, C) a linear map); `restore` is its mirror.
With s = 1 this is the butterfly unit (Eshratifar et al., ISQED 2019) and BBNet's feature compression layer (Zhou et
al., Sensors 2021); with s > 1 the unit of BottleNet (Eshratifar et al., ISLPED 2019), its two convolutions in one.
Nothing follows the convolution: a norm would fold into it, and the quantiser's ranges are learned and signed.

Training sees the quantiser with straight-through gradients and a factorised prior whose cost is part of the loss:

    y = clip((z - low) / step, 0, L - 1)      z_hat = low + step * round(y)       for each channel
    bits = sum over elements of -log2 p_channel(round(y)); its slope in y is that between neighbouring symbols

One set of weights serves several rates: rate k multiplies every step by `gains[k]` and has a prior of its own.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CutError, ModelError
from ..model.cut import Cut, split
from ..model.graph import Graph
from ..plan import TensorSpec, Value


class UnitSpec(Value, frozen=True, kw_only=True):
    """The shape of a unit: `width` channels cross (c'), at 1 / `stride` of height and width, `bits` a symbol.

    `gains` are the factors of the quantiser's step, one for each rate that the unit serves, finest first.

    Raises:
        ModelError: a number is out of range.
    """

    width: int
    stride: int = 1
    bits: int = 8
    gains: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        if self.width < 1 or self.stride < 1:
            raise ModelError(f"a unit's width and stride must be at least 1, got {self.width} and {self.stride}")
        if not 1 <= self.bits <= 8:
            raise ModelError(f"a unit's bits must be 1 to 8, got {self.bits}")
        if not self.gains or min(self.gains) <= 0 or list(self.gains) != sorted(set(self.gains)):
            raise ModelError(f"a unit's gains must be positive and rise, got {list(self.gains)}")

    @property
    def name(self) -> str:
        """Short form, such as `c8s2b4`; with four rates `c8s2b4v4`.

        >>> UnitSpec(width=8, stride=2, bits=4).name
        'c8s2b4'
        """
        rates = f"v{len(self.gains)}" if len(self.gains) > 1 else ""
        return f"c{self.width}s{self.stride}b{self.bits}{rates}"


class Quantiser(nn.Module):
    """Values (N, c', ...) to the values of their symbols, with the bits that the symbols cost.

    Symbol s of channel c at rate k stands for centre[c] + gains[k] step[c] (s - L // 2), L = 2^bits: the grid
    is anchored in its middle, so that a coarser rate has the same zero.
    """

    gains: Tensor

    def __init__(self, width: int, spec: UnitSpec) -> None:
        super().__init__()
        self.num_levels = 2**spec.bits
        self.register_buffer("gains", torch.tensor(spec.gains))
        self.centre = nn.Parameter(torch.zeros(width))
        self.log_step = nn.Parameter(torch.zeros(width))
        self.logits = nn.Parameter(torch.zeros(len(spec.gains), width, self.num_levels))

    def grid(self, rate: int) -> tuple[Tensor, Tensor]:
        """`low` and `step` (c',) of one rate."""
        step = self.log_step.exp() * self.gains[rate]
        return self.centre - step * (self.num_levels // 2), step

    def forward(self, values: Tensor, rate: int = 0) -> tuple[Tensor, Tensor]:
        """Restored values, like `values`, and bits (N,); gradients go straight through the rounding."""
        place = self._places(values, rate)
        symbols = place + (place.round() - place).detach()
        low, step = (part.view(-1, *[1] * (values.ndim - 2)) for part in self.grid(rate))
        return low + step * symbols, self._bits(place, symbols.detach(), rate)

    @torch.no_grad()
    def symbols(self, values: Tensor, rate: int = 0) -> Tensor:
        """Symbols, uint8, like `values`."""
        return self._places(values, rate).round().to(torch.uint8)

    @torch.no_grad()
    def start_from(self, values: Tensor) -> None:
        """Grid and priors for `values` (N, c', ...): one step for all channels, from the widest of them.

        The step is that of least error for a normal distribution (Max, 1960) up to 4 bits; above, the range is
        4 standard deviations.
        """
        rows = values.transpose(0, 1).flatten(1)
        self.centre.copy_(rows.mean(1))
        spread = float(rows.std(1).max().clamp_min(1e-6))
        self.log_step.fill_(math.log(_RANGE.get(self.num_levels, 4.0) * 2 * spread / self.num_levels))
        for rate in range(len(self.gains)):
            symbols = self.symbols(values, rate).transpose(0, 1).flatten(1).long()
            for channel, row in enumerate(symbols):
                counts = torch.bincount(row, minlength=self.num_levels) + 0.5
                self.logits[rate, channel].copy_((counts / counts.sum()).log())

    def _places(self, values: Tensor, rate: int) -> Tensor:
        low, step = (part.view(-1, *[1] * (values.ndim - 2)) for part in self.grid(rate))
        return ((values.float() - low) / step).clamp(0, self.num_levels - 1)

    def _bits(self, place: Tensor, symbols: Tensor, rate: int) -> Tensor:
        """(N,) bits: value and the prior's gradient from the symbols, the slope from the places between."""
        cost = -F.log_softmax(self.logits[rate], dim=1) / math.log(2)
        rows = torch.arange(len(cost), device=cost.device).view(-1, *[1] * (place.ndim - 2)) * self.num_levels
        fixed = cost.detach().flatten()
        below = place.detach().floor().clamp(max=self.num_levels - 2).long() + rows
        slope = fixed[below + 1] - fixed[below]
        between = slope * place
        return (cost.flatten()[symbols.long() + rows] + between - between.detach()).flatten(1).sum(1)


# Range of a uniform quantiser of least error for a normal distribution, in standard deviations each way (Max, 1960).
_RANGE = {2: 1.596, 4: 1.991, 8: 2.344, 16: 2.681}


class Unit(nn.Module):
    """Reduction, quantiser and restoration for one crossing tensor (C, H, W) or (T, C).

    Raises:
        CutError: the tensor is neither, or the stride does not divide its sides.
        ModelError: more channels than the tensor has values for.
    """

    def __init__(self, crossing: TensorSpec, spec: UnitSpec) -> None:
        super().__init__()
        _check(crossing, spec)
        self.crossing, self.spec = crossing, spec
        if len(crossing.shape) == 3:
            channels, size = crossing.shape[0], spec.stride
            self.reduce: nn.Conv2d | nn.Linear = nn.Conv2d(channels, spec.width, size, stride=size)
            self.restore: nn.ConvTranspose2d | nn.Linear = nn.ConvTranspose2d(spec.width, channels, size, stride=size)
        else:
            self.reduce = nn.Linear(crossing.shape[-1], spec.width)
            self.restore = nn.Linear(spec.width, crossing.shape[-1])
        self.quantiser = Quantiser(spec.width, spec)

    def forward(self, features: Tensor, rate: int = 0) -> tuple[Tensor, Tensor]:
        """Restored features, like `features`, and the bits of each sample (N,)."""
        values, bits = self.quantiser(self._swapped(self.reduce(features)), rate)
        return self.restore(self._swapped(values).to(features.dtype)), bits

    @torch.no_grad()
    def start_from(self, features: Tensor) -> None:
        """Begin with the best linear unit for `features` (N, *crossing): their principal components.

        At full width nothing but the quantising is lost.
        """
        patches = self._patches(features)
        mean = patches.mean(0)
        centred = patches - mean
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        basis = vectors.flip(1)[:, : self.spec.width].T.contiguous()
        lost = mean - basis.T @ (basis @ mean)
        assert self.reduce.bias is not None and self.restore.bias is not None
        self.reduce.bias.zero_()
        if isinstance(self.reduce, nn.Conv2d):
            kernel = basis.view(self.spec.width, self.crossing.shape[0], self.spec.stride, self.spec.stride)
            self.reduce.weight.copy_(kernel)
            self.restore.weight.copy_(kernel)
            self.restore.bias.copy_(lost.view(self.crossing.shape[0], -1).mean(1))
        else:
            self.reduce.weight.copy_(basis)
            self.restore.weight.copy_(basis.T)
            self.restore.bias.copy_(lost)
        self.quantiser.start_from(self._swapped(self.reduce(features)))

    def _patches(self, features: Tensor) -> Tensor:
        """(M, K) what each output position of the reduction sees, K values of it."""
        if features.ndim == 3:
            return features.flatten(0, 1)
        patches = F.unfold(features, self.spec.stride, stride=self.spec.stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def _swapped(self, values: Tensor) -> Tensor:
        """Tokens (N, T, c') as (N, c', T) and back; maps stay as they are."""
        return values if values.ndim == 4 else values.transpose(1, 2)


def _check(crossing: TensorSpec, spec: UnitSpec) -> None:
    name, shape = crossing.name, crossing.shape
    if len(shape) not in (2, 3) or crossing.dtype != "float32":
        raise CutError(f'a unit needs float32 maps (C, H, W) or tokens (T, C), "{name}" is {crossing.dtype} {shape}')
    if len(shape) == 2 and spec.stride != 1:
        raise CutError(f'a unit on tokens has stride 1, got {spec.stride} ("{name}" {shape})')
    if len(shape) == 3 and (shape[1] % spec.stride or shape[2] % spec.stride):
        raise CutError(f'stride {spec.stride} does not divide {shape[1]} x {shape[2]} ("{name}")')
    most = shape[0] * spec.stride**2 if len(shape) == 3 else shape[1]
    if spec.width > most:
        raise ModelError(f'a unit of stride {spec.stride} has at most {most} channels, got {spec.width} ("{name}")')


class Coded(NamedTuple):
    """What a divided network gives in training: its output, and the bits of each sample (N,)."""

    outputs: Tensor
    bits: Tensor


class Divided(nn.Module):
    """A network with a unit at a cut: head, unit, tail.

    In training `forward` gives Coded; in evaluation the network's own output, from quantised values.
    `rate` is the rate at which it runs.
    """

    def __init__(self, head: nn.Module, unit: Unit, tail: nn.Module) -> None:
        super().__init__()
        self.head, self.unit, self.tail = head, unit, tail
        self.rate = 0

    def forward(self, x: Tensor) -> Coded | Tensor:
        """The network's output for a batch, through the unit."""
        (features,) = self.head(x)
        return self.after(features)

    def after(self, features: Tensor) -> Coded | Tensor:
        """The same from the cut on, for features that were computed before."""
        restored, bits = self.unit(features, self.rate)
        outputs = self.tail(restored)
        return Coded(outputs, bits) if self.training else outputs


def insert_unit(graph: Graph, cut: Cut, spec: UnitSpec) -> Divided:
    """`graph` divided at `cut`, with a unit of `spec` there, in evaluation mode.

    Raises:
        CutError: several tensors cross; names them, and the nearest cut where one crosses alone.
        ModelError: the unit does not fit.
    """
    if len(cut.specs) != 1:
        cuts = graph.cuts()
        place = cuts.index(cut)
        single = [k for k, other in enumerate(cuts) if len(other.specs) == 1]
        near = f'; the nearest with one is "{cuts[min(single, key=lambda k: abs(k - place))].name}"' if single else ""
        names = ", ".join(spec.name for spec in cut.specs)
        raise CutError(f'a unit needs a cut that one tensor crosses, at "{cut.name}" cross {names}{near}')
    head, tail = split(graph, cut)
    return Divided(head, Unit(cut.specs[0], spec), tail).eval()


class Deployable(nn.Module):
    """A divided network without its quantiser: what is exported, and cut behind `reduce`."""

    def __init__(self, divided: Divided) -> None:
        super().__init__()
        self.head, self.reduce = divided.head, divided.unit.reduce
        self.restore, self.tail = divided.unit.restore, divided.tail

    def forward(self, x: Tensor) -> Tensor:
        """The network's output with nothing lost on the way but what the reduction drops."""
        (features,) = self.head(x)
        output: Tensor = self.tail(self.restore(self.reduce(features)))
        return output
