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
    "1253ff10ec0d0fc1fe1eff92c2d5f2794ceb344279c1a2969983fbc8f270",
    "129cdd99582f3dd73969734feb0be0917c351e47cb8a13783e6d",
)


def unit() -> Unit:
    """Three channels at two rates, every number of it set by hand."""
    made = Unit(TensorSpec(name="map", shape=(8, 4, 4)), UnitSpec(width=3, bits=4, gains=(1.0, 2.0)))
    places = torch.arange(16.0)
    with torch.no_grad():
        made.quantiser.centre.copy_(torch.tensor([0.0, 0.5, -1.0]))
        for rate, step in enumerate((0.25, 0.5)):
            made.quantiser.log_step[rate].fill_(float(np.log(step)))
            for channel, width in enumerate((1, 2, 4)):
                # Powers of two: the same on every machine, to the last bit.
                made.quantiser.shares[rate, channel] = 0.5 ** ((places - 7.5).abs() // width)
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
