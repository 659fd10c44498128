"""The arithmetic of a shaped link, without sockets and without a clock.

A link's direction is a fluid server: bytes leave one after another at the link's rate, then travel for
the delay.

    departure = when the rate has carried the piece, begun at max(arrival, previous departure)
    delivery  = departure + delay

Bytes are counted as `protocol.wire_bytes` counts them: 40 B of TCP/IP for every started segment of
1,448 B of *one message*.  A proxy reads messages in pieces of any size, so two things are kept here:
`Frames` finds where one message ends and the next begins in a stream of pieces, and `Direction` charges
each piece only the segments that it starts.  However a message of n bytes is cut up, it costs
n + 40 * ceil(n / 1448).

Not modelled: loss, TCP's slow start, and the bytes of acknowledgements.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from itertools import accumulate
from typing import NamedTuple

from ..errors import PlanError
from ..profile import Trace
from ..protocol import SEGMENT_BYTES, TCP_IP_BYTES


def stream_wire_bytes(before: int, num_bytes: int) -> int:
    """Bytes on the wire of the next `num_bytes` of a message of which `before` bytes went already.

    >>> stream_wire_bytes(0, 1449), stream_wire_bytes(0, 1000) + stream_wire_bytes(1000, 449)
    (1529, 1529)
    """
    started = -(-(before + num_bytes) // SEGMENT_BYTES) - -(-before // SEGMENT_BYTES)
    return num_bytes + TCP_IP_BYTES * started


class ConstantRate:
    """A rate that never changes; infinity is allowed and takes no time."""

    def __init__(self, rate_bps: float) -> None:
        if not rate_bps > 0:
            raise PlanError(f"a link's rate must be above 0 bit/s, got {rate_bps} (link)")
        self.rate_bps = rate_bps

    def finish_s(self, start_s: float, num_bits: float) -> float:
        """When `num_bits` begun at `start_s` have been carried."""
        return start_s + num_bits / self.rate_bps


class TraceRate:
    """The rate of a trace that began at `origin_s` and repeats; in an outage nothing is carried.

    >>> trace = Trace(name="t", start_s=(0.0, 1.0, 2.0), rate_bps=(8.0, 0.0, 16.0), duration_s=3.0)
    >>> [TraceRate(trace).finish_s(0.5, bits) for bits in (4.0, 12.0, 21.0)]
    [1.0, 2.5, 3.125]
    """

    def __init__(self, trace: Trace, *, origin_s: float = 0.0) -> None:
        self.trace = trace
        self.origin_s = origin_s
        ends = (*trace.start_s[1:], trace.duration_s)
        pieces = [rate * (end - start) for rate, start, end in zip(trace.rate_bps, trace.start_s, ends, strict=True)]
        self._carried = [0.0, *accumulate(pieces)]

    def _carried_at(self, time_s: float) -> float:
        periods, within_s = divmod(time_s, self.trace.duration_s)
        piece = bisect_right(self.trace.start_s, within_s) - 1
        rest = self.trace.rate_bps[piece] * (within_s - self.trace.start_s[piece])
        return periods * self._carried[-1] + self._carried[piece] + rest

    def finish_s(self, start_s: float, num_bits: float) -> float:
        """The earliest time at which `num_bits` begun at `start_s` have been carried."""
        if num_bits <= 0:
            return start_s
        goal = self._carried_at(start_s - self.origin_s) + num_bits
        periods = math.ceil(goal / self._carried[-1]) - 1
        goal -= periods * self._carried[-1]
        # The first piece at whose end enough was carried; it has a rate above 0, for it carries something.
        piece = max(bisect_left(self._carried, goal), 1) - 1
        missing = goal - self._carried[piece]
        within_s = self.trace.start_s[piece] + (missing / self.trace.rate_bps[piece] if missing > 0 else 0.0)
        return max(start_s, self.origin_s + periods * self.trace.duration_s + within_s)


class Direction:
    """One direction of a link: says when each piece departs and is delivered, and how much waits.

    Times are of any one clock that never goes back; pieces arrive in order of time.
    """

    def __init__(self, rate: ConstantRate | TraceRate, *, delay_s: float = 0.0) -> None:
        self.rate = rate
        self.delay_s = delay_s
        self.num_bytes = 0
        self.wire_bytes = 0
        self._busy_until_s = -math.inf
        self._last_delivery_s = -math.inf
        self._waiting: deque[tuple[float, int]] = deque()

    def change(self, rate: ConstantRate | TraceRate, *, delay_s: float) -> None:
        """Another rate and delay for the pieces that arrive from now on."""
        self.rate = rate
        self.delay_s = delay_s

    def stall(self, until_s: float) -> None:
        """Carry nothing more before `until_s`."""
        self._busy_until_s = max(self._busy_until_s, until_s)

    def send(self, arrival_s: float, num_bytes: int, *, message_before: int = 0) -> float:
        """When a piece of `num_bytes` that arrives now is delivered.

        `message_before` is how many bytes of the same message came before this piece.
        """
        wire = stream_wire_bytes(message_before, num_bytes)
        departure_s = self.rate.finish_s(max(arrival_s, self._busy_until_s), wire * 8.0)
        self._busy_until_s = departure_s
        self._waiting.append((departure_s, num_bytes))
        self.num_bytes += num_bytes
        self.wire_bytes += wire
        # A shorter delay must not let a later piece overtake an earlier one of the same stream.
        self._last_delivery_s = max(self._last_delivery_s, departure_s + self.delay_s)
        return self._last_delivery_s

    def room_s(self, now_s: float, buffer_bytes: int) -> float:
        """The earliest time, at least `now_s`, at which no more than `buffer_bytes` wait to depart."""
        while self._waiting and self._waiting[0][0] <= now_s:
            self._waiting.popleft()
        excess = sum(size for _, size in self._waiting) - buffer_bytes
        for departure_s, size in self._waiting:
            if excess <= 0:
                break
            excess -= size
            now_s = departure_s
        return now_s


class Piece(NamedTuple):
    """A part of a stream that lies within one message: its bytes, and how many of the message came before."""

    data: bytes
    before: int


class Frames:
    """Cuts a byte stream at the borders of its messages.

    An HTTP upgrade (a header up to the empty line) is followed by WebSocket frames (RFC 6455, section
    5.2), each a message.  A stream that begins otherwise has no borders that can be seen: whatever arrives
    as one piece counts as a message.
    """

    def __init__(self) -> None:
        self._mode = "unknown"
        self._start = b""
        self._before = 0
        self._left = 0

    def cut(self, data: bytes) -> list[Piece]:
        """The pieces of `data`, in order, none of them empty, none across a border."""
        pieces = []
        while data:
            take = self._take(data)
            pieces.append(Piece(data[:take], self._before))
            self._before += take
            data = data[take:]
            if self._mode == "frame" and self._left == 0 and not self._start:
                self._before = 0
            elif self._mode == "plain":
                self._before = 0
        return pieces

    def _take(self, data: bytes) -> int:
        """How many of the first bytes belong to the present message."""
        if self._mode == "unknown":
            self._mode = "upgrade" if data.startswith((b"GET ", b"HTTP/1.1 101")) else "plain"
        if self._mode == "plain":
            return len(data)
        if self._mode == "upgrade":
            return self._take_upgrade(data)
        if self._left == 0:
            return self._take_header(data)
        take = min(self._left, len(data))
        self._left -= take
        return take

    def _take_upgrade(self, data: bytes) -> int:
        end = (self._start + data).find(b"\r\n\r\n")
        if end < 0:
            self._start = (self._start + data)[-3:]
            return len(data)
        take = end + 4 - len(self._start)
        self._start = b""
        self._mode = "frame"
        return take

    def _take_header(self, data: bytes) -> int:
        """Take what is there of a frame's header; once it is whole, its payload is what is left."""
        seen = self._start + data[: 14 - len(self._start)]
        if len(seen) < 2:
            self._start = seen
            return len(data)
        short = seen[1] & 0x7F
        size = {126: 4, 127: 10}.get(short, 2) + (4 if seen[1] & 0x80 else 0)
        if len(seen) < size:
            self._start = seen
            return len(data)
        extended = {126: seen[2:4], 127: seen[2:10]}.get(short)
        self._left = short if extended is None else int.from_bytes(extended, "big")
        take = size - len(self._start)
        self._start = b""
        return take
