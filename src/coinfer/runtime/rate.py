"""How fast the uplink is, from what a device sends anyway: bytes over the time until they were acknowledged.

    sent --- waits for frames before it --- begins --- transfer --- at the edge | edge's own time | reply -- heard
                                            |<- what is measured ->|             (in the reply)     |<- base ->|

A frame begins when it was sent, or when the frame before it had arrived, whichever is later.  What its way takes beyond
the bytes (both ways) is the least that the latest bare heartbeats took; they say nothing else.  Clocks jitter by
`noise_s`, the median of what they took beyond that, so a frame says that the rate lies between bits / (transfer +
noise) and bits / (transfer - noise): a small frame says little, and the estimate moves only where it lies outside.
Frames that follow each other without a gap are measured together, until they say enough, and so are those that the edge
answers out of turn.  A frame that has not been acknowledged for longer than it should have taken says that the rate has
fallen, before anything is heard.

Neither way nor noise depends on the rate: one that is assumed far too low after a stall would spoil both.  What a
heartbeat's own 54 bytes took is in the way as it is measured: of a frame that came alone as many may be in it or not.
"""

from __future__ import annotations

import math
from collections import OrderedDict, deque
from statistics import median_low
from typing import NamedTuple

# The share of the way (in logarithms) that one frame moves the estimate, and how fast the past is forgotten.
_GAIN, _FORGET_S = 0.7, 1.0
_LEAST_NOISE_S, _BEATS = 0.0005, 5
# From so many heartbeats on it takes more than one late one to be wrong.
_SURE = 3
# One frame that was faster than any way may be an edge's mistake about its own time; so many are not.
_FASTER = 3
# A transfer that takes so many times the noise tells the rate within a third.
_TELLING = 3.0
# A bare heartbeat; without its bytes its way is not taken to be shorter than this share, however slow the link seems.
_BEAT_BITS, _LEAST_BASE = 432.0, 0.75
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
        # What the latest heartbeats took over this link.
        self._ways_s: deque[float] = deque([base_s], maxlen=_BEATS)
        self._is_base_known = False
        # What frames took that were faster than that, even with their bytes.
        self._faster_s: list[float] = []
        # When the last frame was acknowledged, the edge's own time left out; and when anything was heard.
        self._acknowledged_s = self._heard_s = self._known_s = self._measured_s = -math.inf
        # Bits, at least and at most, and seconds of frames without a gap between them.
        self._run = (0.0, 0.0, 0.0)
        self._flight: OrderedDict[int, _Frame] = OrderedDict()

    @property
    def known_bps(self) -> float:
        """Bits a second by what has been acknowledged, whatever is missing now."""
        return self._rate_bps

    @property
    def base_s(self) -> float:
        """Both ways without the bytes."""
        return max(_LEAST_BASE * self._way_s, self._way_s - _BEAT_BITS / self._rate_bps)

    @property
    def _way_s(self) -> float:
        """What a bare heartbeat takes."""
        return min(self._ways_s)

    @property
    def noise_s(self) -> float:
        """How far the times of one frame may be off."""
        return max(_LEAST_NOISE_S, median_low(self._ways_s) - self._way_s)

    @property
    def is_way_known(self) -> bool:
        """Whether heartbeats have measured this link, the latest off by no more than noise, and no frame was faster."""
        off_s = self._ways_s[-1] - self._way_s - _BEAT_BITS / self._rate_bps
        is_measured = self._is_base_known and len(self._ways_s) >= _SURE
        return is_measured and not self._faster_s and off_s <= _TELLING * self.noise_s

    @property
    def last_way_s(self) -> float:
        """When a heartbeat last told the way; minus infinity where none did."""
        return self._measured_s

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

    def heard(self, key: int, at_s: float, *, edge_s: float = 0.0, is_way: bool = False) -> None:
        """A frame was acknowledged; of the time since it was sent the edge kept it for `edge_s`.

        `is_way`: it is a bare heartbeat, and says what the way takes.
        """
        if key not in self._flight:
            return
        # What was sent before it has passed the link as well, whenever the edge answers it.
        passed: list[_Frame] = []
        while key in self._flight:
            passed.append(self._flight.popitem(last=False)[1])
        acknowledged_s = at_s - edge_s
        if is_way:
            if not self._is_base_known:
                self._ways_s.clear()
                self._is_base_known = True
            self._ways_s.append(max(0.0, acknowledged_s - passed[-1].sent_s))
            self._faster_s.clear()
            self._measured_s = at_s
            self._run = (0.0, 0.0, 0.0)
        else:
            self._passed(passed, acknowledged_s, at_s)
        self._acknowledged_s, self._heard_s = max(self._acknowledged_s, acknowledged_s), at_s

    def _passed(self, frames: list[_Frame], acknowledged_s: float, now_s: float) -> None:
        """Frames have passed the link in this order; only of the last one it is known when."""
        took_s = acknowledged_s - frames[-1].sent_s
        if not self._is_base_known or took_s >= self._way_s:
            self._faster_s.clear()
        else:
            self._faster_s.append(max(0.0, took_s))
            if len(self._faster_s) == _FASTER:
                self._ways_s.append(max(self._faster_s))
                self._faster_s.clear()
        # Those that the link carried without a gap, the last one among them, tell the most.
        noise_s, bits, best = self.noise_s, 0.0, (-math.inf, 0.0, 0.0)
        for frame in reversed(frames):
            bits, began_s = bits + frame.bits, self._began_s(frame)
            if acknowledged_s > began_s - noise_s:
                best = max(best, (bits / (acknowledged_s - began_s + noise_s), bits, began_s))
        _, bits, began_s = best
        if bits:
            is_behind = began_s == self._acknowledged_s
            least, most, took_s = self._run if is_behind else (-_BEAT_BITS, 0.0, 0.0)
            self._run = least + bits, most + bits, took_s + max(0.0, acknowledged_s - began_s)
            self._observe(*self._run, now_s)

    def forget(self) -> None:
        """The link broke: what was on it will not be acknowledged, and the next one may take another way."""
        self._flight.clear()
        self._acknowledged_s = -math.inf
        self._is_base_known = False

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
        return max(0.0, self._began_s(first) - self._way_s + bits / (rate_bps or self.at(now_s)) - now_s)

    def _began_s(self, frame: _Frame) -> float:
        """When a frame of no bytes in its place would have been acknowledged."""
        return max(frame.sent_s + self._way_s, self._acknowledged_s)

    def _observe(self, least: float, most: float, took_s: float, now_s: float) -> None:
        noise_s = self.noise_s
        low_bps = least / (took_s + noise_s)
        high_bps = most / (took_s - noise_s) if took_s > noise_s else math.inf
        target_bps = min(max(self._rate_bps, low_bps), high_bps)
        gap_s = now_s - self._known_s
        if took_s > _TELLING * noise_s:
            self._known_s, self._run = now_s, (0.0, 0.0, 0.0)
        gain = 1.0 - (1.0 - _GAIN) * math.exp(-gap_s / _FORGET_S)
        rate_bps = self._rate_bps * (target_bps / self._rate_bps) ** gain
        self._rate_bps = min(max(rate_bps, LEAST_BPS), MOST_BPS)
