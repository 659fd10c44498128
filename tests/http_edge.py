"""An edge's app on a port of this machine, in this process, and plain HTTP to ask it."""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn

from coinfer.runtime.edge import Access, listen
from coinfer.runtime.server import EdgeServer

PATIENCE_S = 30


@contextlib.contextmanager
def serving(app: Any) -> Iterator[tuple[str, uvicorn.Server]]:
    """HOST:PORT of an app, and what carries it in a thread while the block lasts: of an edge its own server."""
    with listen("127.0.0.1", 0) as listener:
        where = f"127.0.0.1:{listener.getsockname()[1]}"
        if hasattr(app.state, "edge"):
            server: uvicorn.Server = EdgeServer(app, listener, Access(), "listening")
        else:
            server = uvicorn.Server(uvicorn.Config(app, http="h11", lifespan="on", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield where, server
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def served(app: Any) -> Iterator[str]:
    """HOST:PORT of an app that runs for as long as the block lasts."""
    with serving(app) as (where, _):
        yield where


def ask(
    where: str, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers (lower case) and body of one request."""
    connection = http.client.HTTPConnection(where, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        answer = connection.getresponse()
        return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
