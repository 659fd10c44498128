"""A link on which device and edge have agreed: the protocol's device end over a WebSocket connection."""

from __future__ import annotations

from ..errors import LinkError, ProtocolError
from ..protocol import HEADER_BYTES, Busy, DeviceConnection, Failure, Limits, Ping, Pong, Reply, Terms, Welcome
from .link import Link
from .tls import DeviceTls


class Channel:
    """An agreed connection to the edge at `url`; `token` and `tls` as a `Link`'s.

    `is_watched`: once it is agreed on, somebody else notices that it is silent for too long, and cuts it.
    `frame` and `write` belong to one thread, `read` and `parse` to one other or the same.

    Raises:
        LinkError: no edge there, or it is silent for `timeout_s`.
        ProtocolError: it speaks another protocol.
        RefusedError: it refuses, such as for holding another bundle.
    """

    def __init__(
        self,
        url: str,
        terms: Terms,
        *,
        timeout_s: float,
        token: str | None = None,
        tls: DeviceTls | None = None,
        is_watched: bool = False,
    ) -> None:
        self._connection = DeviceConnection(terms)
        most = terms.max_reply_bytes()
        self._link = Link(url, max_message_bytes=most, timeout_s=timeout_s, token=token, tls=tls)
        self.limits = self._greet()
        if is_watched:
            self._link.wait_on()

    def _greet(self) -> Limits:
        agreed: Welcome | None = None
        try:
            self._say_hello()
            greeting = self._connection.receive(self._link.read())
            if not isinstance(greeting, Welcome):
                raise ProtocolError(f"the first message is no greeting ({self._link.url})")
            agreed = greeting
            return agreed.limits
        finally:
            if agreed is None:
                self._link.close()

    def _say_hello(self) -> None:
        try:
            self._link.write(self._link.frame(self._connection.hello()))
        except LinkError as error:
            # An edge may refuse before it is greeted, and close: its reason has come, and is read next.
            if isinstance(error.__cause__, TimeoutError):
                raise

    def frame(self, request: int, plan: int, payload: bytes) -> tuple[bytes, int]:
        """The bytes that carry one request, ready for `write`, and the length of its message.

        Raises:
            LinkError: the connection is closed, or the edge does not take that many bytes.
        """
        if (size := HEADER_BYTES + len(payload)) > self.limits.max_message_bytes:
            raise LinkError(f"the edge takes messages up to {self.limits.max_message_bytes} B, got {size} B")
        message = self._connection.request(request, plan, payload)
        return self._link.frame(message), len(message)

    def forget(self, request: int) -> None:
        """What `frame` made for a request is not sent."""
        self._connection.forget(request)

    def warm_up(self, payload: bytes) -> None:
        """Frame a message for nothing."""
        self._link.frame(payload)

    def write(self, frame: bytes) -> None:
        """Send what `frame` made.

        Raises:
            LinkError: the connection broke, or takes nothing for `timeout_s`.
        """
        self._link.write(frame)

    def read(self) -> bytes | str:
        """The edge's next message, to be given to `parse`.

        Raises:
            LinkError: the connection broke, or is silent for `timeout_s`.
        """
        return self._link.read()

    def parse(self, message: bytes | str) -> Reply | Failure | Busy | Pong | None:
        """What a message means; None where it was a heartbeat, answered here.

        Raises:
            ProtocolError: it is not one of this protocol, or answers what was not asked.
        """
        event = self._connection.receive(message)
        if isinstance(event, Ping):
            self._link.write(self._link.frame(self._connection.pong(event.token)))
            return None
        if isinstance(event, Welcome):
            raise ProtocolError("a second welcome (from the edge)")
        return event

    def rehearse(self, message: bytes | str) -> None:
        """Read a message for nothing: `parse` may do it after that."""
        self._connection.rehearse(message)

    def ping(self, token: int, *, padding: int = 0) -> None:
        """Send a heartbeat, of `padding` bytes beyond its header; its Pong comes by `read` and `parse`."""
        self._link.write(self._link.frame(self._connection.ping(token, padding=padding)))

    def is_open(self) -> bool:
        """Whether the connection stands, as far as can be known without waiting."""
        return self._link.is_open()

    def abort(self) -> None:
        """Cut the connection from any thread."""
        self._link.abort()

    def close(self) -> None:
        """Say goodbye and close; no thread may be reading or writing."""
        self._link.close()
