"""How long the device itself takes for its side of each plan, beside what the bundle says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..plan import TensorSpec

# How much the latest request counts.
_NEWEST = 0.3


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
        if said_s <= 0 or took_s <= 0:
            return
        # In logarithms, so that one long pause does not count for ever.
        ratio = took_s / said_s
        before = self._loads.get(number, ratio)
        self._loads[number], self._said_s[number] = before * (ratio / before) ** _NEWEST, said_s
        self._weigh()

    def said(self, loads: Mapping[int, float], other: float) -> None:
        """From now on so many times as long is said."""
        for number in self._loads:
            self._loads[number] /= loads.get(number, other)
            self._said_s[number] *= loads.get(number, other)
        self._weigh()

    def _weigh(self) -> None:
        # What takes long says most of the device.
        took_s = sum(load * self._said_s[number] for number, load in self._loads.items())
        self.other = took_s / sum(self._said_s.values()) if self._loads else 1.0


def made_up(spec: TensorSpec) -> NDArray[Any]:
    """A request that nobody asked: a picture (H, W, C) of gentle slopes with some noise; other inputs are noise."""
    chance = np.random.default_rng(0)
    if spec.dtype != "uint8" or len(spec.shape) != 3:
        return chance.standard_normal(spec.shape).astype(spec.dtype)
    down, across = (np.stack([1 - ramp, ramp], 1) for ramp in (np.linspace(0, 1, size) for size in spec.shape[:2]))
    corners = chance.uniform(0, 255, (2, 2, spec.shape[2]))
    slopes = np.einsum("ia,jb,abc->ijc", down, across, corners)
    picture: NDArray[np.uint8] = np.clip(slopes + chance.normal(0, 8, spec.shape), 0, 255).astype(np.uint8)
    return picture
