"""The shaped link on real sockets.  Times have lower bounds only: a loaded machine is late, never early."""

import math
import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from websockets.frames import Frame, Opcode

from coinfer.errors import LinkError, PlanError
from coinfer.lab.shape import ShapedLink
from coinfer.profile import Link, Trace
from coinfer.protocol import message_wire_bytes

FAST = Link(rate_bps=math.inf)
LIMIT_S = 30.0


@pytest.fixture
def target() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(LIMIT_S)
        yield listener


def _join(link: ShapedLink, target: socket.socket) -> tuple[socket.socket, socket.socket]:
    """Both ends of a new connection through the link."""
    near = socket.create_connection((link.host, link.port), LIMIT_S)
    far, _ = target.accept()
    far.settimeout(LIMIT_S)
    return near, far


def _read(end: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        piece = end.recv(num_bytes - len(data))
        assert piece, f"closed after {len(data)} of {num_bytes} B"
        data += piece
    return data


def test_a_message_arrives_no_earlier_than_rate_and_delay_allow(target: socket.socket) -> None:
    with ShapedLink(target.getsockname(), link=Link(rate_bps=1e6, delay_s=0.02)) as link:
        near, far = _join(link, target)
        with near, far:
            start_s = time.perf_counter()
            near.sendall(bytes(20_000))
            _read(far, 20_000)
            took_s = time.perf_counter() - start_s
    assert took_s >= (20_000 + 40 * math.ceil(20_000 / 1448)) * 8 / 1e6 + 0.02


def test_the_downlink_has_its_own_rate_and_a_changed_link_counts_from_then_on(target: socket.socket) -> None:
    with ShapedLink(target.getsockname(), link=FAST) as link:
        near, far = _join(link, target)
        with near, far:
            link.set(Link(rate_bps=math.inf, delay_s=0.01, down_rate_bps=1e6))
            start_s = time.perf_counter()
            far.sendall(bytes(5_000))
            _read(near, 5_000)
            assert time.perf_counter() - start_s >= (5_000 + 4 * 40) * 8 / 1e6 + 0.01


def test_an_outage_of_a_trace_is_waited_for(target: socket.socket) -> None:
    trace = Trace(name="late", start_s=(0.0, 0.3), rate_bps=(0.0, 1e9), duration_s=1000.0)
    with ShapedLink(target.getsockname(), link=FAST) as link:
        near, far = _join(link, target)
        with near, far:
            start_s = time.perf_counter()
            link.set(Link(rate_bps=1e6, trace=trace))
            near.sendall(b"x")
            _read(far, 1)
            assert time.perf_counter() - start_s >= 0.3


def test_a_stall_holds_back_what_is_under_way(target: socket.socket) -> None:
    with ShapedLink(target.getsockname(), link=FAST) as link:
        near, far = _join(link, target)
        with near, far:
            start_s = time.perf_counter()
            link.stall(0.2, way="up")
            far.sendall(b"down")
            assert _read(near, 4) == b"down"
            near.sendall(b"up")
            assert _read(far, 2) == b"up"
            assert time.perf_counter() - start_s >= 0.2


def test_bytes_cross_unaltered_both_ways_at_once_and_ends_close_one_by_one(target: socket.socket) -> None:
    chance = np.random.default_rng(0)
    up, down = chance.bytes(700_000), chance.bytes(300_000)
    with ShapedLink(target.getsockname(), link=Link(rate_bps=200e6, delay_s=0.002)) as link:
        near, far = _join(link, target)
        with near, far:
            sender = threading.Thread(target=lambda: (near.sendall(up), near.shutdown(socket.SHUT_WR)))
            answer = threading.Thread(target=far.sendall, args=(down,))
            sender.start()
            answer.start()
            assert _read(far, len(up)) == up
            assert far.recv(1) == b""
            assert _read(near, len(down)) == down
            sender.join()
            answer.join()
            far.sendall(b"still open")
            assert _read(near, 10) == b"still open"
        counts = link.counts()
    assert (counts.up_bytes, counts.down_bytes, counts.connections) == (700_000, 300_010, 1)


def test_wire_bytes_of_websocket_messages_are_those_of_the_protocol(target: socket.socket) -> None:
    upgrade = b"GET /link HTTP/1.1\r\nHost: here\r\n\r\n"
    messages = [bytes(size) for size in (0, 100, 1434, 1435, 20_000, 66_000)]
    frames = [Frame(Opcode.BINARY, message).serialize(mask=True) for message in messages]
    stream = b"".join([upgrade, *frames])
    with ShapedLink(target.getsockname(), link=FAST) as link:
        near, far = _join(link, target)
        with near, far:
            near.sendall(stream)
            assert _read(far, len(stream)) == stream
        counts = link.counts()
    expected = len(upgrade) + 40 + sum(message_wire_bytes(len(message), masked=True) for message in messages)
    assert (counts.up_bytes, counts.up_wire_bytes) == (len(stream), expected)


def test_a_full_link_holds_the_sender_back(target: socket.socket) -> None:
    with ShapedLink(target.getsockname(), link=Link(rate_bps=1e4), buffer_bytes=20_000) as link:
        near, far = _join(link, target)
        with near, far:
            near.settimeout(0.5)
            with pytest.raises(TimeoutError):
                while True:
                    near.sendall(bytes(100_000))
            # The link took its buffer, at most one reading more, and what departed meanwhile.
            assert link.counts().up_bytes <= 20_000 + 16_384 + 20_000


def test_a_reset_is_seen_by_both_ends_and_the_link_lives_on(target: socket.socket) -> None:
    with ShapedLink(target.getsockname(), link=Link(rate_bps=1e6)) as link:
        near, far = _join(link, target)
        with near, far:
            near.sendall(b"a")
            _read(far, 1)
            link.reset()
            for end in (near, far):
                with pytest.raises(ConnectionResetError):
                    end.recv(1)
        near, far = _join(link, target)
        with near, far:
            near.sendall(b"b")
            assert _read(far, 1) == b"b"


def test_no_thread_outlives_the_link_even_with_bytes_under_way(target: socket.socket) -> None:
    before = set(threading.enumerate())
    with ShapedLink(target.getsockname(), link=Link(rate_bps=1e3, delay_s=100.0)) as link:
        near, far = _join(link, target)
        near.sendall(bytes(1000))
        other, another = _join(link, target)
    assert set(threading.enumerate()) == before
    for end in (near, far, other, another):
        end.close()


def test_where_nobody_listens_the_connection_is_refused() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
    with (
        ShapedLink(address, link=FAST) as link,
        pytest.raises(ConnectionResetError),  # when connecting or when reading: whichever the reset meets
        socket.create_connection((link.host, link.port), LIMIT_S) as near,
    ):
        near.recv(1)


def test_a_port_in_use_is_named(target: socket.socket) -> None:
    port = target.getsockname()[1]
    with pytest.raises(LinkError, match=str(port)), ShapedLink(("127.0.0.1", 1), link=FAST, port=port):
        pass


def test_a_buffer_holds_something() -> None:
    with pytest.raises(PlanError, match="got 0"):
        ShapedLink(("127.0.0.1", 1), link=FAST, buffer_bytes=0)
