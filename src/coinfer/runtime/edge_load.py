"""How long the edge takes as of late, beside what the price book says: its times, and what requests wait there."""

from __future__ import annotations

import math

# How much the latest request counts.
_NEWEST = 0.3
# A request that is not told of for so long lets what is known fade, and how fast.
_CALM_S, _FADES_S = 1.0, 5.0


class EdgeLoad:
    """What replies tell.  What they told fades when none come: a device that keeps away would never learn better."""

    def __init__(self) -> None:
        self._load, self._wait_s, self._told_s = 1.0, 0.0, -math.inf

    def at(self, now_s: float) -> float:
        """How many times as long as said decoding and tails take."""
        return 1.0 + (self._load - 1.0) * self._share(now_s)

    def wait_s(self, now_s: float) -> float:
        """Seconds that a request waits at the edge."""
        return self._wait_s * self._share(now_s)

    @property
    def told(self) -> tuple[float, float]:
        """Load and wait as they were told last, however long ago."""
        return self._load, self._wait_s

    def replied(self, now_s: float, *, took_s: float, said_s: float, wait_s: float) -> None:
        """The edge took so long for decoding and tail, where the price book says `said_s`, and let the request wait."""
        # What has faded counts less beside it.
        gain = 1.0 - (1.0 - _NEWEST) * self._share(now_s)
        self._load += gain * (took_s / said_s - self._load)
        self._wait_s += gain * (wait_s - self._wait_s)
        self._told_s = now_s

    def _share(self, now_s: float) -> float:
        """Of what was told last."""
        return math.exp(-max(0.0, now_s - self._told_s - _CALM_S) / _FADES_S)
