"""A unit's quantiser: values to the values of their symbols, and what the symbols cost, both with gradients.

    y = clip((z - low) / step, 0, L - 1)      z_hat = low + step * round(y)       for each channel
    bits = sum over elements of -log2 p_channel(round(y)); its slope in y is that between neighbouring symbols

Gradients go straight through the rounding (Bengio et al., 2013).  The prior is factorised: a row of shares for each
channel and rate, learned with the rest and frozen into the codec's integer tables afterwards.

NOTE The shares that make given symbols cheapest are those of the symbols themselves, so the prior follows them, as a
running mean over batches.  Learned by gradient it lagged behind: after 12 epochs of a unit of 24 channels it cost 282 B
where the symbols' own shares cost 198 B, and all the while the loss was told the wrong price.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

from ..codec import HEADER_BYTES, Tables, TensorTables, make_codec
from ..plan import CodecSpec, TensorSpec

# Of a batch in the running mean of the shares; and the least share, which costs 20 bits.
_MOMENTUM = 0.05
_LEAST_SHARE = 1e-6


class Quantiser(nn.Module):
    """Values (N, c', ...) to the values of their symbols, with the bits that the symbols cost.

    Symbol s of channel c at rate k stands for centre[c] + step[k, c] (s - L // 2), L = 2^bits: the grid
    is anchored in its middle, so that a coarser rate has the same zero.
    """

    has_prior = True

    def __init__(self, width: int, bits: int, gains: tuple[float, ...] = (1.0,)) -> None:
        super().__init__()
        self.num_levels, self.gains = 2**bits, gains
        self.centre = nn.Parameter(torch.zeros(width))
        self.log_step = nn.Parameter(torch.tensor(gains).log()[:, None].repeat(1, width))
        if self.has_prior:
            self.shares: Tensor
            self.register_buffer("shares", torch.full((len(gains), width, self.num_levels), 1 / self.num_levels))

    def grid(self, rate: int) -> tuple[Tensor, Tensor]:
        """`low` and `step` (c',) of one rate."""
        step = self.log_step[rate].exp()
        return self.centre - step * (self.num_levels // 2), step

    def forward(self, values: Tensor, rate: int = 0) -> tuple[Tensor, Tensor]:
        """Restored values, like `values`, and bits (N,); gradients go straight through the rounding."""
        place = self._places(values, rate)
        symbols = place + (place.round() - place).detach()
        low, step = (part.view(-1, *[1] * (values.ndim - 2)) for part in self.grid(rate))
        # A value that is not a number stays one in what is restored, and so breaks the loss; no symbol stands for it.
        known = symbols.detach().nan_to_num()
        if self.training:
            self._learn(known, rate)
        return low + step * symbols, self._bits(place.nan_to_num(), known, rate)

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
        step = _RANGE.get(self.num_levels, 4.0) * 2 * spread / self.num_levels
        for rate, gain in enumerate(self.gains):
            self.log_step[rate] = math.log(step * gain)
            if not self.has_prior:
                continue
            counts = self._counts(self.symbols(values, rate)) + 0.5
            self.shares[rate] = counts / counts.sum(1, keepdim=True)

    def _places(self, values: Tensor, rate: int) -> Tensor:
        low, step = (part.view(-1, *[1] * (values.ndim - 2)) for part in self.grid(rate))
        return ((values.float() - low) / step).clamp(0, self.num_levels - 1)

    def _counts(self, symbols: Tensor) -> Tensor:
        """(c', L) how often each symbol of each channel is there in (N, c', ...)."""
        places = (symbols.long() + self._rows(symbols)).flatten()
        return torch.bincount(places, minlength=symbols.shape[1] * self.num_levels).view(-1, self.num_levels)

    def _rows(self, values: Tensor) -> Tensor:
        """Where each channel's row begins in a (c', L) table made flat, to be added to (N, c', ...)."""
        first: Tensor = torch.arange(values.shape[1], device=values.device) * self.num_levels
        return first.view(-1, *[1] * (values.ndim - 2))

    @torch.no_grad()
    def _learn(self, symbols: Tensor, rate: int) -> None:
        """Move the prior towards the shares of the symbols of a batch."""
        counts = self._counts(symbols)
        seen = counts / counts.sum(1, keepdim=True)
        self.shares[rate] = ((1 - _MOMENTUM) * self.shares[rate] + _MOMENTUM * seen).clamp_min(_LEAST_SHARE)

    def _bits(self, place: Tensor, symbols: Tensor, rate: int) -> Tensor:
        """(N,) bits: their value from the symbols, their slope from the places between."""
        shares, rows = self.shares[rate], self._rows(place)
        cost = -(shares / shares.sum(1, keepdim=True)).log2().flatten()
        below = place.detach().floor().clamp(max=self.num_levels - 2).long() + rows
        between = (cost[below + 1] - cost[below]) * place
        return (cost[symbols.long() + rows] + between - between.detach()).flatten(1).sum(1)


class JpegQuantiser(Quantiser):
    """Values (N, c', H, W) through 8 bits, the tiled grey picture and JPEG itself, with the bits of its code.

    Gradients go straight through all of it; the bits have none (Eshratifar et al., 2019, section 3.3).
    """

    # Nothing is learned about symbols: the model of them is JPEG's own.
    has_prior = False

    def __init__(self, code: TensorSpec, quality: int) -> None:
        width = code.shape[0]
        super().__init__(width, 8)
        self.codec_spec = CodecSpec(transform="picture", coder="jpeg", quality=quality, per_channel=True, rate=0)
        levels = np.tile(np.arange(256, dtype=np.float32), (width, 1))
        plain = TensorTables(np.zeros(width, np.float32), np.ones(width, np.float32), levels)
        self._codec = make_codec(self.codec_spec, (code,), Tables((plain,)))

    def forward(self, values: Tensor, rate: int = 0) -> tuple[Tensor, Tensor]:
        """As `Quantiser.forward`."""
        place = self._places(values, rate)
        # A value that is not a number goes on as one, beside the code, and so breaks the loss.
        (pixels,), num_bytes = self._codec.roundtrip([place.detach().nan_to_num().round().cpu().numpy()])
        symbols = place + (torch.from_numpy(pixels).to(place) - place).detach()
        low, step = (part.view(-1, 1, 1) for part in self.grid(rate))
        return low + step * symbols, torch.from_numpy(8 * (num_bytes - HEADER_BYTES)).to(place)


# Range of a uniform quantiser of least error for a normal distribution, in standard deviations each way (Max, 1960).
_RANGE = {2: 1.596, 4: 1.991, 8: 2.344, 16: 2.681}
