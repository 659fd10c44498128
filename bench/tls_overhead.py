"""What TLS and a token cost: the same requests to an edge in the clear and to one behind both, one after the other.

    python -m bench.tls_overhead --requests 2000 --bundle out/demo/bundle

Two edges on loopback, two devices of this process, one plan.  Requests take turns, so that whatever else the machine
does meets both.  Latency is from handing in a request to holding its answer; a pair's difference is of two requests
that followed each other.  Bytes are counted on links without a limit, in a run of its own: those of TCP's payload, each
way, and the same with TCP/IP's headers.  The time that a connection takes is from nothing to the welcome.

Written: tls.json with the figures, tls.jsonl.gz with a line for each pair of requests.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import numpy as np

from coinfer.bundle import Bundle, load_bundle
from coinfer.lab.shape import Counts, ShapedLink
from coinfer.profile import Link
from coinfer.protocol import Terms
from coinfer.runtime.certificates import make_test_ca
from coinfer.runtime.channel import Channel
from coinfer.runtime.device import Device
from coinfer.runtime.spawn import EdgeProcess
from coinfer.runtime.tls import DeviceTls
from coinfer.runtime.tokens import add_token

from .answers import pictures_of
from .figures import RAW, keep_figures, rounded

WARMUP = 50
CONNECTIONS = 100
COUNTED = 200
FREE = Link(rate_bps=1e10)
WAYS = ("plain", "secure")


class Edge(NamedTuple):
    """One of the two edges, and what a device needs for it."""

    url: str
    options: dict[str, Any]

    @property
    def target(self) -> tuple[str, int]:
        """Host and port."""
        found = urlsplit(self.url)
        assert found.hostname is not None and found.port is not None
        return found.hostname, found.port

    def through(self, link: ShapedLink) -> str:
        """The same edge by way of a link."""
        return f"{urlsplit(self.url).scheme}://127.0.0.1:{link.port}"


def edges(stack: ExitStack, bundle: Bundle, folder: Path) -> dict[str, Edge]:
    """Both edges, for as long as the stack holds."""
    make_test_ca(folder / "certs", ["127.0.0.1"])
    token, certs = add_token(folder / "tokens.json", "bench"), folder / "certs"
    options: tuple[str, ...] = ("--cert", str(certs / "server.pem"), "--key", str(certs / "server.key"))
    plain = stack.enter_context(EdgeProcess(bundle.folder))
    options = (*options, "--tokens", str(folder / "tokens.json"))
    secure = stack.enter_context(EdgeProcess(bundle.folder, options=options))
    tls = DeviceTls(ca=certs / "ca.pem")
    return {"plain": Edge(plain.url, {}), "secure": Edge(secure.url, {"token": token, "tls": tls})}


def latencies(bundle: Bundle, both: dict[str, Edge], plan: int, requests: int) -> list[dict[str, Any]]:
    """A line for each pair of requests, which begins with the one or the other in turn."""
    pictures = pictures_of(bundle)
    lines = []
    with ExitStack() as stack:
        devices = {
            way: stack.enter_context(Device(bundle, edge=edge.url, plan=plan, **edge.options))
            for way, edge in both.items()
        }
        for number in range(WARMUP + requests):
            line: dict[str, Any] = {}
            for way in WAYS if number % 2 == 0 else reversed(WAYS):
                outcome = devices[way].infer(pictures[number % len(pictures)]).outcome
                line[f"{way}_s"] = rounded(outcome.latency_s)
            if number >= WARMUP:
                lines.append({"pair": number - WARMUP, **line})
    return lines


def set_up_times(bundle: Bundle, both: dict[str, Edge], count: int) -> dict[str, list[float]]:
    """Seconds until a connection is agreed on, in turns."""
    terms, found = Terms.of(bundle), dict[str, list[float]]({way: [] for way in WAYS})
    for _ in range(count):
        for way, edge in both.items():
            begun_s = time.perf_counter()
            channel = Channel(edge.url, terms, timeout_s=10.0, **edge.options)
            found[way].append(time.perf_counter() - begun_s)
            channel.close()
    return found


def counted(bundle: Bundle, edge: Edge, plan: int, requests: int) -> dict[str, Any]:
    """Bytes of a connection that is made, and of each request behind it."""
    pictures = pictures_of(bundle)
    with ShapedLink(edge.target, link=FREE) as link:
        with Device(bundle, edge=edge.through(link), plan=plan, **edge.options) as device:
            # One request, so that what TLS sends behind its handshake has come.
            first = device.infer(pictures[0]).outcome
            begin = link.counts()
            payload = sum(device.infer(pictures[k % len(pictures)]).outcome.payload_bytes for k in range(requests))
            end = link.counts()
    each = _minus(end, begin)
    return {
        "connection_and_first_request": _bytes(begin, 1), "first_payload_bytes": first.payload_bytes,
        "request": _bytes(each, requests), "payload_bytes": rounded(payload / requests),
    }  # fmt: skip


def _minus(after: Counts, before: Counts) -> Counts:
    return Counts(*(now - then for now, then in zip(after, before, strict=True)))


def _bytes(counts: Counts, requests: int) -> dict[str, float | None]:
    names = ("up_bytes", "down_bytes", "up_wire_bytes", "down_wire_bytes")
    return {name: rounded(getattr(counts, name) / requests) for name in names}


def overhead(bundle: Bundle, requests: int, *, raw: Path = RAW, connections: int = CONNECTIONS) -> dict[str, Any]:
    """Measure all, write what was found, and give the figures."""
    plan = next(plan for plan in bundle.manifest.menu if plan.kind == "upload")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coinfer-tls-")))
        both = edges(stack, bundle, folder)
        lines = latencies(bundle, both, plan.number, requests)
        set_up = set_up_times(bundle, both, connections)
        bytes_of = {way: counted(bundle, edge, plan.number, COUNTED) for way, edge in both.items()}
    difference_ms = [1e3 * (line["secure_s"] - line["plain_s"]) for line in lines]
    of_request, of_first = (
        {way: bytes_of[way][what] for way in WAYS} for what in ("request", "connection_and_first_request")
    )
    figures = {
        "tls_overhead_ms": rounded(median(difference_ms)),
        "tls_overhead_spread_ms": _spread(difference_ms),
        "plan": plan.label,
        "pairs": len(lines),
        "latency_ms": {way: _spread([1e3 * line[f"{way}_s"] for line in lines]) for way in WAYS},
        "set_up_ms": {way: _spread([1e3 * one for one in set_up[way]]) for way in WAYS},
        "bytes": bytes_of,
        "more_bytes": {"request": _more(of_request), "connection_and_first_request": _more(of_first)},
    }
    keep_figures(raw, "tls", figures, lines)
    return figures


def _more(both: dict[str, dict[str, float]]) -> dict[str, float | None]:
    return {name: rounded(both["secure"][name] - both["plain"][name]) for name in both["plain"]}


def _spread(values: Sequence[float]) -> dict[str, float | None]:
    return {f"p{p}": rounded(float(np.percentile(values, p))) for p in (5, 50, 95)}


def main() -> int:
    """0 when it is done."""
    parser = argparse.ArgumentParser(prog="python -m bench.tls_overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=2000, help="pairs")
    parser.add_argument("--bundle", type=Path, default=Path("out/demo/bundle"))
    parser.add_argument("--raw", type=Path, default=RAW)
    given = parser.parse_args()
    figures = overhead(load_bundle(given.bundle), given.requests, raw=given.raw)
    for name in ("tls_overhead_ms", "latency_ms", "set_up_ms", "more_bytes"):
        print(f"{name}: {figures[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
