"""The edge as a process: carries the app of `runtime.app` on a port, until a signal ends it.

It binds to loopback unless told otherwise, and beyond it only with TLS and tokens (`access`); it compresses nothing,
caps the size of a message, sends no heartbeat of its own (a device may ping), and refuses to start on a port that is in
use.  Its event loop is uvloop's where that is installed.
"""

from __future__ import annotations

import errno
import logging
import socket

from ..bundle import Bundle
from ..errors import LinkError, UsageError
from ..timeline import Timeline
from .access import Access
from .app import EdgeLimits, make_app
from .memory import keep_heap_whole
from .pace import Pace
from .server import EdgeServer
from .traces import Tracer

__all__ = ["Access", "EdgeLimits", "listen", "make_app", "serve", "url_of"]

_LOG = logging.getLogger("coinfer.edge")
DEFAULT_PORT = 8300
LOOPBACK = "127.0.0.1"


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
    access: Access | None = None,
    tracer: Tracer | None = None,
) -> None:
    """Serve `bundle` until SIGTERM or SIGINT, then return; SIGHUP reloads what may change (`server`).

    Logs one line `listening on ws://HOST:PORT ...` (wss:// with TLS) on logger "coinfer.edge" when it takes
    connections.  `port` 0 lets the system choose one.  The other arguments are those of `make_app`.

    Raises:
        UsageError: `port` is not 0 to 65535, `host` can be reached from elsewhere and `access` does not allow that, or
            a file of `access` cannot be used.
        LinkError: the port is in use, or cannot be listened on.
        BundleError, EngineError, PlanError: as `make_app`.
    """
    access = access or Access()
    keep_heap_whole()
    with _bound(host, port) as listener:
        # Before anybody can connect, and by the address that the name stands for.
        warning = access.check(listener.getsockname()[0])
        if warning is not None:
            _LOG.warning(warning)
        door = access.door()
        if access.tls is not None:
            access.tls.context()
        _listen(listener, host, port)
        app = make_app(
            bundle, workers=workers, threads=threads, max_batch=max_batch, batch_wait_s=batch_wait_s,
            load=load, pace=pace, limits=limits, timeline=timeline, door=door, tracer=tracer,
        )  # fmt: skip
        url = url_of(listener, is_tls=access.tls is not None)
        menu = f"bundle {bundle.digest:.12}, {len(bundle.manifest.menu)} plans"
        EdgeServer(app, listener, access, f"listening on {url} ({menu})").run_until_ended()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket.

    Raises:
        UsageError: `port` is not 0 to 65535.
        LinkError: the port is in use, or cannot be listened on.
    """
    listener = _bound(host, port)
    _listen(listener, host, port)
    return listener


def _bound(host: str, port: int) -> socket.socket:
    """A socket with an address, which nobody can connect to yet.  Raises as `listen`."""
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
    except OSError as error:
        listener.close()
        raise _unusable(error, host, port) from error
    return listener


def _listen(listener: socket.socket, host: str, port: int) -> None:
    try:
        listener.listen()
    except OSError as error:
        listener.close()
        raise _unusable(error, host, port) from error


def _unusable(error: OSError, host: str, port: int) -> LinkError:
    if error.errno == errno.EADDRINUSE:
        return LinkError(f"port {port} of {host} is in use: choose another with --port")
    return LinkError(f"cannot listen on {host}:{port}: {(error.strerror or str(error)).lower()}")


def url_of(listener: socket.socket, *, is_tls: bool = False) -> str:
    """What a device gives as its edge."""
    host, port = listener.getsockname()[:2]
    scheme = "wss" if is_tls else "ws"
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
