"""Pinned bytes of a trained unit: grid and prior as they lie in a unit's file, to payloads that later versions read."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from coinfer.codec import make_codec
from coinfer.compress.bottleneck import Unit, UnitSpec
from coinfer.compress.divided import codecs_of
from coinfer.plan import TensorSpec

CODE = TensorSpec(name="code", shape=(3, 4, 4))
# Header of 6 bytes, then the code; the finer rate first.
PINNED = (
    "12f192adab0900884ccc9886dfcf6a82d4a2278b865318cb130849ce64d134886b",
    "12c5518765e4261cf1208d8b4a312ddc0c9729039a91967bc6",
)


def unit() -> Unit:
    """Three channels at two rates, every number of it set by hand."""
    made = Unit(TensorSpec(name="map", shape=(8, 4, 4)), UnitSpec(width=3, bits=4, gains=(1.0, 2.0)))
    places = torch.arange(16.0)
    with torch.no_grad():
        made.quantiser.centre.copy_(torch.tensor([0.0, 0.5, -1.0]))
        for rate, step in enumerate((0.25, 0.5)):
            made.quantiser.log_step[rate].fill_(float(np.log(step)))
            for channel, width in enumerate((1.0, 2.0, 4.0)):
                made.quantiser.logits[rate, channel].copy_(-((places - 7.5) ** 2) / (2 * width**2))
    return made


def values() -> np.ndarray:
    return (np.arange(48, dtype=np.float32).reshape(1, 3, 4, 4) * 37 % 19 - 9) / 8 + 0.03


@pytest.mark.parametrize("rate", [0, 1])
def test_a_units_payload_is_pinned(rate: int) -> None:
    spec, tables = codecs_of(unit(), CODE)[rate]
    codec = make_codec(spec, (CODE,), tables)
    payload = codec.encode([values()])
    assert payload.hex() == PINNED[rate]
    (restored,) = codec.decode(bytes.fromhex(PINNED[rate]))
    low, step = (part.detach().numpy()[:, None, None] for part in unit().quantiser.grid(rate))
    symbols = np.clip(np.rint((values() - low) / step), 0, 15)
    assert np.allclose(restored, low + step * symbols, atol=1e-6)
