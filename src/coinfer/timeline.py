"""What happened, or would happen: spans of stages, and one outcome for each request.

Simulation, device and edge all record a `Timeline`; one reader (report) serves them all.  Two
machines' clocks are never subtracted: a span says whose clock it is on.  `clock` "device" counts
seconds from the start of the device's run; `clock` "edge" counts from the arrival of that very request
at the edge (the edge sends durations, never times of day).
"""

from __future__ import annotations

import threading
from typing import Literal

import msgspec

from .plan import Value

Clock = Literal["device", "edge"]
Answered = Literal["device", "edge", "exit", "fallback", "dropped", "late", "failed"]


class Span(Value, frozen=True, kw_only=True):
    """One stage of one request, half-open [start_s, end_s) on `clock`; `num_bytes` on the wire for links."""

    request: int
    stage: str
    start_s: float
    end_s: float
    clock: Clock = "device"
    num_bytes: int = 0


class Outcome(Value, frozen=True, kw_only=True):
    """How one request ended: by which plan, answered by whom, and from when to when on the device's clock.

    "exit": by an exit on the device; "dropped" by a stream's queue, "late": past its deadline, both without an answer.
    `exit` is the place in the plan of the exit that answered, on either machine.  `payload_bytes` is the bare payload
    sent (0 where nothing was), `wire_bytes` what it took on the wire.
    """

    request: int
    plan: int
    answered: Answered
    start_s: float
    end_s: float
    payload_bytes: int = 0
    wire_bytes: int = 0
    reply_wire_bytes: int = 0
    exit: int | None = None

    @property
    def latency_s(self) -> float:
        """Seconds from handing in the request to holding its answer."""
        return self.end_s - self.start_s


class Timeline:
    """An append-only record, safe to write from several threads."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.outcomes: list[Outcome] = []
        self._lock = threading.Lock()

    def add(self, *items: Span | Outcome) -> None:
        """Record spans and outcomes."""
        with self._lock:
            for item in items:
                if isinstance(item, Span):
                    self.spans.append(item)
                else:
                    self.outcomes.append(item)

    def busy_s(self, stage: str) -> float:
        """Sum of one stage's spans in seconds."""
        return sum(span.end_s - span.start_s for span in self.spans if span.stage == stage)

    def to_json_lines(self) -> bytes:
        """One JSON object a line: outcomes first, then spans."""
        return b"".join(msgspec.json.encode(item) + b"\n" for item in [*self.outcomes, *self.spans])
