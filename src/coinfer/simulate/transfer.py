"""How long bytes take over a link: at a constant rate, or along a trace that repeats.

    C(t) = bits that the link carries from 0 to t;    finish = the first t with C(t) >= C(start) + bits
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ..profile import Link

Times = float | NDArray[np.float64]


class Transfer:
    """When transfers over one direction of a link end; its delay is not counted.

    `offset_s`: the link is that far into its trace when the simulation begins.
    """

    def __init__(self, link: Link, *, is_uplink: bool, offset_s: Times = 0.0) -> None:
        self._rate_bps = link.rate_bps
        if not is_uplink and link.down_rate_bps is not None:
            self._rate_bps = link.down_rate_bps
        self._trace = link.trace if is_uplink else None
        self._offset_s = offset_s
        if self._trace is not None:
            self._edges = np.array([*self._trace.start_s, self._trace.duration_s])
            self._bits = np.concatenate([[0.0], np.cumsum(np.diff(self._edges) * np.array(self._trace.rate_bps))])

    def end_s(self, start_s: Times, num_bytes: Times) -> NDArray[np.float64]:
        """When a transfer of `num_bytes` ends that begins at `start_s`; arrays go element by element."""
        bits = 8.0 * np.asarray(num_bytes)
        start = np.asarray(start_s, np.float64)
        if self._trace is None:
            return np.asarray(start + bits / self._rate_bps)
        duration_s, per_round = self._edges[-1], self._bits[-1]
        rounds, within = np.divmod(start + self._offset_s, duration_s)
        wanted = np.interp(within, self._edges, self._bits) + bits
        more, left = np.divmod(wanted, per_round)
        # What ends with a round ends there, not at the beginning of the next; what carries nothing ends at once.
        is_full = (left == 0) & (more > 0)
        more, left = np.where(is_full, more - 1, more), np.where(is_full, per_round, left)
        place = np.searchsorted(self._bits, left, side="left")
        below = np.maximum(place - 1, 0)
        step = np.maximum(self._bits[place] - self._bits[below], 1e-300)
        share = np.where(place > 0, (left - self._bits[below]) / step, 0.0)
        found = self._edges[below] + share * (self._edges[place] - self._edges[below])
        end = (rounds + more) * duration_s + found - self._offset_s
        return np.asarray(np.where(bits > 0, np.maximum(end, start), start))
