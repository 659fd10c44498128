"""What one request costs beyond its stages: framing, system calls, wake-ups of two processes on this machine."""

from __future__ import annotations

from statistics import median

from safetensors.numpy import load_file

from ..bundle import Bundle
from .device import Device
from .spawn import EdgeProcess

WARMUP = 3


def measure_exchange(bundle: Bundle, *, requests: int = 30) -> float:
    """Median seconds of a request beyond head, encode, decode and tail, over loopback; 0 where no plan has an edge.

    Measured on the first upload plan of the menu (else the first split), with the bundle's own sample pictures.

    Raises:
        LinkError: the edge did not start, or ended.
    """
    plans = [plan for plan in bundle.manifest.menu if plan.kind != "device"]
    if not plans:
        return 0.0
    plan = min(plans, key=lambda plan: plan.kind != "upload")
    pictures = load_file(bundle.path("samples.safetensors"))["pixels"]
    beyond_s = []
    with EdgeProcess(bundle.folder) as edge, Device(bundle, edge=edge.url, plan=plan.number) as device:
        for number in range(WARMUP + requests):
            answer = device.infer(pictures[number % len(pictures)])
            stages = {"head", "encode", "decode", "tail"}
            took_s = sum(span.end_s - span.start_s for span in answer.spans if span.stage in stages)
            beyond_s.append(answer.outcome.latency_s - took_s)
    return max(0.0, median(beyond_s[WARMUP:]))
