"""How long the device itself takes for its side of each plan, beside what the price book says."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan import TensorSpec

# How much the latest request counts; and how much with each what is known of plans that it did not take fades.
_NEWEST, _FADES = 0.3, 1 / 128


class OwnLoads:
    """How many times as long as said, as of late: for each plan that the device took, and by these for all others."""

    def __init__(self) -> None:
        self._loads: dict[int, float] = {}
        self._said_s: dict[int, float] = {}
        self.other = 1.0

    def of(self, number: int) -> float:
        """For a plan."""
        return self._loads.get(number, self.other)

    def known(self) -> dict[int, float]:
        """For the plans that it took."""
        return dict(self._loads)

    def took(self, number: int, took_s: float, said_s: float) -> None:
        """The device computed its side of a plan."""
        if not (0 < took_s < math.inf and 0 < said_s < math.inf and 0 < took_s / said_s < math.inf):
            return
        # In logarithms, so that one long pause does not count for ever.
        ratio = took_s / said_s
        before = self._loads.get(number, ratio)
        for other, load in self._loads.items():
            self._loads[other] = load * (self.other / load) ** _FADES
        self._loads[number], self._said_s[number] = before * (ratio / before) ** _NEWEST, said_s
        # What takes long says most of the device.
        sum_s = sum(load * self._said_s[other] for other, load in self._loads.items())
        self.other = sum_s / sum(self._said_s.values())


def made_up(spec: TensorSpec) -> NDArray[Any]:
    """A request that nobody asked: a picture (H, W, C) of gentle slopes with some noise; other inputs are noise."""
    chance = np.random.default_rng(0)
    if spec.dtype != "uint8" or len(spec.shape) != 3:
        if np.dtype(spec.dtype).kind == "f":
            return chance.standard_normal(spec.shape).astype(spec.dtype)
        return chance.integers(0, 2 if spec.dtype == "bool" else 100, spec.shape).astype(spec.dtype)
    down, across = (np.stack([1 - ramp, ramp], 1) for ramp in (np.linspace(0, 1, size) for size in spec.shape[:2]))
    corners = chance.uniform(0, 255, (2, 2, spec.shape[2]))
    slopes = np.einsum("ia,jb,abc->ijc", down, across, corners)
    picture: NDArray[np.uint8] = np.clip(slopes + chance.normal(0, 8, spec.shape), 0, 255).astype(np.uint8)
    return picture
