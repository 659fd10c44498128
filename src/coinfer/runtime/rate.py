"""How fast the uplink is, from what a device sends anyway: bytes over the time until they were acknowledged.

    sent --- waits for frames before it --- begins --- transfer --- at the edge | edge's own time | reply -- heard
                                            |<- what is measured ->|             (in the reply)     |<- base ->|

A frame begins when it was sent, or when the frame before it had arrived, whichever is later.  What its way takes
beyond the bytes (`base_s`, both ways) is the least of the latest heartbeats', less what their own few bytes took: that
the frame behind one says, so that a rate that is assumed far too low spoils neither way nor noise.  Clocks jitter by
`noise_s`, the median of what heartbeats took beyond the least, so a frame says that the rate lies between
bits / (transfer + noise) and bits / (transfer - noise): a small frame says little, and the estimate moves only where it
lies outside.  Frames that follow each other without a gap are measured together, until they say enough.  A frame that
has not been acknowledged for longer than it should have taken says that the rate has fallen, before anything is heard.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from statistics import median_low
from typing import NamedTuple

# The share of the way (in logarithms) that one frame moves the estimate, and how fast the past is forgotten.
_GAIN, _FORGET_S = 0.7, 1.0
_LEAST_NOISE_S, _BEATS = 0.0005, 5
# Of what the way took before, what it takes at least where only a guess at a heartbeat's own bytes says less.
_NOT_BELOW = 0.95
# A transfer that takes so many times the noise tells the rate within a third.
_TELLING = 3.0
LEAST_BPS, MOST_BPS = 1e3, 1e11


class _Frame(NamedTuple):
    sent_s: float
    bits: float
    edge_s: float


class UplinkRate:
    """The estimate.  All times are seconds of the device's clock.

    Args:
        rate_bps: what is assumed before anything is known.
        base_s: both ways without the bytes, before a heartbeat has measured it.
    """

    def __init__(self, rate_bps: float, base_s: float = 0.0) -> None:
        self._rate_bps = rate_bps
        # What the latest heartbeats took, their own bytes left out as soon as another frame tells them.
        self._ways_s: deque[float] = deque([base_s], maxlen=_BEATS)
        self._is_base_known = False
        # What the latest one took, and its bits, until then.
        self._beat: tuple[float, float] | None = None
        # When the last frame was acknowledged, the edge's own time left out; and when anything was heard.
        self._acknowledged_s = self._heard_s = self._known_s = -math.inf
        # Bits and seconds of frames without a gap between them.
        self._run = (0.0, 0.0)
        self._flight: OrderedDict[int, _Frame] = OrderedDict()

    @property
    def known_bps(self) -> float:
        """Bits a second by what has been acknowledged, whatever is missing now."""
        return self._rate_bps

    @property
    def base_s(self) -> float:
        """Both ways without the bytes."""
        return min(self._ways_s)

    @property
    def noise_s(self) -> float:
        """How far the times of one frame may be off."""
        return max(_LEAST_NOISE_S, median_low(self._ways_s) - self.base_s)

    @property
    def last_heard_s(self) -> float:
        """When a frame was last acknowledged; minus infinity where none was."""
        return self._heard_s

    @property
    def last_known_s(self) -> float:
        """When frames last took so long that they told the rate; minus infinity where none did."""
        return self._known_s

    def sent(self, key: int, at_s: float, num_bytes: float, *, edge_s: float = 0.0) -> None:
        """A frame of so many bytes on the wire was handed to the link; the edge is expected to take `edge_s`."""
        self._flight[key] = _Frame(at_s, 8.0 * num_bytes, edge_s)

    def unsent(self, key: int) -> None:
        """A frame was not handed to the link after all."""
        self._flight.pop(key, None)

    def heard(self, key: int, at_s: float, *, edge_s: float = 0.0, is_beat: bool = False) -> None:
        """A frame was acknowledged; of the time since it was sent the edge kept it for `edge_s`.

        `is_beat`: it is a heartbeat of few bytes that found the link idle.
        """
        frame = self._flight.pop(key, None)
        if frame is None:
            return
        acknowledged_s = at_s - edge_s
        took_s = max(0.0, acknowledged_s - frame.sent_s)
        if is_beat:
            if not self._is_base_known:
                self._ways_s.clear()
                self._is_base_known = True
            self._ways_s.append(took_s)
        began_s, noise_s = self._began_s(frame), self.noise_s
        if acknowledged_s > began_s - noise_s:
            is_behind = began_s == self._acknowledged_s
            bits, run_s = self._run if is_behind else (0.0, 0.0)
            self._run = bits + frame.bits, run_s + max(0.0, acknowledged_s - began_s)
            self._observe(*self._run, at_s, noise_s, may_rise=not is_beat)
        self._leave_out_own_bytes(frame, took_s)
        self._beat = (took_s, frame.bits) if is_beat else None
        if self._is_base_known and took_s < self.base_s:
            # Even with its bytes it was faster.
            self._ways_s.append(took_s)
        self._acknowledged_s, self._heard_s = max(self._acknowledged_s, acknowledged_s), at_s

    def _leave_out_own_bytes(self, frame: _Frame, took_s: float) -> None:
        """Of the latest heartbeat's time what its own bytes took, if the link carried `frame` as fast, or as known."""
        if self._beat is None:
            return
        beat_s, bits = self._beat
        own_s = bits * min(max(0.0, took_s - beat_s) / frame.bits, 1 / self._rate_bps)
        # Where the link stood still behind the heartbeat that is too much.
        least_s = min((_NOT_BELOW * way_s for way_s in list(self._ways_s)[:-1]), default=0.0)
        self._ways_s[-1] = max(least_s, beat_s - own_s)

    def forget(self) -> None:
        """The link broke: what was on it will not be acknowledged."""
        self._flight.clear()
        self._beat = None
        self._acknowledged_s = -math.inf

    def at(self, now_s: float) -> float:
        """Bits a second as far as is known now."""
        if not self._flight:
            return self._rate_bps
        frame = next(iter(self._flight.values()))
        waited_s = now_s - self._began_s(frame) - frame.edge_s - self.noise_s
        if waited_s <= 0:
            return self._rate_bps
        return min(self._rate_bps, max(LEAST_BPS, frame.bits / waited_s))

    def backlog_s(self, now_s: float, rate_bps: float | None = None) -> float:
        """Seconds until what is on the link has left it, at `rate_bps` or as fast as is known now."""
        if not self._flight:
            return 0.0
        first = next(iter(self._flight.values()))
        bits = sum(frame.bits for frame in self._flight.values())
        return max(0.0, self._began_s(first) - self.base_s + bits / (rate_bps or self.at(now_s)) - now_s)

    def _began_s(self, frame: _Frame) -> float:
        """When a frame of no bytes in its place would have been acknowledged."""
        return max(frame.sent_s + self.base_s, self._acknowledged_s)

    def _observe(self, bits: float, took_s: float, now_s: float, noise_s: float, *, may_rise: bool) -> None:
        # A heartbeat's own bytes are a part of the way as it is known.
        low_bps = bits / (took_s + noise_s) if may_rise else 0.0
        high_bps = bits / (took_s - noise_s) if took_s > noise_s else math.inf
        target_bps = min(max(self._rate_bps, low_bps), high_bps)
        gap_s = now_s - self._known_s
        if took_s > _TELLING * noise_s:
            self._known_s, self._run = now_s, (0.0, 0.0)
        gain = 1.0 - (1.0 - _GAIN) * math.exp(-gap_s / _FORGET_S)
        rate_bps = self._rate_bps * (target_bps / self._rate_bps) ** gain
        self._rate_bps = min(max(rate_bps, LEAST_BPS), MOST_BPS)
