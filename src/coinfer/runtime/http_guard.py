"""The edge's HTTP and WebSocket front against peers that mean harm: whoever is slow, endless or malformed is cut off.

uvicorn's protocols do the work; these hold them to limits that uvicorn does not have:

    HTTP         a request's head within `hello_s`, all of it within `idle_s`, whatever comes in between
    WebSocket    no more fragments, messages in wait or unread answers than `MAX_*`; text that is UTF-8
    both         whoever takes nothing of what is sent for `hello_s`, or does not let go, is cut off

Times are looked at once a second by the server (`overdue`), so that no connection has timers of its own.  What is
wrong is one line in the log, with the peer.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.protocols.websockets.websockets_sansio_impl import WebSocketsSansIOProtocol
from websockets.frames import CloseCode, Frame

from ..protocol.messages import one_line

if TYPE_CHECKING:
    from uvicorn.config import Config

    from .app import Edge, EdgeLimits

_LOG = logging.getLogger("coinfer.edge")
HEAD_BYTES = 16384
MAX_FRAGMENTS = 1024
# Of one connection, read together and not yet taken: reading stops behind them, but they have come already.
MAX_QUEUED = 16384


class _Denied(logging.Filter):
    """Drops what uvicorn says behind every denial of a handshake: the refusal itself has its line."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a line is to be seen."""
        return not record.getMessage().startswith("ASGI callable returned without completing handshake")


logging.getLogger("uvicorn.error").addFilter(_Denied())


class _Pressure:
    """Since when a transport has got rid of nothing, where it ought to."""

    def __init__(self) -> None:
        self._left = 0
        self._since_s: float | None = None

    def stuck_s(self, transport: asyncio.Transport, now_s: float, *, is_paused: bool) -> float:
        """For how long; nothing is added to what waits while it is paused, so less of it is progress."""
        if not (is_paused or transport.is_closing()):
            self._since_s = None
            return 0.0
        left = transport.get_write_buffer_size()
        if self._since_s is None or left < self._left:
            self._since_s = now_s
        self._left = left
        return now_s - self._since_s


class GuardedHttp(H11Protocol):
    """uvicorn's HTTP/1.1, with limits."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits: EdgeLimits = self.config.app.state.edge.max_limits  # type: ignore[union-attr]
        self._pressure = _Pressure()
        self._since_s = self.loop.time()
        self._state: object = None

    def overdue(self, now_s: float) -> str | None:
        """Why this connection is to be cut off now; None where it is not."""
        limits = self._limits
        if self._pressure.stuck_s(self.transport, now_s, is_paused=self.flow.write_paused) > limits.hello_s:
            return f"it took nothing of what was sent for {limits.hello_s:g} s"
        if (state := self.conn.their_state) is not self._state:
            self._state, self._since_s = state, now_s
        waited_s = now_s - self._since_s
        if state is h11.IDLE and waited_s > limits.hello_s:
            return f"no whole request within {limits.hello_s:g} s"
        if state is h11.SEND_BODY and waited_s > limits.idle_s:
            return f"a request's body was not there within {limits.idle_s:g} s"
        return None

    def send_400_response(self, msg: str) -> None:
        """Say so, where that can still be said, and close."""
        _LOG.warning("closed the connection of %s: %s", peer_of(self), msg, extra={"peer": peer_of(self)})
        if self.cycle is not None and not self.cycle.response_complete:
            # Whoever is about to answer the request finds nobody there, instead of a connection that is over.
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        try:
            super().send_400_response(msg)
        except h11.LocalProtocolError:
            # An answer is on its way already, so that another would be read as its rest.
            self.transport.abort()

    def shutdown(self) -> None:
        """End when the answer that is on its way is out."""
        try:
            super().shutdown()
        except h11.LocalProtocolError:
            self.transport.abort()


class GuardedWebSocket(WebSocketsSansIOProtocol):
    """uvicorn's WebSocket, with limits; messages longer than `ws_max_size` it refuses itself, before they come.

    `ws_max_size` is what the welcome of a connection that is made now will say: after a reload another than before.
    """

    def __init__(self, config: Config, *args: Any, **kwargs: Any) -> None:
        edge: Edge = config.app.state.edge  # type: ignore[union-attr]
        config.ws_max_size = edge.limits.max_message_bytes
        super().__init__(config, *args, **kwargs)
        self._limits = edge.max_limits
        self._pressure = _Pressure()
        self._made_s = self.loop.time()

    def overdue(self, now_s: float) -> str | None:
        """Why this connection is to be cut off now; None where it is not."""
        limits = self._limits
        if self._pressure.stuck_s(self.transport, now_s, is_paused=not self.writable.is_set()) > limits.hello_s:
            return f"it took nothing of what was sent for {limits.hello_s:g} s"
        if not self.handshake_complete and now_s - self._made_s > limits.hello_s:
            return f"no WebSocket came of it within {limits.hello_s:g} s"
        return None

    def data_received(self, data: bytes) -> None:
        """Bytes of the peer."""
        self.conn.receive_data(data)
        if (error := self.conn.parser_exc) is not None:
            self._note(str(error))
            self.handle_parser_exception()
        elif self.conn.handshake_exc is not None and not self.handshake_initiated:
            # What h11 takes for a request may be none to the WebSocket library: nobody would answer it.
            self._note(str(self.conn.handshake_exc))
            self.transport.abort()
        else:
            self.handle_events()

    def handle_cont(self, event: Frame) -> None:
        """One more fragment of a message; empty ones too are counted."""
        if len(self.frames) >= MAX_FRAGMENTS:
            self._violated(CloseCode.MESSAGE_TOO_BIG, f"a message has at most {MAX_FRAGMENTS} fragments")
            return
        super().handle_cont(event)

    def handle_ping(self) -> None:
        """Answer; whoever asks and does not read the answers would have them pile up."""
        if self.writable.is_set():
            super().handle_ping()
        elif not self.transport.is_closing():
            self._note("it pings and reads no answers")
            self.transport.abort()

    def send_receive_event_to_app(self) -> None:
        """A message is whole."""
        if self.curr_msg_data_type == "text" and not _is_utf8(self.frames):
            self._violated(CloseCode.INVALID_DATA, "a text message is not UTF-8")
        elif self.queue.qsize() >= MAX_QUEUED:
            self._violated(CloseCode.POLICY_VIOLATION, f"at most {MAX_QUEUED} messages may come at once")
        else:
            super().send_receive_event_to_app()

    def _violated(self, code: CloseCode, why: str) -> None:
        """Close, once; what else has come is not read."""
        self.frames = []
        if self.close_sent:
            return
        self._note(why)
        self.conn.fail(code, why)
        self.handle_parser_exception()

    def _note(self, why: str) -> None:
        peer = peer_of(self)
        _LOG.warning("closed the link to %s: %s", peer, one_line(why), extra={"peer": peer})


def _is_utf8(parts: list[bytes]) -> bool:
    try:
        b"".join(parts).decode()
    except UnicodeDecodeError:
        return False
    return True


def peer_of(protocol: GuardedHttp | GuardedWebSocket) -> str:
    """HOST:PORT of the other side."""
    return "{}:{}".format(*protocol.client) if protocol.client else "a peer"
