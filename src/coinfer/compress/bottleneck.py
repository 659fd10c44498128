"""A trained pair around a cut, so that tens of bytes cross where kilobytes did.

    picture --head--> features (C, H, W) --reduce, prepare--> (c', H/s, W/s) --quantise--> symbols     device
    answer <--tail-- features <--restore-- recovered <--recover-- values <--look up-- symbols           edge

`reduce` is one convolution of size and stride s, C -> c' (on tokens (T, C) and vectors (C) a linear map); `restore`
is its mirror.  With s = 1 this is the butterfly unit (Eshratifar et al., ISQED 2019) and BBNet's feature compression
layer (Zhou et al., Sensors 2021); with s > 1 the unit of BottleNet (Eshratifar et al., ISLPED 2019), its two
convolutions in one.
Nothing follows the convolution: a norm would fold into it, and the quantiser's ranges are learned and signed.

Three things go beyond them, all optional.  `prepare` puts residual blocks behind the reduction and before its mirror,
where the map is small: a transform that is not linear costs little there.  `refine` puts some behind the restoration,
where compute is cheap.  A light head (`encoder`) takes the place of all layers before the cut on a weak device, as in
Entropic Student (Matsubara et al., WACV 2022); `reduce` is then a 1 x 1 convolution behind it.

One set of weights serves several rates: each has a step for every channel and a prior of its own, both learned.
"""

from __future__ import annotations

from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CutError, ModelError
from ..plan import TensorSpec, Value
from .quantiser import JpegQuantiser, Quantiser

# Values of a patch up to which its principal components are exact: the covariance of more takes gigabytes and minutes.
_EXACT_COMPONENTS = 4096
Layer = TypeVar("Layer", nn.Conv2d, nn.Linear)


class UnitSpec(Value, frozen=True, kw_only=True):
    """The shape of a unit: `width` channels cross (c'), at 1 / `stride` of height and width, `bits` a symbol.

    `gains` are the first factors of the quantiser's steps, one for each rate that the unit serves, finest first.
    `prepare` residual blocks follow the reduction, and as many go before the restoration; `refine` of them follow the
    restoration; `is_rectified`: so does a ReLU, for features without negative values.  `head_width`: channels of a
    light head at the code's size (0: the network's own layers).  `jpeg`: 8-bit symbols go through JPEG of that quality
    instead of an entropy coder, as in BottleNet, for comparison.

    Raises:
        ModelError: a number is out of range.
    """

    width: int
    stride: int = 1
    bits: int = 8
    gains: tuple[float, ...] = (1.0,)
    prepare: int = 0
    refine: int = 0
    is_rectified: bool = False
    head_width: int = 0
    jpeg: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1 or self.stride < 1:
            raise ModelError(f"a unit's width and stride must be at least 1, got {self.width} and {self.stride}")
        if min(self.prepare, self.refine, self.head_width) < 0:
            given = f"{self.prepare}, {self.refine}, {self.head_width}"
            raise ModelError(f"a unit's blocks and head width must be 0 or more, got {given}")
        if not 1 <= self.bits <= 8:
            raise ModelError(f"a unit's bits must be 1 to 8, got {self.bits}")
        if self.jpeg is not None and (not 1 <= self.jpeg <= 100 or self.bits != 8 or len(self.gains) != 1):
            raise ModelError(f"a unit through JPEG has a quality of 1 to 100, 8 bits and one rate, got {self}")
        if not self.gains or min(self.gains) <= 0 or list(self.gains) != sorted(set(self.gains)):
            raise ModelError(f"a unit's gains must be positive and rise, got {list(self.gains)}")

    @property
    def name(self) -> str:
        """Short form, such as `c8s2b4`; with four rates `c8s2b4v4`, with a light head `c8s2b4v4h32`.

        >>> UnitSpec(width=8, stride=2, bits=4).name
        'c8s2b4'
        """
        rates = f"v{len(self.gains)}" if len(self.gains) > 1 else ""
        prepare = f"p{self.prepare}" if self.prepare else ""
        refine = f"r{self.refine}" if self.refine else ""
        light = f"h{self.head_width}" if self.head_width else ""
        jpeg = f"j{self.jpeg}" if self.jpeg is not None else ""
        return f"c{self.width}s{self.stride}b{self.bits}{rates}{prepare}{refine}{light}{jpeg}"


class Unit(nn.Module):
    """Reduction, quantiser and restoration for one crossing tensor (C, H, W), (T, C) or (C).

    `given` is what the reduction sees: the crossing tensor, or the output of a light head at the size of the code.

    Raises:
        CutError: the tensor is none of these, or the stride does not divide its sides.
        ModelError: more channels than the tensor has values for.
    """

    def __init__(self, crossing: TensorSpec, spec: UnitSpec, *, given: TensorSpec | None = None) -> None:
        super().__init__()
        check_unit(crossing, spec)
        self.crossing, self.spec = crossing, spec
        if len(crossing.shape) == 3:
            channels, size = crossing.shape[0], spec.stride
            seen, patch = (channels, size) if given is None else (given.shape[0], 1)
            self.reduce: nn.Conv2d | nn.Linear = nn.Conv2d(seen, spec.width, patch, stride=patch)
            back: nn.Module = nn.ConvTranspose2d(spec.width, channels, size, stride=size)
            blocks: list[nn.Module] = [ResidualBlock(channels) for _ in range(spec.refine)]
            small: type[ResidualBlock | ResidualMap] = ResidualBlock
        else:
            self.reduce = nn.Linear(crossing.shape[-1], spec.width)
            back = nn.Linear(spec.width, crossing.shape[-1])
            blocks = [ResidualMap(crossing.shape[-1]) for _ in range(spec.refine)]
            small = ResidualMap
        self.prepare = nn.Sequential(*(small(spec.width) for _ in range(spec.prepare)))
        self.recover = nn.Sequential(*(small(spec.width) for _ in range(spec.prepare)))
        self.restore = nn.Sequential(back, *blocks, *([nn.ReLU()] if spec.is_rectified else []))
        if spec.jpeg is None:
            self.quantiser = Quantiser(spec.width, spec.bits, spec.gains)
        else:
            code = TensorSpec(name="code", shape=(spec.width, *(side // spec.stride for side in crossing.shape[1:])))
            self.quantiser = JpegQuantiser(code, spec.jpeg)

    @property
    def back(self) -> nn.ConvTranspose2d | nn.Linear:
        """The mirror of the reduction, first of what restores."""
        first = self.restore[0]
        assert isinstance(first, nn.ConvTranspose2d | nn.Linear)
        return first

    def forward(self, features: Tensor, rate: int = 0) -> tuple[Tensor, Tensor]:
        """Restored features, like `features`, and the bits of each sample (N,)."""
        values, bits = self.quantiser(self._swapped(self.code(features)), rate)
        restored: Tensor = self.restore(self.recover(self._swapped(values).to(features.dtype)))
        return restored, bits

    def drawn_rate(self) -> int:
        """The rate that a batch of training is for."""
        return int(torch.randint(len(self.spec.gains), ()))

    def code(self, features: Tensor) -> Tensor:
        """What is quantised of `features`: (N, c', H/s, W/s), (N, T, c') or (N, c')."""
        code: Tensor = self.prepare(self.reduce(features))
        return code

    @torch.no_grad()
    def start_from(self, features: Tensor) -> None:
        """Begin with the best linear unit for `features` (N, *crossing): their principal components.

        At full width nothing but the quantising is lost.
        """
        patches = self._patches(features)
        mean = patches.mean(0)
        basis = _components(patches - mean, self.spec.width)
        lost = mean - basis.T @ (basis @ mean)
        back = self.back
        _bias(self.reduce).zero_()
        if isinstance(self.reduce, nn.Conv2d):
            kernel = basis.view(self.spec.width, self.crossing.shape[0], self.spec.stride, self.spec.stride)
            self.reduce.weight.copy_(kernel)
            back.weight.copy_(kernel)
            _bias(back).copy_(lost.view(self.crossing.shape[0], -1).mean(1))
        else:
            self.reduce.weight.copy_(basis)
            back.weight.copy_(basis.T)
            _bias(back).copy_(lost)
        self.start_grid_from(features)

    @torch.no_grad()
    def start_from_wider(self, wider: Unit, features: Tensor) -> None:
        """Begin with a trained unit of more channels: with the principal components of what it sends of `features`.

        What follows the restoration is taken over as it is; the grid is new.
        """
        code = self._swapped(wider.reduce(features)).transpose(0, 1).flatten(1).T
        mean = code.mean(0)
        basis = _components(code - mean, self.spec.width)
        lost = mean - basis.T @ (basis @ mean)
        back, wide_back = self.back, wider.back
        self.reduce.weight.copy_(torch.tensordot(basis, wider.reduce.weight, dims=1))
        _bias(self.reduce).copy_(basis @ _bias(wider.reduce))
        if isinstance(wide_back, nn.ConvTranspose2d):
            back.weight.copy_(torch.tensordot(basis, wide_back.weight, dims=1))
            _bias(back).copy_(_bias(wide_back) + torch.tensordot(lost, wide_back.weight, dims=1).mean((1, 2)))
        else:
            back.weight.copy_(wide_back.weight @ basis.T)
            _bias(back).copy_(_bias(wide_back) + wide_back.weight @ lost)
        for mine, theirs in zip(list(self.restore)[1:], list(wider.restore)[1:], strict=True):
            mine.load_state_dict(theirs.state_dict())
        self.start_grid_from(features)

    @torch.no_grad()
    def start_grid_from(self, features: Tensor) -> None:
        """Grid and priors for what the reduction makes of `features` now."""
        self.quantiser.start_from(self._swapped(self.code(features)))

    def _patches(self, features: Tensor) -> Tensor:
        """(M, K) what each output position of the reduction sees, K values of it."""
        if features.ndim < 4:
            return features.reshape(-1, features.shape[-1])
        patches = F.unfold(features, self.spec.stride, stride=self.spec.stride)
        return patches.transpose(1, 2).flatten(0, 1)

    def _swapped(self, values: Tensor) -> Tensor:
        """Tokens (N, T, c') as (N, c', T) and back; maps and vectors stay as they are."""
        return values.transpose(1, 2) if values.ndim == 3 else values


class ResidualBlock(nn.Module):
    """x + two 3 x 3 convolutions of x; it begins as x alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1)
        self.second = _zeroed(nn.Conv2d(channels, channels, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        """Like `x`, (N, C, H, W)."""
        change: Tensor = self.second(F.relu(self.first(x)))
        return x + change


class ResidualMap(nn.Module):
    """x + two linear maps of each token of x; it begins as x alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Linear(channels, channels)
        self.second = _zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Like `x`, (N, T, C)."""
        change: Tensor = self.second(F.relu(self.first(x)))
        return x + change


def _components(centred: Tensor, count: int) -> Tensor:
    """(count, K) principal components of (M, K), the largest first; those of large K found at random (Halko, 2011)."""
    vectors: Tensor
    if centred.shape[1] <= _EXACT_COMPONENTS or count > min(centred.shape) // 2:
        vectors = torch.linalg.eigh(centred.T @ centred / len(centred))[1].flip(1)[:, :count]
    else:
        vectors = torch.pca_lowrank(centred, count, center=False)[2]
    return vectors.T.contiguous()


def _bias(layer: nn.Conv2d | nn.ConvTranspose2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _zeroed(layer: Layer) -> Layer:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(_bias(layer))
    return layer


def check_unit(crossing: TensorSpec, spec: UnitSpec) -> None:
    """Refuse a unit that does not fit.

    Raises:
        CutError: the tensor is neither a map nor tokens nor a vector, or the stride does not divide its sides.
        ModelError: more channels than the tensor has values for.
    """
    name, shape = crossing.name, crossing.shape
    if len(shape) not in (1, 2, 3) or crossing.dtype != "float32":
        allowed = "float32 maps (C, H, W), tokens (T, C) or vectors (C)"
        raise CutError(f'a unit needs {allowed}, "{name}" is {crossing.dtype} {shape}')
    if len(shape) < 3 and (spec.stride != 1 or spec.head_width or spec.jpeg is not None):
        unit = f'("{name}" {shape}, unit {spec.name})'
        raise CutError(f"a unit on tokens or a vector has stride 1, no light head and no JPEG {unit}")
    if len(shape) == 3 and (shape[1] % spec.stride or shape[2] % spec.stride):
        raise CutError(f'stride {spec.stride} does not divide {shape[1]} x {shape[2]} ("{name}")')
    most = shape[0] * spec.stride**2 if len(shape) == 3 else shape[-1]
    if spec.width > most:
        raise ModelError(f'a unit of stride {spec.stride} has at most {most} channels, got {spec.width} ("{name}")')
