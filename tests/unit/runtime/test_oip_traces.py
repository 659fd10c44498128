"""Traces of requests, as OpenTelemetry's own exporter in memory sees them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from coinfer.bundle import Bundle
from coinfer.errors import UsageError
from coinfer.protocol import Request
from coinfer.runtime.app import make_app
from coinfer.runtime.batch import Computed
from coinfer.runtime.device import Device
from coinfer.runtime.traces import Timed, Tracer, tracer_to
from http_edge import ask, served
from tiny_bundle import SPLIT32, UPLOAD, pictures

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{PARENT}-01"


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def tracer(exporter: InMemorySpanExporter) -> Tracer:
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return Tracer(provider)


def times(span: ReadableSpan) -> tuple[int, int]:
    assert span.start_time is not None and span.end_time is not None
    return span.start_time, span.end_time


def test_a_request_is_one_span_with_its_stages(
    tiny_bundle: Bundle, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    plan = tiny_bundle.plan(UPLOAD)
    computed = Computed(Request(7, plan, b""), b"", (0.25, 0.5, 1.0), batch=3)
    tracer.record([Timed(computed, 10**18)], door="link", device="camera-7")
    *stages, whole = exporter.get_finished_spans()
    assert whole.name == "infer" and whole.kind is SpanKind.SERVER and whole.parent is None
    assert dict(whole.attributes or {}) == {
        "coinfer.request": 7, "coinfer.plan": UPLOAD, "coinfer.door": "link", "coinfer.device": "camera-7",
        "coinfer.batch": 3, "coinfer.samples": 1,
    }  # fmt: skip
    quarter = 250_000_000
    assert times(whole) == (10**18, 10**18 + 7 * quarter)
    assert [(span.name, times(span)) for span in stages] == [
        ("wait", (10**18, 10**18 + quarter)),
        ("decode", (10**18 + quarter, 10**18 + 3 * quarter)),
        ("tail", (10**18 + 3 * quarter, 10**18 + 7 * quarter)),
    ]
    assert all(span.parent == whole.context for span in stages)
    assert whole.status.status_code is StatusCode.UNSET


def test_several_samples_are_one_span_and_a_failure_is_its_status(
    tiny_bundle: Bundle, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    plan = tiny_bundle.plan(UPLOAD)
    good, bad = (Computed(Request(k, plan, b""), b"", s) for k, s in ((1, (0.0, 0.0, 2.0)), (2, ())))
    tracer.record([Timed(good, 2 * 10**9), Timed(bad, 10**9)], door="http", device="x")
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["wait", "decode", "tail", "infer"]
    assert times(spans[-1]) == (10**9, 4 * 10**9)
    assert spans[-1].status.status_code is StatusCode.ERROR


def test_over_http_a_clients_span_is_the_parent(
    tiny_bundle: Bundle, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    app = make_app(tiny_bundle, tracer=tracer)
    headers = {"traceparent": TRACEPARENT, "Inference-Header-Content-Length": "0"}
    with served(app) as where:
        assert ask(where, "POST", "/v2/models/tiny/infer", pictures(2).tobytes(), headers)[0] == 200
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["wait", "decode", "tail"] * 2 + ["infer"]
    parent, context = spans[-1].parent, spans[-1].context
    assert parent is not None and context is not None
    assert (f"{parent.trace_id:032x}", f"{parent.span_id:016x}") == (TRACE, PARENT)
    assert {f"{span.context.trace_id:032x}" for span in spans if span.context is not None} == {TRACE}
    attributes = spans[-1].attributes or {}
    assert attributes["coinfer.door"] == "http" and attributes["coinfer.samples"] == 2
    assert attributes["coinfer.plan"] == UPLOAD


@pytest.mark.parametrize("traceparent", ["", "x", f"00-{'0' * 32}-{PARENT}-01", "00-" + "f" * 500])
def test_a_traceparent_that_is_none_begins_a_trace(
    tiny_bundle: Bundle, tracer: Tracer, exporter: InMemorySpanExporter, traceparent: str
) -> None:
    computed = Computed(Request(7, tiny_bundle.plan(UPLOAD), b""), b"", (0.0, 0.0, 0.0))
    tracer.record([Timed(computed, 1)], door="http", device="x", headers={"traceparent": traceparent})
    assert exporter.get_finished_spans()[-1].parent is None


def test_an_edge_without_traces_loads_nothing_of_them() -> None:
    program = "import sys, coinfer.runtime.edge\nprint([name for name in sys.modules if 'opentelemetry' in name])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "[]\n")


def test_a_collector_is_an_address(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match='a collector of traces is http://HOST:PORT/v1/traces, got "here"'):
        tracer_to("here")


def test_without_the_extra_a_collector_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.exporter.otlp.proto.http.trace_exporter", None)
    with pytest.raises(UsageError, match=r'traces need OpenTelemetry: pip install "coinfer\[traces\]"'):
        tracer_to("http://127.0.0.1:4318/v1/traces")


def test_requests_over_the_link_are_traced_too(
    tiny_bundle: Bundle, tracer: Tracer, exporter: InMemorySpanExporter
) -> None:
    with served(make_app(tiny_bundle, tracer=tracer)) as where:
        with Device(tiny_bundle, edge=f"ws://{where}", plan=SPLIT32, timeout_s=30) as device:
            for picture in pictures(2):
                device.infer(picture)
    spans = exporter.get_finished_spans()
    assert [span.name for span in spans] == ["wait", "decode", "tail", "infer"] * 2
    for span in (spans[3], spans[7]):
        attributes = span.attributes or {}
        assert (attributes["coinfer.door"], attributes["coinfer.plan"]) == ("link", SPLIT32)
        assert span.parent is None and str(attributes["coinfer.device"]).startswith("127.0.0.1:")
