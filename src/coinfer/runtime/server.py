"""What carries the app: accepts connections, keeps them to their limits, reloads what may change, drains at the end.

    listener --> [accept: room?] --> [TLS: within hello_s] --> GuardedHttp --> GuardedWebSocket --> app

Connections are accepted here and not by asyncio's own server, so that one that is still shaking hands counts as well,
and so that new ones get the certificates of now while old ones go on.

On SIGHUP certificates, client CA, CRL, tokens and the bundle are read anew; what cannot be read leaves what was, with
one line in the log.  A tokens file that has changed is noticed without a signal.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import socket
import ssl
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.config import STARTUP_FAILURE

from ..bundle import Bundle, read_manifest
from ..errors import CoinferError
from ..protocol.messages import one_line
from ..signature import load_signed_bundle
from .access import Access
from .app import Edge
from .http_guard import HEAD_BYTES, GuardedHttp, GuardedWebSocket, peer_of
from .tokens import Tokens

_LOG = logging.getLogger("coinfer.edge")
# What has been read waits for `EdgeLimits.max_wait_s` at most, and is then computed.
DRAIN_S = 30
_GONE_S = 2
# Sockets beyond those of the links: of HTTP, and of whoever is still at the door.
SPARE_SOCKETS = 64
# uvicorn ticks ten times a second.
_TOKENS_TICKS, _SWEEP_TICKS = 5, 10


class EdgeServer(uvicorn.Server):
    """uvicorn with our own door; `ready` is logged when it listens.

    Raises:
        UsageError: a file of `access.tls` cannot be used.
    """

    def __init__(self, app: Any, listener: socket.socket, access: Access, ready: str) -> None:
        self._edge: Edge = app.state.edge
        self._listener, self._access, self._ready = listener, access, ready
        self._context = None if access.tls is None else access.tls.context()
        self._admitted = None if access.tls is None else access.tls.admission()
        self._era = 0
        self._accepting: asyncio.Task[None] | None = None
        self._admitting: set[asyncio.Task[None]] = set()
        self._changing: set[asyncio.Task[None]] = set()
        self._turned_away = 0
        self._is_reload_wanted = False
        self._reloading = asyncio.Lock()
        config = uvicorn.Config(
            app,
            loop="auto",
            http=GuardedHttp,
            ws=GuardedWebSocket,
            ws_max_size=self._edge.limits.max_message_bytes,
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            ws_ping_timeout=None,
            h11_max_incomplete_event_size=HEAD_BYTES,
            lifespan="on",
            log_config=None,
            log_level="error",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_graceful_shutdown=_GONE_S,
        )
        super().__init__(config)

    def run_until_ended(self) -> None:
        """Serve until SIGTERM or SIGINT, then return."""
        with self._signals():
            self.run()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to accept, and say so."""
        asyncio.get_running_loop().set_exception_handler(_log_in_one_line)
        await self.lifespan.startup()
        if self.lifespan.should_exit:
            sys.exit(STARTUP_FAILURE)
        self.servers = []
        self._listener.setblocking(False)
        self._accepting = asyncio.create_task(self._accept())
        self.started = True
        _LOG.info(self._ready)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Answer what has been read before anything is closed."""
        for task in (self._accepting, *self._admitting, *self._changing):
            if task is not None:
                task.cancel()
        self._listener.close()
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._edge.drain()
        except TimeoutError:
            _LOG.warning("ended with requests unanswered: they took longer than %d s", DRAIN_S)
        await super().shutdown(sockets=sockets)

    async def on_tick(self, counter: int) -> bool:
        """Look at what may have changed, ten times a second."""
        if counter % _TOKENS_TICKS == 0 and isinstance(self._edge.door, Tokens) and self._edge.door.has_changed():
            self._change(self._reload_tokens(self._edge.door))
        if self._is_reload_wanted:
            self._is_reload_wanted = False
            self._change(self._reload())
        if counter % _SWEEP_TICKS == 0:
            self._sweep()
        return await super().on_tick(counter)

    # The door.

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                # Such as no more descriptors: some may be given back soon.
                _LOG.warning("cannot accept connections: %s", one_line(str(error)))
                await asyncio.sleep(0.5)
                continue
            room = self._edge.max_limits.connections + SPARE_SOCKETS
            if len(self._admitting) + len(self.server_state.connections) >= room:
                self._turned_away += 1
                connection.close()
                continue
            task = asyncio.create_task(self._admit(connection, "{}:{}".format(*address[:2])))
            self._admitting.add(task)
            task.add_done_callback(self._admitting.discard)

    async def _admit(self, connection: socket.socket, peer: str) -> None:
        """Shake hands with one peer, and leave it to its protocol."""
        loop, context, era = asyncio.get_running_loop(), self._context, self._era
        hello_s = self._edge.max_limits.hello_s
        options = {} if context is None else {"ssl_handshake_timeout": hello_s, "ssl_shutdown_timeout": hello_s}
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            transport, _ = await loop.connect_accepted_socket(self._protocol, connection, ssl=context, **options)
        except (ssl.SSLError, OSError) as error:
            connection.close()
            why = one_line(getattr(error, "reason", None) or str(error) or "it hung up")
            self._edge.refusals.note(peer, f"no TLS came of it: {why}")
            self._edge.metrics.refused("tls")
            return
        if era != self._era:
            # It was admitted by a client CA or a CRL that is no longer the one of now.
            transport.abort()

    def _protocol(self) -> asyncio.Protocol:
        return GuardedHttp(config=self.config, server_state=self.server_state, app_state=self.lifespan.state)

    def _sweep(self) -> None:
        """Cut off whoever keeps a connection and does not do his part."""
        now_s = asyncio.get_running_loop().time()
        for connection in [*self.server_state.connections]:
            assert isinstance(connection, GuardedHttp | GuardedWebSocket)
            why = connection.overdue(now_s)
            if why is not None:
                peer = peer_of(connection)
                _LOG.warning("closed the connection of %s: %s", peer, why, extra={"peer": peer})
                connection.transport.abort()
        self._edge.refusals.sum_up()
        if self._turned_away:
            _LOG.warning("turned away %d connections: this edge has as many as it takes", self._turned_away)
            self._edge.metrics.refused("connections", self._turned_away)
            self._turned_away = 0

    # What may change.

    def _change(self, work: Any) -> None:
        task = asyncio.create_task(work)
        self._changing.add(task)
        task.add_done_callback(self._changing.discard)

    async def _reload(self) -> None:
        async with self._reloading:
            if isinstance(self._edge.door, Tokens):
                await self._reload_tokens(self._edge.door)
            await self._reload_tls()
            await self._reload_bundle()

    async def _reload_tokens(self, door: Tokens) -> None:
        try:
            is_lost = door.reload()
        except CoinferError as error:
            _LOG.error("kept the tokens of before: %s", one_line(str(error)))
            return
        _LOG.info("tokens are read anew: %d devices", len(door))
        if is_lost:
            await self._edge.dismiss("its token is revoked", unknown_only=True)

    async def _reload_tls(self) -> None:
        tls = self._access.tls
        if tls is None:
            return
        try:
            context, admitted = tls.context(), tls.admission()
        except CoinferError as error:
            _LOG.error("kept the certificates of before: %s", one_line(str(error)))
            return
        self._context = context
        _LOG.info("certificates are read anew")
        if admitted == self._admitted:
            return
        # Which certificate a connection was admitted by is not known any more: all have to come in again.
        before = {*self.server_state.connections}
        self._admitted, self._era = admitted, self._era + 1
        try:
            async with asyncio.timeout(DRAIN_S):
                await self._edge.dismiss("certificates were revoked: connect again")
        except TimeoutError:
            _LOG.warning("connections were cut with requests unanswered: they took longer than %d s", DRAIN_S)
        for connection in before & self.server_state.connections:
            connection.shutdown()

    async def _reload_bundle(self) -> None:
        folder = self._edge.bundle.folder
        try:
            if hashlib.sha256(read_manifest(folder)).hexdigest() == self._edge.bundle.digest:
                return
            fresh: Bundle = await asyncio.to_thread(load_signed_bundle, folder, self._access.verify_key)
            await self._edge.reload(fresh)
        except (CoinferError, OSError) as error:
            _LOG.error("kept the bundle of before: %s", one_line(str(error)))
            return
        _LOG.info("serves bundle %.12s now, %d plans", fresh.digest, len(fresh.manifest.menu))

    def _want_reload(self, number: int, frame: FrameType | None) -> None:
        self._is_reload_wanted = True

    @contextmanager
    def _signals(self) -> Iterator[None]:
        """While entered, SIGHUP reloads, and a signal that ended uvicorn does not end the process as well."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        hangup = getattr(signal, "SIGHUP", None)
        wanted = {signal.SIGINT: _say_by_what, signal.SIGTERM: _say_by_what}
        wanted |= {} if hangup is None else {hangup: self._want_reload}
        before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _say_by_what(number: int, frame: FrameType | None) -> None:
    _LOG.info("ended by %s", signal.Signals(number).name)


def _log_in_one_line(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """What nobody expected in a callback; its connection is closed by the loop."""
    error = context.get("exception")
    _LOG.error("%s: %s", context.get("message"), one_line(repr(error)), exc_info=error)
