"""`coinfer serve`: the edge."""

from __future__ import annotations

import logging
import re
import sys
from typing import Annotated

import typer

from ..bundle import Bundle, load_bundle
from ..errors import UsageError
from ..units import parse_duration_s
from .options import BundleFolder, Json
from .output import note, print_json

_READY = re.compile(r"listening on (ws://\S+)")
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def serve(
    bundle: BundleFolder,
    host: Annotated[str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="Port; 0 lets the system choose one.")
    ] = 8300,
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
    json: Json = False,
) -> None:
    """Serve a bundle: the edge.

    Runs until Ctrl-C. It listens on this machine alone unless --host says otherwise. Devices must hold the same bundle:
    both ends compare its hash before anything else. With --json, one object is printed when it listens.
    """
    if not load >= 1:
        raise UsageError(f"--load must be at least 1, got {load:g}")
    loaded = load_bundle(bundle)
    from ..runtime.edge import serve as serve_bundle

    if host not in LOOPBACK:
        note(f"coinfer: whoever reaches {host} can use this edge: there are no tokens yet, keep it behind a firewall")
    _speak(loaded, as_json=json)
    serve_bundle(
        loaded, host=host, port=port, workers=workers, threads=threads,
        max_batch=max_batch, batch_wait_s=parse_duration_s(batch_wait), load=load,
    )  # fmt: skip


def _speak(bundle: Bundle, *, as_json: bool) -> None:
    """Let the edge's log lines appear on stderr, or its address as a JSON object on stdout."""
    log = logging.getLogger("coinfer.edge")
    log.setLevel(logging.INFO)
    log.propagate = False
    log.handlers = [_Announcement(bundle) if as_json else logging.StreamHandler(sys.stderr)]


class _Announcement(logging.Handler):
    """Prints one JSON object when the edge listens; everything else goes to stderr."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__()
        self._bundle = bundle

    def emit(self, record: logging.LogRecord) -> None:
        """One log line."""
        found = _READY.search(record.getMessage())
        if found is None:
            note(record.getMessage())
            return
        plans = [plan.number for plan in self._bundle.manifest.menu]
        print_json({"url": found[1], "bundle": self._bundle.digest, "plans": plans})
        sys.stdout.flush()
