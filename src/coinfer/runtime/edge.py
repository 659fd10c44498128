"""The edge as a process: carries the app of `runtime.app` on a port, until a signal ends it.

It binds to loopback unless told otherwise, compresses nothing, caps the size of a message, sends no heartbeat of its
own (a device may ping), and refuses to start on a port that is in use.  Its event loop is uvloop's where that is
installed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from ..bundle import Bundle
from ..errors import LinkError, UsageError
from ..timeline import Timeline
from .app import Edge, EdgeLimits, make_app
from .pace import Pace

__all__ = ["EdgeLimits", "listen", "make_app", "serve", "url_of"]

_LOG = logging.getLogger("coinfer.edge")
DEFAULT_PORT = 8300
LOOPBACK = "127.0.0.1"
DRAIN_S = 5


def serve(
    bundle: Bundle,
    *,
    host: str = LOOPBACK,
    port: int = DEFAULT_PORT,
    workers: int = 1,
    threads: int = 1,
    max_batch: int = 1,
    batch_wait_s: float = 0.0,
    load: float = 1.0,
    pace: Pace | None = None,
    limits: EdgeLimits | None = None,
    timeline: Timeline | None = None,
) -> None:
    """Serve `bundle` until SIGTERM or SIGINT, then return.

    Logs one line `listening on ws://HOST:PORT ...` on logger "coinfer.edge" when it takes connections.
    `port` 0 lets the system choose one.  The other arguments are those of `make_app`.

    Raises:
        UsageError: `port` is not 0 to 65535.
        LinkError: the port is in use, or cannot be listened on.
        BundleError, EngineError, PlanError: as `make_app`.
    """
    listener = listen(host, port)
    with listener:
        app = make_app(
            bundle, workers=workers, threads=threads, max_batch=max_batch, batch_wait_s=batch_wait_s,
            load=load, pace=pace, limits=limits, timeline=timeline,
        )  # fmt: skip
        config = uvicorn.Config(
            app,
            loop="auto",
            http="h11",
            ws="websockets-sansio",
            ws_max_size=app.state.edge.limits.max_message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            ws_ping_timeout=None,
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=DRAIN_S,
        )
        menu = f"bundle {bundle.digest:.12}, {len(bundle.manifest.menu)} plans"
        with _signals_end_quietly():
            _Server(config, f"listening on {url_of(listener)} ({menu})").run(sockets=[listener])


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: `port` is not 0 to 65535.
        LinkError: the port is in use, or cannot be listened on.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"a port must be 0 to 65535, got {port}")
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # Nagle's algorithm is switched off by asyncio only where the protocol is named.
        listener = socket.socket(family, kind, socket.IPPROTO_TCP)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).lower()
        raise LinkError(f"cannot listen on {host}:{port}: {reason}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        listener.bind(address)
        listener.listen()
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise LinkError(f"port {port} of {host} is in use: choose another with --port") from error
        raise LinkError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}") from error
    return listener


def url_of(listener: socket.socket) -> str:
    """What a device gives as its edge."""
    host, port = listener.getsockname()[:2]
    return f"ws://[{host}]:{port}" if ":" in host else f"ws://{host}:{port}"


class _Server(uvicorn.Server):
    """uvicorn, with our one line when it is ready."""

    def __init__(self, config: uvicorn.Config, ready: str) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as ever, and say so."""
        await super().startup(sockets=sockets)
        if self.started:
            _LOG.info(self._ready)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has been read before anything is closed."""
        edge: Edge = self.config.app.state.edge  # type: ignore[union-attr]
        for server in self.servers:
            server.close()
        try:
            async with asyncio.timeout(DRAIN_S):
                await edge.drain()
        except TimeoutError:
            _LOG.warning("ended with requests unanswered: they took longer than %d s", DRAIN_S)
        await super().shutdown(sockets=sockets)


@contextmanager
def _signals_end_quietly() -> Iterator[None]:
    """While entered, a signal that ended uvicorn does not end the process when uvicorn raises it again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ignore(number: int, frame: FrameType | None) -> None:
        _LOG.info("ended by %s", signal.Signals(number).name)

    before = {number: signal.signal(number, ignore) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
