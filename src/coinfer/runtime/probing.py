"""When a link is measured besides what crosses it: its rate where frames do not tell it, its way now and then."""

from __future__ import annotations

import math

from ..errors import PlanError
from ..protocol import PADDING_BYTES
from .rate import UplinkRate

# So often the way is measured whatever frames say; where it is in doubt as often as the rate, so many times.
_WAY_S, _DOUBTS = 5.0, 10
# Measuring that changes nothing comes ever more seldom, up to so many times; what counts as a change of the rate.
_SELDOM, _MOVED = 16, 0.1
# A heartbeat that measures the rate takes the link for so long, at the rate that is assumed.
_PROBE_S, _LEAST_BYTES = 0.02, 1024


class Probing:
    """What is due.  All times are seconds of the device's clock.

    Args:
        rate: what is measured.
        every_s: so often, where frames do not tell the rate.

    Raises:
        PlanError: that is not above 0.
    """

    def __init__(self, rate: UplinkRate, every_s: float) -> None:
        if not every_s > 0:
            raise PlanError(f"a link is measured every so many seconds above 0, got {every_s}")
        self._rate, self._least_s = rate, every_s
        self._every_s, self._began_s, self._doubts = every_s, -math.inf, 0
        # When a bare heartbeat was last asked for, or was sure to go soon.
        self._asked_s = -math.inf

    def connected(self, now_s: float) -> None:
        """The link is a new one."""
        self._every_s, self._doubts, self._asked_s = self._least_s, 0, now_s

    def is_due(self, now_s: float) -> bool:
        """Whether an idle link should be measured."""
        way_every_s = _WAY_S if self._rate.is_way_known or self._doubts >= _DOUBTS else self._least_s
        is_rate_known = now_s - max(self._rate.last_known_s, self._began_s) < self._every_s
        return not is_rate_known or now_s - self._began_s >= way_every_s

    def asks_way(self, now_s: float) -> bool:
        """Whether a bare heartbeat should go though the link is not idle, now: the quickest of some must do then."""
        known_s = max(self._rate.last_way_s, self._asked_s)
        if now_s - known_s < (2 * _WAY_S if self._rate.is_way_known else self._least_s):
            return False
        self._asked_s = now_s
        return True

    def began(self, now_s: float) -> None:
        """The link is being measured."""
        self._began_s = self._asked_s = now_s
        self._doubts = 0 if self._rate.is_way_known else self._doubts + 1

    def ended(self, now_s: float, before_bps: float) -> None:
        """It has been; the rate was taken for `before_bps`."""
        has_told = self._rate.last_known_s >= now_s or abs(math.log(self._rate.at(now_s) / before_bps)) > _MOVED
        self._every_s = min(self._least_s if has_told else 2 * self._every_s, _SELDOM * self._least_s)

    def num_bytes(self, now_s: float) -> int:
        """The padding of a heartbeat that measures the rate."""
        wanted = self._rate.at(now_s) * max(_PROBE_S, 4 * self._rate.noise_s) / 8
        return int(min(max(wanted, _LEAST_BYTES), PADDING_BYTES))
