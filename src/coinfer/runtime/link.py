"""The device's side of one WebSocket connection, over a blocking socket of its own.

A request's answer is read in the thread that waits for it, so no request pays for a hop between threads:
the framing is the websockets library's Sans-I/O protocol, the input and output are here.  One thread may
write while another reads (a stream does); each direction belongs to one thread at a time.

Compression is off, Nagle's algorithm is off, and no call waits for longer than `timeout_s` without a sign of the other
side.  Whatever the other side sends, what is kept of it is bounded: the message size is capped before anything is
allocated, and so are the fragments of a message, the messages that nobody has read and the answers that wait.

`wss://` is TLS (see `tls`), and a token goes with the request that begins the connection.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections import deque
from contextlib import nullcontext, suppress

from websockets.client import ClientProtocol
from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI
from websockets.frames import Frame, Opcode
from websockets.protocol import State
from websockets.uri import WebSocketURI, parse_uri

from ..errors import LinkError, ProtocolError, RefusedError, UsageError
from ..protocol.messages import one_line
from .addresses import is_loopback
from .tls import DeviceTls, TlsSocket, is_readable

RECEIVE_BYTES = 65536
GOODBYE_CODE = 1000
PROTOCOL_ERROR_CODE = 1002
# Of one message; of answers that wait behind a write; of reads for knowing whether the link stands.
MAX_FRAGMENTS = 1024
MAX_WAITING = 1024
_MAX_GLANCES = 64
_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)
_LOG = logging.getLogger("coinfer.device")
_QUIET = logging.getLogger("coinfer.link")


class Link:
    """An open connection to `url` (ws://HOST:PORT, or wss:// for TLS); messages out, messages in.

    Args:
        url: where the edge listens.
        max_message_bytes: no message of the edge may be longer.
        timeout_s: the longest silence.
        token: what the edge knows this device by.
        tls: whom to trust at a wss:// address; the system's CAs by default.

    Raises:
        UsageError: the url is not a WebSocket address, a file of `tls` cannot be used, or it is given without TLS.
        LinkError: nobody answers there within `timeout_s`, or somebody whose certificate is not trusted.
        RefusedError: the edge does not know the token.
        ProtocolError: somebody answers who does not speak WebSocket.
    """

    def __init__(
        self,
        url: str,
        *,
        max_message_bytes: int,
        timeout_s: float,
        token: str | None = None,
        tls: DeviceTls | None = None,
    ) -> None:
        self.url = url
        self._timeout_s = timeout_s
        self._inbox: deque[str | bytes] = deque()
        self._fragments: list[bytes] = []
        self._is_text = False
        self._outbox: deque[bytes] = deque()
        self._writing = threading.Lock()
        uri = _parse(url)
        self._protocol = ClientProtocol(uri, max_size=max_message_bytes, logger=_QUIET)
        self._socket = self._dial(uri, tls)
        is_open = False
        try:
            self._upgrade(token)
            is_open = True
        finally:
            if not is_open:
                self._socket.close()

    def frame(self, message: str | bytes) -> bytes:
        """The bytes that carry one message: its WebSocket frame, masked as a client must.

        Raises:
            LinkError: the connection is closed.
        """
        if self._protocol.state is not State.OPEN:
            raise self._closed()
        if isinstance(message, str):
            return Frame(Opcode.TEXT, message.encode()).serialize(mask=True)
        return Frame(Opcode.BINARY, message).serialize(mask=True)

    def write(self, frame: bytes) -> None:
        """Hand bytes made by `frame` to the system; waits while the link takes no more.

        Raises:
            LinkError: the connection broke, or takes nothing for `timeout_s`.
        """
        self._outbox.append(frame)
        self._flush()

    def read(self) -> str | bytes:
        """The next whole message.

        Raises:
            LinkError: the connection broke or was closed, or nothing came for `timeout_s`.
            ProtocolError: what came is not WebSocket, or the edge closed for our violation of the protocol.
        """
        while not self._inbox:
            self._advance()
        return self._inbox.popleft()

    def wait_on(self) -> None:
        """From now on no silence breaks the connection: whoever watches over it cuts it by `abort`."""
        self._socket.settimeout(None)

    def is_open(self) -> bool:
        """Whether the connection still stands, as far as this side can know without waiting."""
        try:
            for _ in range(_MAX_GLANCES):
                if self._inbox or self._protocol.state is not State.OPEN or not self._is_readable():
                    break
                self._advance()
        except LinkError:
            return False
        return self._protocol.state is State.OPEN

    def abort(self) -> None:
        """Cut the connection from any thread; whoever waits in `read` or `write` gets a LinkError at once."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Say goodbye and close, without waiting; no thread may be in `read` or `write` any more."""
        if self._protocol.state is State.OPEN and self._socket.fileno() >= 0:
            self._protocol.send_close(GOODBYE_CODE)
            self._socket.settimeout(0.0)
            with suppress(LinkError):
                self._take()
                self._flush()
        self.abort()
        self._socket.close()

    def _is_readable(self) -> bool:
        return self._socket.is_readable() if isinstance(self._socket, TlsSocket) else is_readable(self._socket)

    def _dial(self, uri: WebSocketURI, tls: DeviceTls | None) -> socket.socket | TlsSocket:
        if tls is not None and not uri.secure:
            raise UsageError(f'a CA or a certificate is for an edge at wss://HOST:PORT, got "{self.url}"')
        context = (tls or DeviceTls()).context() if uri.secure else None
        link = self._connect(uri)
        if context is None:
            return link
        try:
            return TlsSocket(link, context, uri.host, timeout_s=self._timeout_s, url=self.url)
        except BaseException:
            link.close()
            raise

    def _connect(self, uri: WebSocketURI) -> socket.socket:
        try:
            link = socket.create_connection((uri.host, uri.port), timeout=self._timeout_s)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return link
        except TimeoutError as error:
            raise LinkError(f"no edge answers at {self.url} within {self._timeout_s:g} s") from error
        except (OSError, UnicodeError) as error:
            reason = (getattr(error, "strerror", None) or str(error)).lower()
            raise LinkError(f"no edge at {self.url}: {reason}; `coinfer serve` starts one") from error

    def _upgrade(self, token: str | None) -> None:
        """Exchange the HTTP request and response that begin a WebSocket connection, within `timeout_s`."""
        request = self._protocol.connect()
        if token is not None:
            with suppress(OSError):
                if not isinstance(self._socket, TlsSocket) and not is_loopback(self._socket.getpeername()[0]):
                    _LOG.warning("the token goes to %s in the clear, without TLS", self.url)
            request.headers["Authorization"] = f"Bearer {token}"
        self._protocol.send_request(request)
        self._take()
        try:
            self._ask()
        except LinkError as broken:
            if isinstance(self._socket, TlsSocket) and isinstance(broken.__cause__, ConnectionError):
                raise self._turned_away() from broken
            raise
        error = self._protocol.handshake_exc
        if isinstance(self._socket, TlsSocket) and error is not None and isinstance(error.__cause__, EOFError):
            raise self._turned_away() from error
        if isinstance(error, InvalidStatus) and error.response.status_code == 401:
            known = "a token, and was given none" if token is None else "another token than was given"
            raise RefusedError(f"the edge at {self.url} wants {known}") from error
        if isinstance(error, InvalidStatus):
            raise ProtocolError(
                f"{self.url} answers HTTP {error.response.status_code}: a web server, but no edge of coinfer"
            ) from error
        if isinstance(error, InvalidHandshake):
            cause = f": {error.__cause__}" if error.__cause__ is not None else ""
            raise ProtocolError(f"{self.url} does not speak WebSocket: {error}{cause}") from error
        if error is not None:
            raise self._broken(f"no WebSocket came of it: {error}") from error
        self._collect()

    def _ask(self) -> None:
        """Send the request, and read until there is a response to it or the connection ends."""
        deadline_s = time.monotonic() + self._timeout_s
        self._flush()
        while self._protocol.state is State.CONNECTING and self._protocol.handshake_exc is None:
            self._socket.settimeout(max(0.001, deadline_s - time.monotonic()))
            self._receive()
        self._socket.settimeout(self._timeout_s)

    def _turned_away(self) -> LinkError:
        """An edge that is not content with a client's certificate hangs up when TLS seems agreed."""
        return LinkError(
            f"the edge at {self.url} hung up behind TLS: it may want a client certificate, or have revoked this one"
        )

    def _advance(self) -> None:
        """Read once from the socket and sort what came."""
        if self._protocol.state is State.OPEN:
            self._receive()
            self._collect()
        if not self._inbox and self._protocol.state is not State.OPEN:
            raise self._closed()

    def _receive(self) -> None:
        try:
            data = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            raise self._broken(f"silent for {self._timeout_s:g} s") from error
        except OSError as error:
            raise self._broken((error.strerror or str(error)).lower()) from error
        if not data:
            self._protocol.receive_eof()
            return
        self._protocol.receive_data(data)
        self._take()
        # The answer to a goodbye may find nobody any more; the goodbye itself is what counts.
        with suppress(LinkError) if self._protocol.state is State.CLOSING else nullcontext():
            self._flush()

    def _collect(self) -> None:
        """Put the frames that came together to messages."""
        for event in self._protocol.events_received():
            if not isinstance(event, Frame) or event.opcode not in _DATA:
                continue
            if event.opcode is not Opcode.CONT:
                self._is_text = event.opcode is Opcode.TEXT
            self._fragments.append(bytes(event.data))
            if len(self._fragments) > MAX_FRAGMENTS:
                raise ProtocolError(f"{self.url} sent a message in more than {MAX_FRAGMENTS} fragments")
            if event.fin:
                whole = b"".join(self._fragments)
                self._fragments = []
                self._inbox.append(self._text(whole) if self._is_text else whole)

    def _text(self, data: bytes) -> str:
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a text message is not UTF-8: {error} (from {self.url})") from error

    def _take(self) -> None:
        self._outbox.extend(data for data in self._protocol.data_to_send() if data)
        if len(self._outbox) > MAX_WAITING:
            raise self._broken(f"it asks more than it reads: {MAX_WAITING} answers wait")

    def _flush(self) -> None:
        """Write what is in the outbox, unless another thread is at it: then that one writes ours too."""
        while self._outbox and self._writing.acquire(blocking=False):
            try:
                while self._outbox:
                    self._write_all(self._outbox.popleft())
            finally:
                self._writing.release()

    def _write_all(self, data: bytes) -> None:
        rest = memoryview(data)
        try:
            while rest:
                rest = rest[self._socket.send(rest) :]
        except TimeoutError as error:
            raise self._broken(f"takes nothing for {self._timeout_s:g} s") from error
        except OSError as error:
            raise self._broken((error.strerror or str(error)).lower()) from error

    def _closed(self) -> LinkError:
        """Why the connection is closed, as an error."""
        error, close = self._protocol.parser_exc, self._protocol.close_rcvd
        if close is not None and close.code == PROTOCOL_ERROR_CODE:
            return ProtocolError(f"{self.url} closed the link: {one_line(close.reason) or 'protocol error'}")
        if close is not None:
            return self._broken(f"the edge closed it ({one_line(close.reason) or close.code})")
        if error is not None and not isinstance(error, EOFError):
            return ProtocolError(f"{self.url} sent what WebSocket or the size limit do not allow: {error}")
        return self._broken("the edge is gone")

    def _broken(self, why: str) -> LinkError:
        return LinkError(f"the link to {self.url} broke: {why}")


def _parse(url: str) -> WebSocketURI:
    try:
        return parse_uri(url)
    except (InvalidURI, ValueError) as error:
        raise UsageError(f'an edge is ws://HOST:PORT, or wss://HOST:PORT with TLS, got "{url}"') from error
