"""What an edge counts, as Prometheus reads it at /metrics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from .batch import Computed

# From half a millisecond to ten seconds.
_SECONDS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
_BATCHES = (1, 2, 4, 8, 16, 32, 64)


class _OfPlan(NamedTuple):
    """The counts of one plan: to find them by their labels takes longer than to count."""

    requests: dict[tuple[str, str], Counter]
    received: Counter
    sent: Counter
    stages: tuple[Histogram, ...]


class EdgeMetrics:
    """Counts of one edge; safe from several threads.

    Args:
        num_waiting: how many requests nobody has begun.
        num_connections: how many devices are connected.
        num_tasks: how many tasks the edge's loop has.
    """

    content_type = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(
        self, num_waiting: Callable[[], int], num_connections: Callable[[], int], num_tasks: Callable[[], int]
    ) -> None:
        self._registry = CollectorRegistry()
        registry = self._registry
        self._requests = Counter(
            "coinfer_requests", "Requests that were answered, or failed.", ("door", "plan", "outcome"),
            registry=registry,
        )  # fmt: skip
        self._refused = Counter(
            "coinfer_refused", "Requests and connections that were refused.", ("reason",), registry=registry
        )
        self._received = Counter("coinfer_received_bytes", "Payloads of requests.", ("plan",), registry=registry)
        self._sent = Counter("coinfer_sent_bytes", "Answers, whole messages.", ("plan",), registry=registry)
        self._stages = Histogram(
            "coinfer_stage_seconds", "Waiting, decoding and tail of a request.", ("plan", "stage"),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._batches = Histogram(
            "coinfer_batch_size", "Requests that were computed together.", buckets=_BATCHES, registry=registry
        )
        self._of_plan: dict[int, _OfPlan] = {}
        for name, what, count in (
            ("queue_depth", "Requests that nobody has begun.", num_waiting),
            ("connections", "Devices that are connected.", num_connections),
            ("tasks", "Tasks of the edge's loop.", num_tasks),
        ):
            Gauge(f"coinfer_{name}", what, registry=registry).set_function(count)

    def answered(self, computed: Computed, *, door: str, sent_bytes: int) -> None:
        """A request is over; `door` is where it came in ("link" or "http")."""
        plan = computed.request.plan.number
        counts = self._of_plan.get(plan)
        if counts is None:
            counts = self._of_plan[plan] = self._labelled(plan)
        is_answered = bool(computed.durations_s)
        outcome = "answered" if is_answered else "failed"
        requests = counts.requests.get((door, outcome))
        if requests is None:
            requests = counts.requests[door, outcome] = self._requests.labels(door, str(plan), outcome)
        requests.inc()
        counts.received.inc(len(computed.request.payload))
        counts.sent.inc(sent_bytes)
        for stage, took_s in zip(counts.stages, computed.durations_s, strict=False):
            stage.observe(took_s)
        if is_answered:
            self._batches.observe(computed.batch)

    def _labelled(self, number: int) -> _OfPlan:
        plan = str(number)
        stages = tuple(self._stages.labels(plan, stage) for stage in ("wait", "decode", "tail"))
        return _OfPlan({}, self._received.labels(plan), self._sent.labels(plan), stages)

    def refused(self, reason: str, count: int = 1) -> None:
        """Count requests or connections that were refused.

        Args:
            reason: of a request "busy"; of either "token", nobody is known by it; of a connection "tls", no TLS came of
                it, "connections", it was one too many for this edge, or "greeting", what was said at the beginning of a
                link, or that it is one link too many.
            count: how many of them.
        """
        self._refused.labels(reason).inc(count)

    def page(self) -> bytes:
        """All of it, in Prometheus's text format."""
        return generate_latest(self._registry)
