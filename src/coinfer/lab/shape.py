"""A shaped link in user space: a TCP proxy with a port of its own, a rate and a delay each way.

    device ---> [ port of the link | uplink: rate, delay   ] ---> target (the edge)
           <--- [                  | downlink: rate, delay ] <---

All arithmetic is in `fluid`; here are sockets and threads only.  Each direction of each connection is
one thread that waits for the next of: something to read, the next delivery's time, room in the
link's buffer.  Connections share the link.  When the buffer (bytes that have not departed) is full,
nothing more is read, the sockets' small buffers fill, and the sender blocks: back-pressure as on a real link.

The link does not lose bytes; TCP would mend a loss by a stall, which `stall` imitates.
"""

from __future__ import annotations

import math
import select
import socket
import struct
import threading
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Literal, NamedTuple, Self

from ..errors import LinkError, PlanError
from ..profile import Link
from .clock import SPIN_S, now_s, sharpen_sleep, wait_until
from .fluid import ConstantRate, Direction, Frames, TraceRate

Way = Literal["up", "down", "both"]
_CHUNK_BYTES = 16384
_SOCKET_BUFFER_BYTES = 65536
_LEAST_BUFFER_BYTES = 16384
_MOST_BUFFER_BYTES = 1 << 20
_BUFFER_S = 0.05
_LINGER_RESET = struct.pack("ii", 1, 0)


class Counts(NamedTuple):
    """What crossed a link: TCP payload bytes, and bytes on the wire (with TCP/IP), each way."""

    up_bytes: int
    down_bytes: int
    up_wire_bytes: int
    down_wire_bytes: int
    connections: int


class _Lane:
    """One direction of the link, shared by its connections."""

    def __init__(self) -> None:
        self.direction = Direction(ConstantRate(math.inf))
        self.buffer_bytes = _MOST_BUFFER_BYTES
        self.held_until_s = -math.inf
        self.lock = threading.Lock()


class ShapedLink:
    """Carries TCP connections from an own port to `target` at the link's rate and delay.

    Args:
        target: host and port of the edge.
        link: rate, delay, down rate; with a trace, the uplink follows it from the moment it is set.
        host, port: where to listen; port 0 takes a free one (see `port`).
        buffer_bytes: how much may wait in each direction before the sender blocks; None takes 50 ms
            of the rate, at least 16 KiB and at most 1 MiB.

    Use it as a context manager; leaving closes every connection and ends every thread.
    """

    def __init__(
        self,
        target: tuple[str, int],
        *,
        link: Link,
        host: str = "127.0.0.1",
        port: int = 0,
        buffer_bytes: int | None = None,
    ) -> None:
        if buffer_bytes is not None and buffer_bytes < 1:
            raise PlanError(f"a link's buffer must have at least 1 B, got {buffer_bytes} (shaped link)")
        self.target = target
        self.link = link
        self.host = host
        self.port = port
        self._buffer_bytes = buffer_bytes
        self._up, self._down = _Lane(), _Lane()
        self._connections: set[_Connection] = set()
        self._connected = 0
        self._lock = threading.Lock()
        self._listener: socket.socket | None = None
        self._stop: tuple[socket.socket, socket.socket] | None = None
        self._acceptor = threading.Thread(target=self._accept, name="shaped-link", daemon=True)
        self.set(link)

    def set(self, link: Link) -> None:
        """Another rate and delay for what arrives from now on; what is under way keeps its time."""
        origin_s = now_s()
        up_rate = ConstantRate(link.rate_bps) if link.trace is None else TraceRate(link.trace, origin_s=origin_s)
        up_bps = link.rate_bps if link.trace is None else max(link.trace.rate_bps)
        down_bps = link.rate_bps if link.down_rate_bps is None else link.down_rate_bps
        self.link = link
        for lane, rate, rate_bps in (
            (self._up, up_rate, up_bps),
            (self._down, ConstantRate(down_bps), down_bps),
        ):
            with lane.lock:
                lane.direction.change(rate, delay_s=link.delay_s)
                buffered = min(max(rate_bps * _BUFFER_S / 8, _LEAST_BUFFER_BYTES), _MOST_BUFFER_BYTES)
                lane.buffer_bytes = int(buffered) if self._buffer_bytes is None else self._buffer_bytes

    def stall(self, duration_s: float, *, way: Way = "both") -> None:
        """Deliver nothing for `duration_s` from now; what arrives meanwhile waits."""
        until_s = now_s() + duration_s
        for name, lane in (("up", self._up), ("down", self._down)):
            if way in (name, "both"):
                with lane.lock:
                    lane.direction.stall(until_s)
                    lane.held_until_s = max(lane.held_until_s, until_s)

    def reset(self) -> None:
        """Break every open connection (both ends see a reset); new ones are taken as before."""
        with self._lock:
            broken = list(self._connections)
        for connection in broken:
            connection.abort()

    def counts(self) -> Counts:
        """Bytes carried so far."""
        up, down = self._up.direction, self._down.direction
        return Counts(up.num_bytes, down.num_bytes, up.wire_bytes, down.wire_bytes, self._connected)

    def __enter__(self) -> Self:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        _shrink_buffers(listener)
        try:
            listener.bind((self.host, self.port))
        except OSError as error:
            listener.close()
            raise LinkError(f"cannot listen on {self.host}:{self.port}: {error.strerror} (shaped link)") from error
        listener.listen(64)
        listener.setblocking(False)
        self.port = listener.getsockname()[1]
        self._listener = listener
        self._stop = socket.socketpair()
        self._acceptor.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._listener is not None and self._stop is not None
        self._stop[1].send(b"x")
        self._acceptor.join()
        self._listener.close()
        with self._lock:
            left = list(self._connections)
        for connection in left:
            connection.abort()
        for connection in left:
            connection.join()
        for end in self._stop:
            end.close()

    def _accept(self) -> None:
        assert self._listener is not None and self._stop is not None
        stop = self._stop[0]
        while True:
            ready, _, _ = select.select([self._listener, stop], [], [])
            if stop in ready:
                return
            try:
                near, _ = self._listener.accept()
            except OSError:
                continue  # the caller went away between knocking and being let in
            far = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            _shrink_buffers(far)
            try:
                far.connect(self.target)
            except OSError:
                # Nobody is there: the caller sees what it would see without the link, a refused connection.
                near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                near.close()
                far.close()
                continue
            connection = _Connection(near, far, self._up, self._down, self._forget)
            with self._lock:
                self._connections.add(connection)
                self._connected += 1
            connection.start()

    def _forget(self, connection: _Connection) -> None:
        with self._lock:
            self._connections.discard(connection)


def _shrink_buffers(endpoint: socket.socket) -> None:
    """Small receive buffers, so that a full link is felt; segments so small that TCP never stalls."""
    endpoint.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SOCKET_BUFFER_BYTES)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    endpoint.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1448)


class _Connection:
    """The two threads of one connection; the last to end closes the sockets."""

    def __init__(
        self,
        near: socket.socket,
        far: socket.socket,
        up: _Lane,
        down: _Lane,
        forget: Callable[[_Connection], None],
    ) -> None:
        self._near, self._far = near, far
        self._forget = forget
        self._broken = False
        self._running = 2
        self._lock = threading.Lock()
        self._stop_read, self._stop_write = socket.socketpair()
        for end in (near, far):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            end.setblocking(False)
        self._threads = [
            threading.Thread(target=self._run, args=args, name=f"shaped-{name}", daemon=True)
            for name, args in (("up", (near, far, up)), ("down", (far, near, down)))
        ]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join()

    def abort(self) -> None:
        """End both threads soon; the sockets then close with a reset."""
        with self._lock:
            self._broken = True
            if self._running:
                self._stop_write.send(b"x")

    def _run(self, source: socket.socket, sink: socket.socket, lane: _Lane) -> None:
        sharpen_sleep()
        try:
            _pump(source, sink, lane, self._stop_read)
        except OSError:
            self.abort()  # one end is gone; the other must learn it
        with self._lock:
            self._running -= 1
            if self._running:
                return
            for end in (self._near, self._far):
                if self._broken:
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
                end.close()
            self._stop_read.close()
            self._stop_write.close()
        self._forget(self)


def _pump(source: socket.socket, sink: socket.socket, lane: _Lane, stop: socket.socket) -> None:
    """Carry one direction until its end or until `stop` becomes readable.

    Raises:
        OSError: an end broke.
    """
    frames = Frames()
    pending: deque[tuple[float, bytes]] = deque()
    due = b""
    is_open = True
    while True:
        time_s = now_s()
        while pending and max(pending[0][0], lane.held_until_s) <= time_s:
            due += pending.popleft()[1]
        if due:
            due = due[_send(sink, due) :]
        if not (is_open or pending or due):
            sink.shutdown(socket.SHUT_WR)
            return
        wake_s = max(pending[0][0], lane.held_until_s) if pending else math.inf
        with lane.lock:
            room_s = lane.direction.room_s(time_s, lane.buffer_bytes)
        reads = [stop]
        if is_open and room_s <= time_s:
            reads.append(source)
        elif is_open:
            wake_s = min(wake_s, room_s)
        timeout_s = None if wake_s == math.inf else max(0.0, wake_s - SPIN_S - now_s())
        ready, writable, _ = select.select(reads, [sink] if due else [], [], timeout_s)
        if stop in ready:
            return
        if not ready and not writable:
            wait_until(wake_s)
        if source in ready:
            data = source.recv(_CHUNK_BYTES)
            is_open = bool(data)
            arrival_s = now_s()
            for piece in frames.cut(data):
                with lane.lock:
                    delivery_s = lane.direction.send(arrival_s, len(piece.data), message_before=piece.before)
                pending.append((delivery_s, piece.data))


def _send(sink: socket.socket, data: bytes) -> int:
    """How many bytes the socket took; 0 where it is full."""
    try:
        return sink.send(data)
    except BlockingIOError:
        return 0
