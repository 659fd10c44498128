"""Traces of requests at the edge, by OpenTelemetry: one span for each, and in it what its samples did.

    infer                  from its arrival to its answer; below the client's own span, where it names one (W3C
      wait decode tail     traceparent); of a request over HTTP with several samples, these of each of them

OpenTelemetry is an extra: nothing of it is imported before somebody makes a tracer, and an edge without one does
nothing for traces.  Spans are made when a request is over, from the durations that are taken anyway.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UsageError
from .batch import Computed

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider

_STAGES = ("wait", "decode", "tail")
_EXPORTER = "opentelemetry.exporter.otlp.proto.http.trace_exporter"


class Timed(NamedTuple):
    """A request that was computed, and when it came: nanoseconds since 1970."""

    computed: Computed
    arrived_ns: int

    @classmethod
    def now_over(cls, computed: Computed) -> Timed:
        """One that has just been answered."""
        return cls(computed, time.time_ns() - round(1e9 * sum(computed.durations_s)))


class Tracer:
    """Records requests with a provider of the OpenTelemetry SDK."""

    def __init__(self, provider: TracerProvider) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._tracer = provider.get_tracer("coinfer")
        self._context_of = TraceContextTextMapPropagator().extract
        self._context_in = trace.set_span_in_context
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._kind = trace.SpanKind.SERVER

    def record(
        self, samples: Sequence[Timed], *, door: str, device: str, headers: Mapping[str, str] | None = None
    ) -> None:
        """One span of a request that is over.

        Args:
            samples: what it consisted of, at least one; over the link it is one sample itself.
            door: where it came in, "link" or "http".
            device: who asked.
            headers: of HTTP, lower case; a valid traceparent in them is the span's parent.
        """
        first = samples[0].computed.request
        span = self._tracer.start_span(
            "infer",
            context=self._context_of(dict(headers or {})),
            kind=self._kind,
            start_time=min(sample.arrived_ns for sample in samples),
            attributes={
                "coinfer.request": first.request,
                "coinfer.plan": first.plan.number,
                "coinfer.door": door,
                "coinfer.device": device,
                "coinfer.batch": max(sample.computed.batch for sample in samples),
                "coinfer.samples": len(samples),
            },
        )
        context = self._context_in(span)
        end_ns = 0
        for computed, arrived_ns in samples:
            if not computed.durations_s:
                span.set_status(self._failed)
            begin_ns = arrived_ns
            attributes = {"coinfer.request": computed.request.request, "coinfer.batch": computed.batch}
            for stage, took_s in zip(_STAGES, computed.durations_s, strict=False):
                child = self._tracer.start_span(stage, context=context, start_time=begin_ns, attributes=attributes)
                begin_ns += round(1e9 * took_s)
                child.end(begin_ns)
            end_ns = max(end_ns, begin_ns)
        span.end(end_ns)

    def close(self) -> None:
        """Hand over what is left."""
        self._provider.shutdown()


def tracer_to(endpoint: str, *, service: str = "coinfer") -> Tracer:
    """A tracer that sends its spans to a collector, by OTLP over HTTP, in a thread of its own.

    Args:
        endpoint: the collector's, such as "http://127.0.0.1:4318/v1/traces".
        service: the name that the traces carry.

    Raises:
        UsageError: the endpoint is no address of HTTP, or OpenTelemetry is not installed.
    """
    if not endpoint.startswith(("http://", "https://")):
        raise UsageError(f'a collector of traces is http://HOST:PORT/v1/traces, got "{endpoint}"')
    try:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        exporter = importlib.import_module(_EXPORTER).OTLPSpanExporter(endpoint=endpoint)
    except ImportError as error:
        raise UsageError('traces need OpenTelemetry: pip install "coinfer[traces]"') from error
    provider = TracerProvider(resource=Resource.create({"service.name": service}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Tracer(provider)
