"""What happened, or would happen: spans of stages, one outcome for each request, decisions for another plan.

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

    "device": by a plan of the device alone, "fallback": by one in the place of a link or an edge that could not be
    used; "exit": by an exit on the device; "dropped" by a stream's queue, "late": past its deadline, both without an
    answer.
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


class Decision(Value, frozen=True, kw_only=True):
    """Another plan from a request on, and why; `before` is the plan until then (None: the first one).

    `at_s` is on the device's clock, `rate_bps` the uplink's rate and `edge_load` the edge's load as the device knew
    them.
    """

    at_s: float
    plan: int
    reason: str
    rate_bps: float
    edge_load: float
    before: int | None = None
    request: int | None = None


class Timeline:
    """An append-only record, safe to write from several threads."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.outcomes: list[Outcome] = []
        self.decisions: list[Decision] = []
        self._lock = threading.Lock()

    def add(self, *items: Span | Outcome | Decision) -> None:
        """Record spans, outcomes and decisions."""
        with self._lock:
            for item in items:
                if isinstance(item, Span):
                    self.spans.append(item)
                elif isinstance(item, Decision):
                    self.decisions.append(item)
                else:
                    self.outcomes.append(item)

    def busy_s(self, stage: str) -> float:
        """Sum of one stage's spans in seconds."""
        return sum(span.end_s - span.start_s for span in self.spans if span.stage == stage)

    def to_json_lines(self) -> bytes:
        """One JSON object a line: outcomes first, then decisions, then spans."""
        items = [*self.outcomes, *self.decisions, *self.spans]
        return b"".join(msgspec.json.encode(item) + b"\n" for item in items)
