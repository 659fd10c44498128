"""`coinfer serve`: the edge."""

from __future__ import annotations

import logging
import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..bundle import Bundle
from ..errors import UsageError
from ..signature import load_signed_bundle
from ..units import parse_duration_s
from .config import ConfigFile
from .logs import log_to_stderr
from .options import BundleFolder, Json
from .output import print_json

_READY = re.compile(r"listening on (wss?://\S+)")
_LOGGERS = ("coinfer.edge", "uvicorn")


def _file(option: str, text: str) -> Any:
    return typer.Option(option, metavar="FILE", help=text, show_default=False)


def serve(
    bundle: BundleFolder,
    config: ConfigFile = None,
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; beyond this machine with TLS and tokens.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 lets the system choose one.")
    ] = 8300,
    cert: Annotated[Path | None, _file("--cert", "TLS: the edge's certificate, PEM.")] = None,
    key: Annotated[Path | None, _file("--key", "TLS: the key of --cert, PEM.")] = None,
    client_ca: Annotated[
        Path | None, _file("--client-ca", "Only devices with a certificate of this CA are let in.")
    ] = None,
    crl: Annotated[Path | None, _file("--crl", "Certificates of --client-ca that are revoked.")] = None,
    tokens: Annotated[
        Path | None, _file("--tokens", "Only devices with a token of this file are let in; `coinfer token`.")
    ] = None,
    insecure: Annotated[
        bool, typer.Option("--insecure", help="Listen beyond this machine without TLS all the same.")
    ] = False,
    verify_key: Annotated[
        Path | None, _file("--verify-key", "Public key that the bundle must be signed with; `coinfer sign`.")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests computed at the same time.")] = 1,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of one segment.")] = 1,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests of one plan that are computed together at most.")
    ] = 1,
    batch_wait: Annotated[
        str, typer.Option("--batch-wait", help="How long a request may wait for others to be computed with.")
    ] = "0ms",
    load: Annotated[
        float, typer.Option("--load", help="Emulate a busy edge: everything takes this many times as long.")
    ] = 1.0,
    max_message_bytes: Annotated[
        int | None,
        typer.Option(
            "--max-message-bytes", min=1, help="Of one message; what the bundle's largest may need by default.",
            show_default=False,
        ),
    ] = None,
    in_flight: Annotated[
        int, typer.Option("--in-flight", min=1, help="Unanswered requests of one connection; it is not read meanwhile.")
    ] = 32,
    connections: Annotated[int, typer.Option("--connections", min=1, help="Of all devices.")] = 256,
    device_connections: Annotated[int, typer.Option("--device-connections", min=1, help="Of one device.")] = 8,
    device_bytes: Annotated[
        int, typer.Option("--device-bytes", min=1, help="Of requests of one device that may wait.")
    ] = 64 << 20,
    body_bytes: Annotated[
        int, typer.Option("--body-bytes", min=1, help="Of one request over HTTP.")
    ] = 16 << 20,
    samples: Annotated[int, typer.Option("--samples", min=1, help="Of one request over HTTP.")] = 256,
    max_wait: Annotated[
        str, typer.Option("--max-wait", help="A request that would wait longer is refused at once.")
    ] = "2s",
    hello: Annotated[
        str, typer.Option("--hello", help="How long a peer may take for TLS, a request's head, a greeting.")
    ] = "10s",
    idle: Annotated[
        str, typer.Option("--idle", help="How long a device may be silent; its heartbeat counts.")
    ] = "120s",
    traces: Annotated[
        str | None,
        typer.Option("--traces", metavar="URL", help="Send traces to this OTLP collector.", show_default=False),
    ] = None,
    log: Annotated[str, typer.Option("--log", help="Log lines on stderr as text or json.")] = "text",
    json: Json = False,
) -> None:
    """Serve a bundle: the edge.

    Runs until Ctrl-C. It listens on this machine alone unless --host says otherwise; any other address needs
    --tokens, and --cert with --key or --insecure. Devices must hold the same bundle: both ends compare its hash before
    anything else. SIGHUP reads certificates, tokens and the bundle's folder anew; a changed tokens file is noticed
    without it. SIGTERM answers what has been read and ends. With --json, one object is printed when it listens.
    """
    if not load >= 1:
        raise UsageError(f"--load must be at least 1, got {load:g}")
    loaded = load_signed_bundle(bundle, verify_key)
    from ..runtime.access import access_of
    from ..runtime.edge import EdgeLimits
    from ..runtime.edge import serve as serve_bundle
    from ..runtime.traces import tracer_to

    limits = EdgeLimits(
        max_message_bytes=max_message_bytes, in_flight=in_flight, connections=connections,
        device_connections=device_connections, device_bytes=device_bytes, body_bytes=body_bytes, samples=samples,
        max_wait_s=parse_duration_s(max_wait), hello_s=parse_duration_s(hello), idle_s=parse_duration_s(idle),
    )  # fmt: skip
    access = access_of(
        cert=cert, key=key, client_ca=client_ca, crl=crl, tokens=tokens, verify_key=verify_key, is_insecure=insecure
    )
    tracer = None if traces is None else tracer_to(traces)
    _speak(loaded, log, as_json=json)
    try:
        serve_bundle(
            loaded, host=host, port=port, workers=workers, threads=threads, max_batch=max_batch,
            batch_wait_s=parse_duration_s(batch_wait), load=load, limits=limits, access=access, tracer=tracer,
        )  # fmt: skip
    finally:
        if tracer is not None:
            tracer.close()


def _speak(bundle: Bundle, form: str, *, as_json: bool) -> None:
    """Let the edge's log lines appear on stderr, and its address as a JSON object on stdout where that is wanted."""
    for name in _LOGGERS:
        log_to_stderr(name, form)
    if as_json:
        handler = logging.getLogger("coinfer.edge").handlers[0]
        handler.addFilter(_Announcement(bundle))


class _Announcement(logging.Filter):
    """Prints one JSON object when the edge listens, in place of the line that says so."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._bundle = bundle

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is a line of the log."""
        found = _READY.search(record.getMessage())
        if found is None:
            return True
        plans = [plan.number for plan in self._bundle.manifest.menu]
        print_json({"url": found[1], "bundle": self._bundle.digest, "plans": plans})
        sys.stdout.flush()
        return False
