"""What a device counts, as Prometheus reads it: on a port of its own, on loopback."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from ..errors import LinkError
from .guarded import GuardedDevice
from .request import Answer

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
LOOPBACK = "127.0.0.1"


class DeviceMetrics:
    """Counts of one device."""

    def __init__(self, device: GuardedDevice) -> None:
        self._device = device
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "coinfer_device_requests", "Requests by who answered them, or why nobody did.", ("answered", "plan"),
            registry=registry,
        )  # fmt: skip
        self._fallbacks = Counter(
            "coinfer_device_fallbacks", "Requests that the device answered in the edge's place.", registry=registry
        )
        self._sent = Counter("coinfer_device_sent_bytes", "Requests on the wire.", registry=registry)
        self._latency = Histogram(
            "coinfer_device_latency_seconds", "From handing in a request to its answer.", ("answered",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        self._stages = Histogram(
            "coinfer_device_stage_seconds", "Stages of a request, on the clock of whoever computes them.", ("stage",),
            buckets=_SECONDS, registry=registry,
        )  # fmt: skip
        gauges = {
            "plan": ("The plan in use.", lambda: device.pilot.current),
            "plan_changes": ("Changes of plan so far.", lambda: device.pilot.num_decisions),
            "link_up": ("Whether there is a link.", lambda: device.pilot.is_up),
            "link_lost": ("Links lost so far.", lambda: device.keeper.num_lost),
            "uplink_bits_per_second": ("The uplink as it is known.", lambda: device.pilot.uplink_bps(device.now_s())),
            "edge_load": (
                "How many times as long as measured the edge takes.",
                lambda: device.pilot.edge_load(device.now_s()),
            ),
        }
        for name, (text, value) in gauges.items():
            Gauge(f"coinfer_device_{name}", text, registry=registry).set_function(value)

    def serve(self, port: int) -> None:
        """Show the counts at http://127.0.0.1:PORT/metrics, from a thread of its own.

        Raises:
            LinkError: the port is in use, or cannot be listened on.
        """
        try:
            start_http_server(port, LOOPBACK, registry=self.registry)
        except OSError as error:
            reason = (error.strerror or str(error)).lower()
            raise LinkError(f"cannot show metrics on {LOOPBACK}:{port}: {reason}") from error

    def answered(self, answer: Answer) -> None:
        """A request is over."""
        outcome = answer.outcome
        self._requests.labels(outcome.answered, str(outcome.plan)).inc()
        if outcome.answered == "fallback":
            self._fallbacks.inc()
        self._sent.inc(outcome.wire_bytes)
        self._latency.labels(outcome.answered).observe(outcome.latency_s)
        for span in answer.spans:
            self._stages.labels(span.stage).observe(max(0.0, span.end_s - span.start_s))
