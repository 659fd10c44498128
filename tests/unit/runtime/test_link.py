"""The device's WebSocket against scripted others: each test's server does one thing."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress

import pytest
from websockets.server import ServerProtocol
from websockets.sync.server import ServerConnection, serve

from coinfer.bundle import Bundle
from coinfer.errors import LinkError, ProtocolError, RefusedError, UsageError
from coinfer.protocol import PROTOCOL_VERSION, Terms
from coinfer.runtime import link as link_module
from coinfer.runtime.channel import Channel
from coinfer.runtime.link import Link

Talk = Callable[[ServerConnection], None]


@contextmanager
def websocket_server(talk: Talk) -> Iterator[str]:
    with serve(talk, "127.0.0.1", 0, compression=None, max_size=None) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def tcp_server(answer: bytes | None) -> Iterator[str]:
    """Answers the first bytes of one connection with `answer` and closes; None: stays silent."""
    listener = socket.create_server(("127.0.0.1", 0))
    is_over = threading.Event()

    def run() -> None:
        with listener:
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                if answer is None:
                    is_over.wait()
                else:
                    connection.sendall(answer)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        is_over.set()
        thread.join()


def connect(url: str, *, max_message_bytes: int = 100_000, timeout_s: float = 10.0) -> Link:
    return Link(url, max_message_bytes=max_message_bytes, timeout_s=timeout_s)


def echo(connection: ServerConnection) -> None:
    for message in connection:
        connection.send(message)


def test_messages_of_every_frame_size_go_there_and_back() -> None:
    with websocket_server(echo) as url:
        link = connect(url)
        for size in (0, 1, 125, 126, 65535, 65536, 99_999):
            message = bytes(range(256)) * (size // 256) + bytes(size % 256)
            link.write(link.frame(message))
            assert link.read() == message
        link.write(link.frame("text é"))
        assert link.read() == "text é"
        assert link.is_open()
        link.close()
        assert not link.is_open()


def test_fragments_are_joined_and_pings_answered() -> None:
    ponged = threading.Event()

    def talk(connection: ServerConnection) -> None:
        connection.send([b"one ", b"two ", b"three"])
        connection.ping().wait()
        ponged.set()
        connection.send(b"after")
        connection.recv()

    with websocket_server(talk) as url:
        link = connect(url)
        assert link.read() == b"one two three"
        assert link.read() == b"after"
        assert ponged.is_set()
        link.close()


def test_one_thread_writes_while_another_reads() -> None:
    count, message = 50, bytes(60_000)
    with websocket_server(echo) as url:
        link = connect(url)

        def write() -> None:
            for _ in range(count):
                link.write(link.frame(message))

        writer = threading.Thread(target=write)
        writer.start()
        assert [len(link.read()) for _ in range(count)] == [60_000] * count
        writer.join()
        link.close()


@pytest.mark.parametrize("url", ["http://localhost:1", "localhost:8300", "", "ws://", "wss://", "ws://h:x"])
def test_what_is_no_address_of_an_edge_is_a_usage_error(url: str) -> None:
    with pytest.raises(UsageError, match="an edge is ws://HOST:PORT"):
        connect(url)


def test_nobody_there_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LinkError, match=f"no edge at ws://127.0.0.1:{port}: connection refused"):
        connect(f"ws://127.0.0.1:{port}")


def test_an_unknown_host_is_one_line() -> None:
    with pytest.raises(LinkError, match="no edge at ws://edge..local:1"):
        connect("ws://edge..local:1")
    with pytest.raises(LinkError, match="no edge at ws://nowhere.invalid:1"):
        connect("ws://nowhere.invalid:1")


@pytest.mark.parametrize(
    ("answer", "line"),
    [
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nno", "answers HTTP 404: a web server, but no edge"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n", "answers HTTP 200"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "does not speak WebSocket"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\n", "does not speak WebSocket"),
        (b"", "does not speak WebSocket"),
    ],
)
def test_another_protocol_is_a_protocol_error(answer: bytes, line: str) -> None:
    with tcp_server(answer) as url, pytest.raises(ProtocolError, match=line):
        connect(url)


def test_silence_at_the_door_ends_in_time() -> None:
    with tcp_server(None) as url, pytest.raises(LinkError, match="silent for 0.05 s"):
        connect(url, timeout_s=0.05)


def test_silence_behind_the_door_ends_in_time() -> None:
    def talk(connection: ServerConnection) -> None:
        connection.recv()

    with websocket_server(talk) as url:
        link = connect(url, timeout_s=0.05)
        with pytest.raises(LinkError, match="silent for 0.05 s"):
            link.read()
        link.close()


def test_a_goodbye_gives_its_reason() -> None:
    with websocket_server(lambda connection: connection.close(1001, "tired")) as url:
        link = connect(url)
        with pytest.raises(LinkError, match=r"the edge closed it \(tired\)"):
            link.read()
        with pytest.raises(LinkError, match="tired"):
            link.read()
        with pytest.raises(LinkError, match="tired"):
            link.frame(b"")
        link.close()


def test_messages_before_a_goodbye_are_still_read() -> None:
    def talk(connection: ServerConnection) -> None:
        connection.send(b"last")
        connection.close()

    with websocket_server(talk) as url:
        link = connect(url)
        assert link.read() == b"last"
        with pytest.raises(LinkError, match="the edge closed it"):
            link.read()
        link.close()


def test_a_goodbye_for_a_violation_is_a_protocol_error() -> None:
    with websocket_server(lambda connection: connection.close(1002, "request numbers rise")) as url:
        link = connect(url)
        with pytest.raises(ProtocolError, match="closed the link: request numbers rise"):
            link.read()
        link.close()


def test_a_message_over_the_limit_is_a_protocol_error() -> None:
    with websocket_server(lambda connection: connection.send(bytes(5001))) as url:
        link = connect(url, max_message_bytes=5000)
        with pytest.raises(ProtocolError, match="what WebSocket or the size limit do not allow.*5001"):
            link.read()
        link.close()


def test_text_that_is_not_utf_8_is_a_protocol_error() -> None:
    # The text may come in the same packet as the upgrade, and is then read by `connect` already.
    with websocket_server(lambda connection: connection.send(b"\xff\xfe", text=True)) as url:
        with pytest.raises(ProtocolError, match="not UTF-8"), closing(connect(url)) as link:
            link.read()


def test_abort_wakes_a_reader() -> None:
    def talk(connection: ServerConnection) -> None:
        for _ in connection:
            pass

    with websocket_server(talk) as url:
        link = connect(url)
        errors: list[LinkError] = []

        def read() -> None:
            with pytest.raises(LinkError) as caught:
                link.read()
            errors.append(caught.value)

        reader = threading.Thread(target=read)
        reader.start()
        link.abort()
        reader.join()
        assert len(errors) == 1
        link.close()


def test_is_open_sees_a_goodbye_that_nobody_has_read() -> None:
    with websocket_server(lambda connection: connection.close()) as url:
        link = connect(url)
        deadline_s = time.monotonic() + 10
        while link.is_open():
            assert time.monotonic() < deadline_s
        link.close()


# --- a hostile edge: whatever it sends, what is kept of it is bounded ---------------------------------------------


def pouring(data: bytes, times: int) -> Talk:
    """An edge that sends raw bytes behind the upgrade, as often as they are taken."""

    def talk(connection: ServerConnection) -> None:
        with suppress(OSError):
            for _ in range(times):
                connection.socket.sendall(data)

    return talk


@pytest.mark.parametrize(
    ("data", "line"),
    [
        (b"\x00\x00", "unexpected continuation frame"),
        (b"\x02\x01x" + b"\x00\x00" * 2000, "in more than 1024 fragments"),
        (b"\x02\x7e\x27\x10" + bytes(10_000) + (b"\x00\x7e\x27\x10" + bytes(10_000)) * 20, "exceeds limit"),
        (b"\x82\x7f\x3f" + bytes(7), "exceeds limit"),
        (b"\xc2\x05bytes", "reserved bits must be 0"),
        (b"\x83\x00", "invalid opcode"),
        (b"\x82\x85abcdxxxxx", "incorrect masking"),
        (b"\x89\x7e\x00\x7e" + bytes(126), "control frame too long"),
    ],
)
def test_a_malformed_or_endless_message_of_an_edge_is_a_protocol_error(data: bytes, line: str) -> None:
    with websocket_server(pouring(data, 1)) as url:
        with pytest.raises(ProtocolError, match=line), closing(connect(url)) as link:
            link.read()


def test_an_edge_that_pings_and_reads_nothing_is_a_broken_link() -> None:
    """A thread is stuck in a write meanwhile, so that the answers to pings cannot leave."""
    go, is_over = threading.Event(), threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            peer, _ = listener.accept()
            with peer, suppress(OSError):
                protocol = ServerProtocol()
                while not (events := protocol.events_received()):
                    protocol.receive_data(peer.recv(65536))
                protocol.send_response(protocol.accept(events[0]))
                peer.sendall(b"".join(protocol.data_to_send()))
                go.wait()
                while not is_over.is_set():
                    peer.sendall((b"\x89\x7d" + bytes(125)) * 100)

    thread = threading.Thread(target=run)
    thread.start()
    link = connect(f"ws://127.0.0.1:{listener.getsockname()[1]}", timeout_s=30.0)
    frame = link.frame(bytes(50_000_000))

    def write() -> None:
        with pytest.raises(LinkError):
            link.write(frame)

    writer = threading.Thread(target=write)
    writer.start()
    while not link._writing.locked():
        threading.Event().wait(0.001)
    go.set()
    with pytest.raises(LinkError, match="it asks more than it reads: 1024 answers wait"):
        link.read()
    is_over.set()
    link.abort()
    writer.join()
    link.close()
    thread.join()


def test_a_flood_while_nothing_is_asked_is_not_taken_in() -> None:
    go = threading.Event()
    flood = b"\x82\x7e\x03\xe8" + bytes(1000)

    def talk(connection: ServerConnection) -> None:
        with suppress(OSError):
            while not go.is_set():
                connection.socket.sendall(flood * 60)

    with websocket_server(talk) as url:
        link = connect(url)
        for _ in range(300):
            assert link.is_open()
        # What one read brought, and no more.
        assert len(link._inbox) < 100
        go.set()
        link.abort()
        link.close()


def test_endless_headers_of_an_edge_are_a_protocol_error() -> None:
    head = b"HTTP/1.1 101 Switching Protocols\r\n" + b"X: " + b"x" * 100_000
    with tcp_server(head) as url, pytest.raises(ProtocolError, match="does not speak WebSocket"):
        connect(url)
    head = b"HTTP/1.1 101 Switching Protocols\r\n" + b"X: x\r\n" * 1000
    with tcp_server(head) as url, pytest.raises(ProtocolError, match="does not speak WebSocket"):
        connect(url)


def test_a_token_goes_with_the_request_and_is_in_no_message() -> None:
    seen: list[str | None] = []

    def talk(connection: ServerConnection) -> None:
        assert connection.request is not None
        seen.append(connection.request.headers.get("Authorization"))

    with websocket_server(talk) as url:
        Link(url, max_message_bytes=1000, timeout_s=10.0, token="camera.secret").close()
    assert seen == ["Bearer camera.secret"]
    refusal = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    for token, line in (("camera.secret", "another token than was given"), (None, "a token, and was given none")):
        with tcp_server(refusal) as url, pytest.raises(RefusedError, match=f"wants {line}") as caught:
            Link(url, max_message_bytes=1000, timeout_s=10.0, token=token)
        assert "secret" not in str(caught.value)


def test_a_refusal_that_comes_before_the_greeting_is_read(tiny_bundle: Bundle) -> None:
    """An edge that has no room says so and closes at once, with the response that opens the connection."""
    refusal = f'{{"type": "refusal", "protocol": {PROTOCOL_VERSION}, "reason": "no room"}}'
    listener = socket.create_server(("127.0.0.1", 0))

    def run() -> None:
        with listener:
            peer, _ = listener.accept()
            with peer:
                protocol = ServerProtocol()
                while not (events := protocol.events_received()):
                    protocol.receive_data(peer.recv(65536))
                protocol.send_response(protocol.accept(events[0]))
                protocol.send_text(refusal.encode())
                protocol.send_close(1008, "no room")
                peer.sendall(b"".join(protocol.data_to_send()))
                peer.recv(65536)

    thread = threading.Thread(target=run)
    thread.start()
    with pytest.raises(RefusedError, match="the edge refused: no room"):
        Channel(f"ws://127.0.0.1:{listener.getsockname()[1]}", Terms.of(tiny_bundle), timeout_s=10.0)
    thread.join()


def test_a_token_in_the_clear_is_warned_of(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with websocket_server(lambda connection: None) as url:
        Link(url, max_message_bytes=1000, timeout_s=10.0, token="camera.secret").close()
        assert caplog.records == []
        # As if the edge were another machine.
        monkeypatch.setattr(link_module, "is_loopback", lambda address: address != "127.0.0.1")
        Link(url, max_message_bytes=1000, timeout_s=10.0, token="camera.secret").close()
    assert [record.getMessage() for record in caplog.records] == [f"the token goes to {url} in the clear, without TLS"]
