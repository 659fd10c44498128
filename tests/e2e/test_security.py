"""Closed by default: who gets in, who is cut off, and what hostile peers can do to a real edge process: nothing."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import numpy as np
import psutil
import pytest

pytest.importorskip("cryptography", reason="certificates need the edge extra")

import hostile  # noqa: E402
from coinfer.bundle import Bundle  # noqa: E402
from coinfer.engine.segments import Segments  # noqa: E402
from coinfer.errors import LinkError, RefusedError, UsageError  # noqa: E402
from coinfer.protocol import DeviceConnection, Failure, Reply, Terms  # noqa: E402
from coinfer.runtime.access import Access  # noqa: E402
from coinfer.runtime.certificates import make_test_ca, revoke_certificate  # noqa: E402
from coinfer.runtime.device import Device  # noqa: E402
from coinfer.runtime.edge import serve  # noqa: E402
from coinfer.runtime.server import SPARE_SOCKETS  # noqa: E402
from coinfer.runtime.spawn import EdgeProcess  # noqa: E402
from coinfer.runtime.tls import DeviceTls  # noqa: E402
from coinfer.runtime.tokens import add_token, revoke_token  # noqa: E402
from hostile import BINARY, CONT, PING, TEXT, close_code, dial, frame, read_all, read_frame, upgrade  # noqa: E402
from tiny_bundle import SPLIT32, UPLOAD, pictures  # noqa: E402

PATIENCE_S = 30.0
# Of an attack that sends tens of megabytes, at most this much may stay.
GROWTH_BYTES = 48 << 20


def eventually(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def logged(edge: EdgeProcess, *words: str) -> bool:
    return any(all(word in line for word in words) for line in [*edge.log])


def at_loopback(edge: EdgeProcess) -> str:
    """The address of an edge that listens everywhere."""
    return edge.url.replace("0.0.0.0", "127.0.0.1")


@pytest.fixture
def ca(tmp_path: Path) -> Path:
    make_test_ca(tmp_path / "ca", ["localhost", "127.0.0.1"])
    return tmp_path / "ca"


def tls_options(ca: Path, *more: str) -> tuple[str, ...]:
    return ("--cert", str(ca / "server.pem"), "--key", str(ca / "server.key"), *more)


def local(bundle: Bundle, picture: np.ndarray) -> np.ndarray:
    segments, plan = Segments(bundle.path, bundle.manifest.outputs), bundle.plan(UPLOAD)
    return segments.tail(plan).run((picture[None],))[0]


# --- where an edge listens ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "127.9.8.7", "localhost", "::1"])
def test_loopback_needs_nothing(tiny_bundle: Bundle, host: str) -> None:
    if host == "::1" and not socket.has_dualstack_ipv6():
        pytest.skip("this machine has no IPv6")
    with EdgeProcess(tiny_bundle.folder, options=("--host", host)) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
            picture = pictures(1)[0]
            np.testing.assert_array_equal(device.infer(picture).outputs[0], local(tiny_bundle, picture))
    assert not logged(edge, "WARNING")


def test_any_other_bind_requires_tls_and_a_token(tiny_bundle: Bundle, ca: Path, tmp_path: Path) -> None:
    tokens = ("--tokens", str(tmp_path / "tokens.json"))
    token = add_token(tmp_path / "tokens.json", "camera")
    for given, missing in (
        ((), r"TLS \(--cert and --key, or --insecure\) and tokens \(--tokens\)"),
        (tls_options(ca), r"tokens \(--tokens\)"),
        (("--insecure",), r"tokens \(--tokens\)"),
        (tokens, r"TLS \(--cert and --key, or --insecure\)"),
    ):
        line = f"0.0.0.0 can be reached from other machines: that needs {missing}; 127.0.0.1 needs nothing"
        with pytest.raises(LinkError, match=line):
            EdgeProcess(tiny_bundle.folder, options=("--host", "0.0.0.0", *given))
    options = ("--host", "0.0.0.0", *tokens, *tls_options(ca))
    with EdgeProcess(tiny_bundle.folder, options=options) as edge:
        assert edge.url.startswith("wss://0.0.0.0:")
        with Device(
            tiny_bundle, edge=at_loopback(edge), plan=UPLOAD, token=token, tls=DeviceTls(ca=ca / "ca.pem")
        ) as device:
            picture = pictures(1)[0]
            np.testing.assert_array_equal(device.infer(picture).outputs[0], local(tiny_bundle, picture))
        with pytest.raises(RefusedError, match="wants a token, and was given none"):
            Device(tiny_bundle, edge=at_loopback(edge), tls=DeviceTls(ca=ca / "ca.pem"))


def test_insecure_gives_up_tls_alone_and_says_so(tiny_bundle: Bundle, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.json", "camera")
    options = ("--host", "0.0.0.0", "--insecure", "--tokens", str(tmp_path / "tokens.json"))
    with EdgeProcess(tiny_bundle.folder, options=options) as edge:
        line = "WARNING insecure: 0.0.0.0 can be reached from other machines without TLS"
        assert logged(edge, line, "tokens can be read")
        with Device(tiny_bundle, edge=at_loopback(edge), plan=UPLOAD, token=token) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"
        with pytest.raises(RefusedError, match="wants a token, and was given none"):
            Device(tiny_bundle, edge=at_loopback(edge))


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.1.2.3", "192.168.0.1", "fe80::1%eth0", "128.0.0.1"])
def test_an_address_is_judged_as_resolved(address: str) -> None:
    with pytest.raises(UsageError, match="can be reached from other machines"):
        Access().check(address)
    for own in ("127.0.0.1", "127.255.255.254", "::1", "::ffff:127.0.0.1"):
        assert Access().check(own) is None


def test_the_library_does_not_bypass_the_rule(tiny_bundle: Bundle) -> None:
    with pytest.raises(UsageError, match="0.0.0.0 can be reached from other machines"):
        serve(tiny_bundle, host="0.0.0.0", port=0)


def test_nor_does_the_command_line(tiny_bundle: Bundle) -> None:
    command = [sys.executable, "-m", "coinfer.cli", "serve", str(tiny_bundle.folder)]
    command += ["--host", "0.0.0.0", "--port", "0"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 2 and "0.0.0.0 can be reached from other machines" in done.stderr


# --- who gets in --------------------------------------------------------------------------------------------------


def status_of(url: str, token: str | None = None) -> tuple[int, dict[str, object]]:
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"Bearer {token}"})
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, {}


def test_tokens_name_the_device_that_a_connection_counts_for(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    first, second = add_token(path, "camera-1"), add_token(path, "camera-2")
    options = ("--tokens", str(path), "--device-connections", "1")
    with EdgeProcess(tiny_bundle.folder, options=options) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=first) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"
            with pytest.raises(RefusedError, match="already serves 1 connections of this device"):
                Device(tiny_bundle, edge=edge.url, token=first)
            with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=second) as other:
                assert other.infer(pictures(1)[0]).answered == "edge"


def test_without_its_token_nobody_learns_or_does_anything(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "camera")
    with EdgeProcess(tiny_bundle.folder, options=("--tokens", str(path))) as edge:
        url = edge.url.replace("ws:", "http:")
        assert status_of(f"{url}/healthz")[1].keys() == {"status", "protocol"}
        assert status_of(f"{url}/healthz", token)[1]["bundle"] == tiny_bundle.digest
        assert status_of(f"{url}/metrics")[0] == 401
        for wrong in (None, token + "x", "camera.", "stranger." + token.partition(".")[2]):
            with pytest.raises(RefusedError, match="wants (a token, and was given none|another token than was given)"):
                Device(tiny_bundle, edge=edge.url, token=wrong)
        eventually(lambda: logged(edge, "refused 127.0.0.1:", "no token that this edge knows"))
        assert not any("completing handshake" in line for line in edge.log)
        assert not any(token.partition(".")[2] in line for line in edge.log)


def test_a_revoked_token_is_cut_off_while_running(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    lost, kept = add_token(path, "camera-1"), add_token(path, "camera-2")
    with EdgeProcess(tiny_bundle.folder, options=("--tokens", str(path))) as edge:
        with (
            Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=lost) as cut,
            Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=kept) as other,
        ):
            picture = pictures(1)[0]
            exact = local(tiny_bundle, picture)
            for device in (cut, other):
                np.testing.assert_array_equal(device.infer(picture).outputs[0], exact)
            revoke_token(path, "camera-1")
            # In the middle of a stream, with no signal sent.
            with pytest.raises(LinkError, match="its token is revoked"):
                for _ in cut.stream(picture for _ in count()):
                    pass
            with pytest.raises(RefusedError, match="another token than was given"):
                cut.infer(picture)
            np.testing.assert_array_equal(other.infer(picture).outputs[0], exact)
            assert status_of(edge.url.replace("ws:", "http:") + "/metrics", lost)[0] == 401


def test_a_broken_tokens_file_keeps_the_tokens_of_before(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    token = add_token(path, "camera")
    with EdgeProcess(tiny_bundle.folder, options=("--tokens", str(path))) as edge:
        path.write_bytes(b"\x80\x04\x95 not a tokens file")
        eventually(lambda: logged(edge, "ERROR kept the tokens of before: this is no tokens file"))
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=token) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"
        assert sum("kept the tokens" in line for line in edge.log) == 1


def test_a_client_certificate_only_admits(tiny_bundle: Bundle, ca: Path, tmp_path: Path) -> None:
    """Without it nobody comes as far as HTTP; with it alone nobody is a device."""
    path = tmp_path / "tokens.json"
    token = add_token(path, "camera")
    own = DeviceTls(ca=ca / "ca.pem", certificate=ca / "client.pem", key=ca / "client.key")
    options = tls_options(ca, "--client-ca", str(ca / "ca.pem"), "--tokens", str(path))
    with EdgeProcess(tiny_bundle.folder, options=options) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, token=token, tls=own) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"
        with pytest.raises(RefusedError, match="wants a token"):
            Device(tiny_bundle, edge=edge.url, tls=own)
        with pytest.raises(LinkError, match="hung up behind TLS: it may want a client") as caught:
            Device(tiny_bundle, edge=edge.url, token=token, tls=DeviceTls(ca=ca / "ca.pem"))
        assert not isinstance(caught.value, RefusedError)
        eventually(lambda: logged(edge, "refused 127.0.0.1:", "no TLS came of it"))


def test_a_revoked_client_certificate_is_cut_off_by_a_reload(tiny_bundle: Bundle, ca: Path) -> None:
    own = DeviceTls(ca=ca / "ca.pem", certificate=ca / "client.pem", key=ca / "client.key")
    options = tls_options(ca, "--client-ca", str(ca / "ca.pem"), "--crl", str(ca / "crl.pem"))
    with EdgeProcess(tiny_bundle.folder, options=options) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, tls=own) as device:
            picture = pictures(1)[0]
            device.infer(picture)
            # A reload that changes nothing lets everybody be.
            os.kill(edge.pid, signal.SIGHUP)
            eventually(lambda: logged(edge, "certificates are read anew"))
            assert device.infer(picture).answered == "edge"
            idle = hostile.dial(edge.url, context=own.context())
            revoke_certificate(ca, ca / "client.pem")
            os.kill(edge.pid, signal.SIGHUP)
            with pytest.raises(LinkError, match="certificates were revoked: connect again"):
                for _ in device.stream(picture for _ in count()):
                    pass
            with pytest.raises(LinkError, match="hung up behind TLS: .*or have revoked this one"):
                device.infer(picture)
            # One that had not said anything yet is cut as well.
            with idle:
                assert read_all(idle) == b""


def test_a_new_certificate_is_used_after_a_reload_and_a_broken_one_is_not(tiny_bundle: Bundle, ca: Path) -> None:
    trust = DeviceTls(ca=ca / "ca.pem")

    def serial() -> int:
        with hostile.dial(edge.url, context=trust.context()) as peer:
            shown = peer.getpeercert()  # type: ignore[attr-defined]
            return int(shown["serialNumber"], 16)

    with EdgeProcess(tiny_bundle.folder, options=tls_options(ca)) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, tls=trust) as device:
            before = serial()
            (ca / "server.pem").write_text("broken")
            os.kill(edge.pid, signal.SIGHUP)
            eventually(lambda: logged(edge, "ERROR kept the certificates of before"))
            assert serial() == before
            make_test_ca(ca / "new", ["127.0.0.1"])
            for name in ("server.pem", "server.key"):
                (ca / name).write_bytes((ca / "new" / name).read_bytes())
            os.kill(edge.pid, signal.SIGHUP)
            eventually(lambda: logged(edge, "certificates are read anew"))
            with pytest.raises(LinkError, match="of no CA that this device trusts"):
                Device(tiny_bundle, edge=edge.url, tls=trust)
            with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, tls=DeviceTls(ca=ca / "new" / "ca.pem")) as fresh:
                assert fresh.infer(pictures(1)[0]).answered == "edge"
            # Who is in stays in.
            assert device.infer(pictures(1)[0]).answered == "edge"


def test_a_slow_tls_handshake_is_cut_off(tiny_bundle: Bundle, ca: Path) -> None:
    with EdgeProcess(tiny_bundle.folder, options=tls_options(ca, "--hello", "1")) as edge:
        with dial(edge.url) as peer:
            # A record of 512 B is announced, and comes byte by byte.
            peer.sendall(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03")
            assert hostile.is_cut_off(peer, b"\0", 0.1)
        eventually(lambda: logged(edge, "refused 127.0.0.1:", "no TLS came of it", "handshake"))
        with dial(edge.url) as peer:
            peer.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert b"HTTP" not in read_all(peer)
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD, tls=DeviceTls(ca=ca / "ca.pem")) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"


# --- hostile peers against one edge -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def target(tiny_bundle: Bundle) -> Iterator[EdgeProcess]:
    with EdgeProcess(tiny_bundle.folder, options=("--hello", "1", "--idle", "4", "--connections", "40")) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
            device.infer(pictures(1)[0])
        yield edge


@contextlib.contextmanager
def unharmed(bundle: Bundle, edge: EdgeProcess, *words: str) -> Iterator[None]:
    """What happens inside leaves a log line with these words, and the process as it was: alive, serving, not grown."""
    process = psutil.Process(edge.pid)
    eventually(lambda: not [c for c in process.net_connections("tcp") if c.status == psutil.CONN_ESTABLISHED])
    before, files = process.memory_info().rss, process.num_fds()
    edge.log.clear()
    yield
    if words:
        eventually(lambda: logged(edge, *words))
    assert edge.process.poll() is None
    with Device(bundle, edge=edge.url, plan=UPLOAD, timeout_s=PATIENCE_S) as device:
        picture = pictures(1)[0]
        np.testing.assert_array_equal(device.infer(picture).outputs[0], local(bundle, picture))
    eventually(lambda: process.num_fds() <= files)
    assert process.memory_info().rss < before + GROWTH_BYTES
    assert not logged(edge, "Traceback") and not logged(edge, "ERROR")


@contextlib.contextmanager
def greeted(bundle: Bundle, edge: EdgeProcess) -> Iterator[tuple[socket.socket, DeviceConnection]]:
    """A peer that the edge has welcomed, and may now send anything."""
    terms = DeviceConnection(Terms.of(bundle))
    with dial(edge.url) as peer:
        assert b" 101 " in upgrade(peer)
        peer.sendall(frame(TEXT, terms.hello().encode()))
        terms.receive(read_frame(peer)[1].decode())
        yield peer, terms


def payload_of(bundle: Bundle, number: int) -> bytes:
    segments, plan = Segments(bundle.path, bundle.manifest.outputs), bundle.plan(number)
    crossing = (pictures(1),) if plan.kind == "upload" else segments.head(plan).run((pictures(1),))
    return segments.codec(plan).encode(crossing)


# os.system("id"), to whoever unpickles it.
PICKLE = b"\x80\x04\x95\x1e" + bytes(7) + b"\x8c\x05posix\x94\x8c\x06system\x94\x93\x94\x8c\x02id\x94\x85\x94R\x94."
REQUEST = b"\x01\x00\x01\x00"

MALFORMED = {
    "reserved opcode": (frame(3, b"x"), 1002, "invalid opcode"),
    "unmasked": (b"\x82\x01x", 1002, "incorrect masking"),
    "fragmented control": (frame(PING, b"", fin=False), 1002, "fragmented control frame"),
    "long control": (frame(PING, bytes(126)), 1002, "control frame too long"),
    "stray continuation": (frame(CONT, b"x"), 1002, "unexpected continuation"),
    "RSV1 of a compression bomb": (frame(BINARY, bytes(1000), rsv=4), 1002, "reserved bits"),
    "truncated header": (frame(BINARY, REQUEST), 1002, "a message has 8 to"),
    "empty message": (frame(BINARY), 1002, "a message has 8 to"),
    "unknown type": (frame(BINARY, b"\x63" + bytes(7)), 1002, "unknown message type 99"),
    "unknown plan": (frame(BINARY, b"\x01\0\x63\0" + bytes(4)), 1002, "plan 99 does not cross"),
    "an edge's message": (frame(BINARY, b"\x02\0\x01\0" + bytes(16)), 1002, "a device does not send"),
    "pickle": (frame(BINARY, PICKLE), 1002, "unknown message type 128"),
    "text": (frame(TEXT, b"hello again"), 1002, "a text message after the greeting"),
    "text that is none": (frame(TEXT, b"\xff\xfe"), 1007, "not UTF-8"),
    "a message of 4 EiB": (frame(BINARY, b"", size=2**62), 1009, "exceeds limit"),
    "a message of 2 GiB": (frame(BINARY, bytes(5000), size=2**31), 1009, "exceeds limit"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_a_malformed_message_gets_a_clean_close_and_a_log_line(
    tiny_bundle: Bundle, target: EdgeProcess, name: str
) -> None:
    data, code, line = MALFORMED[name]
    with unharmed(tiny_bundle, target, "closed the link to 127.0.0.1:", line):
        with greeted(tiny_bundle, target) as (peer, _):
            peer.sendall(data)
            assert close_code(peer)[0] == code


def test_a_truncated_message_is_a_device_that_is_gone(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "INFO 127.0.0.1:", "is gone"):
        with greeted(tiny_bundle, target) as (peer, _):
            peer.sendall(frame(BINARY, REQUEST + bytes(4) + bytes(190))[:50])


def test_a_request_number_that_falls_closes_the_link(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    payload = payload_of(tiny_bundle, UPLOAD)
    with unharmed(tiny_bundle, target, "closed the link to", "request numbers rise, got 6 after 7"):
        with greeted(tiny_bundle, target) as (peer, device):
            peer.sendall(frame(BINARY, device.request(7, UPLOAD, payload)))
            assert isinstance(device.receive(read_frame(peer)[1]), Reply)
            peer.sendall(frame(BINARY, device.request(6, UPLOAD, payload)))
            assert close_code(peer)[0] == 1002


def test_a_replayed_request_closes_the_link_and_is_not_answered_again(
    tiny_bundle: Bundle, target: EdgeProcess
) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "request numbers rise, got 7 after 7"):
        with greeted(tiny_bundle, target) as (peer, device):
            message = frame(BINARY, device.request(7, UPLOAD, payload_of(tiny_bundle, UPLOAD)))
            peer.sendall(message)
            assert isinstance(device.receive(read_frame(peer)[1]), Reply)
            peer.sendall(message)
            opcode, data = read_frame(peer)
            assert opcode == hostile.CLOSE and b"request numbers rise" in data


def test_an_endless_message_is_cut_at_its_limit(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "exceeds limit"):
        with greeted(tiny_bundle, target) as (peer, _):
            piece = frame(CONT, bytes(4000), fin=False)
            with contextlib.suppress(OSError):
                peer.sendall(frame(BINARY, bytes(4000), fin=False))
                for _ in range(5000):
                    peer.sendall(piece)
            assert close_code(peer)[0] in (1009, -1)


def test_endless_empty_fragments_are_cut_at_their_number(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "a message has at most 1024 fragments"):
        with greeted(tiny_bundle, target) as (peer, _):
            with contextlib.suppress(OSError):
                peer.sendall(frame(BINARY, b"x", fin=False))
                for _ in range(300):
                    peer.sendall(frame(CONT, b"", fin=False) * 1000)
            assert close_code(peer)[0] in (1009, -1)


def test_endless_pings_whose_answers_are_not_read_are_cut(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "it pings and reads no answers"):
        with dial(target.url, receive_bytes=4096) as peer:
            upgrade(peer)
            pings = frame(PING, bytes(125)) * 1000
            with pytest.raises(OSError):
                for _ in range(1000):
                    peer.sendall(pings)


def test_a_flood_of_messages_that_are_none_is_cut(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to"):
        with greeted(tiny_bundle, target) as (peer, _):
            with contextlib.suppress(OSError):
                for _ in range(100):
                    peer.sendall(frame(BINARY) * 10_000)
            read_all(peer)


def test_endless_text_before_the_greeting_is_refused(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "refused 127.0.0.1:"):
        with dial(target.url) as peer:
            upgrade(peer)
            peer.sendall(frame(TEXT, b'{"protocol": 2, "type": "hello", "bundle": "' + b"x" * 65_000))
            assert close_code(peer)[0] == 1008
    with unharmed(tiny_bundle, target, "closed the link to", "exceeds limit"):
        with dial(target.url) as peer:
            upgrade(peer)
            with contextlib.suppress(OSError):
                peer.sendall(frame(TEXT, b"[" * 1000, fin=False))
                for _ in range(200):
                    peer.sendall(frame(CONT, b"[" * 10_000, fin=False))
            assert close_code(peer)[0] in (1009, -1)


@pytest.mark.parametrize("text", [b"[" * 60_000, b'{"protocol": 1e999}', b"{}", PICKLE.hex().encode(), b""])
def test_a_greeting_that_is_none_is_refused(tiny_bundle: Bundle, target: EdgeProcess, text: bytes) -> None:
    with unharmed(tiny_bundle, target, "refused 127.0.0.1:"):
        with dial(target.url) as peer:
            upgrade(peer)
            peer.sendall(frame(TEXT, text))
            assert close_code(peer)[0] == 1008


def test_a_peer_that_does_not_greet_is_cut_off(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "no greeting within 1 s"):
        with dial(target.url) as peer:
            upgrade(peer)
            assert close_code(peer)[0] == 1002


def test_a_device_that_is_silent_is_cut_off(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "silent for 4 s"):
        with greeted(tiny_bundle, target) as (peer, _):
            assert close_code(peer) == (1002, "silent for 4 s")


def test_compression_is_refused_so_that_no_bomb_can_exist(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the link to", "reserved bits"):
        with dial(target.url) as peer:
            head = upgrade(peer, "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits")
            assert b" 101 " in head and b"deflate" not in head.lower() and b"extensions" not in head.lower()
            peer.sendall(frame(TEXT, b"\xaa" * 100, rsv=4))
            assert close_code(peer)[0] == 1002


@pytest.mark.parametrize("what", ["of another codec", "pickle", "empty", "of zeros", "cut short"])
def test_a_payload_with_wrong_dtype_codes_fails_its_request_alone(
    tiny_bundle: Bundle, target: EdgeProcess, what: str
) -> None:
    good = payload_of(tiny_bundle, UPLOAD)
    bad = {
        "of another codec": payload_of(tiny_bundle, SPLIT32),
        "pickle": PICKLE,
        "empty": b"",
        "of zeros": bytes(len(good)),
        "cut short": good[:-1],
    }[what]
    with unharmed(tiny_bundle, target, "WARNING request 1 failed"):
        with greeted(tiny_bundle, target) as (peer, device):
            peer.sendall(frame(BINARY, device.request(1, UPLOAD, bad)))
            assert isinstance(device.receive(read_frame(peer)[1]), Failure)
            peer.sendall(frame(BINARY, device.request(2, UPLOAD, good)))
            assert isinstance(device.receive(read_frame(peer)[1]), Reply)


@pytest.mark.parametrize("head", [b"", b"GET /healthz HTTP/1.1\r\nHost: edge\r\n"])
def test_a_slow_request_head_is_cut_off(tiny_bundle: Bundle, target: EdgeProcess, head: bytes) -> None:
    with unharmed(tiny_bundle, target, "closed the connection of 127.0.0.1:", "no whole request within 1 s"):
        with dial(target.url) as peer:
            peer.sendall(head)
            assert hostile.is_cut_off(peer, b"a", 0.1)


def test_a_slow_second_request_is_cut_off_too(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the connection of", "no whole request within 1 s"):
        with dial(target.url) as peer:
            peer.sendall(b"GET /readyz HTTP/1.1\r\nHost: edge\r\n\r\n")
            assert b" 200 " in hostile.read_head(peer)
            assert hostile.is_cut_off(peer, b"a", 0.1)


def test_a_slow_body_is_cut_off(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target):
        with dial(target.url) as peer:
            peer.sendall(b"GET /readyz HTTP/1.1\r\nHost: edge\r\nContent-Length: 100000\r\n\r\n")
            assert hostile.is_cut_off(peer, b"a", 0.1)


def test_whoever_reads_no_answers_is_cut_off(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    with unharmed(tiny_bundle, target, "closed the connection of", "took nothing of what was sent for 1 s"):
        with dial(target.url, receive_bytes=4096) as peer:
            with pytest.raises(OSError):
                for _ in range(100_000):
                    peer.sendall(b"GET /metrics HTTP/1.1\r\nHost: edge\r\n\r\n" * 100)


BROKEN_HTTP = {
    "no HTTP": b"\x00\x01\x02\x03\r\n\r\n",
    "pickle": PICKLE + b"\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(40) + b"\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "long head": b"GET / HTTP/1.1\r\nHost: edge\r\nX: " + b"x" * 70_000,
    "two lengths": b"POST / HTTP/1.1\r\nHost: edge\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
    "a length that is none": b"POST / HTTP/1.1\r\nHost: edge\r\nContent-Length: -1\r\n\r\n",
    "a chunk that is none": b"POST /healthz HTTP/1.1\r\nHost: edge\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
}


@pytest.mark.parametrize("name", BROKEN_HTTP)
def test_broken_http_gets_a_clean_close_and_a_log_line(tiny_bundle: Bundle, target: EdgeProcess, name: str) -> None:
    with unharmed(tiny_bundle, target, "closed the connection of 127.0.0.1:", "Invalid HTTP request"):
        with dial(target.url) as peer:
            with contextlib.suppress(OSError):
                peer.sendall(BROKEN_HTTP[name])
            answer = read_all(peer)
            assert answer == b"" or answer.split()[1].startswith(b"4")


def test_an_upgrade_that_the_websocket_library_does_not_take_is_closed(
    tiny_bundle: Bundle, target: EdgeProcess
) -> None:
    with unharmed(tiny_bundle, target, "closed the link to"):
        with dial(target.url) as peer:
            upgrade(peer, *(f"X-{k}: x" for k in range(200)))
            assert read_all(peer) == b""


@pytest.mark.parametrize(
    "path",
    [
        "/v2/models/../../etc/passwd", "/v2/models/..%2f..%2f..%2fetc%2fpasswd", "/../../../../etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd", "/v2/models/%00", "/v2/models/..\\..\\etc\\passwd", "//etc/passwd",
        "/v2/models/....//....//etc/passwd/infer", "/v2/models/segments/whole.onnx", "/v2/models/C:\\x/versions/../..",
    ],
)  # fmt: skip
def test_path_traversal_in_model_names_leads_nowhere(tiny_bundle: Bundle, target: EdgeProcess, path: str) -> None:
    with unharmed(tiny_bundle, target, "WARNING refused 127.0.0.1:"):
        for method in ("GET", "POST"):
            connection = http.client.HTTPConnection("127.0.0.1", int(target.url.rpartition(":")[2]), timeout=PATIENCE_S)
            with contextlib.closing(connection):
                # As it is: a client library would tidy it up.
                connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
                connection.putheader("Host", "edge")
                connection.putheader("Content-Length", "2")
                connection.endheaders(b"{}")
                answer = connection.getresponse()
                body = answer.read()
                assert 400 <= answer.status < 500
                assert b"root:" not in body and b"onnx" not in body.replace(path.encode(), b"")


HEAD = b"%s HTTP/1.1\r\nHost: edge\r\nConnection: close\r\n"
INFER = HEAD % b"POST /v2/models/%s/infer"
REFUSED_HTTP = {
    "no such path": (HEAD % b"GET /etc/passwd" + b"\r\n", 404, "nothing at /etc/passwd"),
    "no such model": (INFER % b"x" + b"Content-Length: 2\r\n\r\n{}", 404, 'models are .* got "x"'),
    "no such method": (HEAD % b"PUT /readyz" + b"\r\n", 405, "Method Not Allowed"),
    "no JSON": (INFER % b"MODEL" + b"Content-Length: 2\r\n\r\n[]", 400, "Expected `object`"),
    "slow": (INFER % b"MODEL" + b"Content-Length: 2\r\n\r\n{", 408, "did not arrive within 1 s"),
    "long": (INFER % b"MODEL" + b"Content-Length: 99999999\r\n\r\n", 413, "a body may have 16777216 B, got 99999999 B"),
    "compressed": (INFER % b"MODEL" + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}", 415, '"gzip"'),
}


@pytest.mark.parametrize("name", REFUSED_HTTP)
def test_what_is_refused_over_http_leaves_a_line_with_the_peer(
    tiny_bundle: Bundle, target: EdgeProcess, name: str
) -> None:
    from coinfer.runtime.oip_models import offered

    asked, status, line = REFUSED_HTTP[name]
    model = next(iter(offered(tiny_bundle, Segments(tiny_bundle.path, tiny_bundle.manifest.outputs))))
    with unharmed(tiny_bundle, target):
        with dial(target.url) as peer:
            peer.sendall(asked.replace(b"MODEL", model.encode()))
            assert int(read_all(peer).split()[1]) == status
            own = re.escape("{}:{}".format(*peer.getsockname()))
        eventually(lambda: any(re.search(f"WARNING refused {own}: .*{line}", text) for text in [*target.log]))
        assert sum("refused" in text for text in target.log) == 1


def test_a_wrong_or_missing_token_over_http_leaves_a_line_with_the_peer(tiny_bundle: Bundle, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.json", "camera")
    with EdgeProcess(tiny_bundle.folder, options=("--tokens", str(tmp_path / "tokens.json"))) as edge:
        where = edge.url.replace("ws:", "http:")
        for path in ("/metrics", "/v2", "/v2/models/x"):
            for wrong in (None, f"{token}x"):
                edge.log.clear()
                assert status_of(where + path, wrong)[0] == 401
                eventually(lambda: logged(edge, "WARNING refused 127.0.0.1:", "no token that this edge knows"))
                assert not any(token.partition(".")[2] in text for text in edge.log)


def test_more_sockets_than_there_is_room_for_are_turned_away(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    room = 40 + SPARE_SOCKETS
    before = count_of(target, 'coinfer_refused_total{reason="connections"}')
    with unharmed(tiny_bundle, target, "turned away"):
        with contextlib.ExitStack() as stack:
            peers = [stack.enter_context(dial(target.url)) for _ in range(room + 20)]
            # All end: those beyond the room at once, the others since they say nothing.
            assert [read_all(peer) for peer in peers] == [b""] * len(peers)
    # Each is counted, however many one line speaks of.
    said = sum(int(line.split("turned away ")[1].split()[0]) for line in target.log if "turned away" in line)
    assert said >= 20 and count_of(target, 'coinfer_refused_total{reason="connections"}') - before == said


def count_of(edge: EdgeProcess, name: str) -> int:
    """One count of an edge's /metrics; 0 where it has not been counted yet."""
    with urllib.request.urlopen(edge.url.replace("ws:", "http:") + "/metrics", timeout=PATIENCE_S) as answer:
        lines = answer.read().decode().splitlines()
    return int(next((float(line.split()[-1]) for line in lines if line.startswith(name)), 0))


def test_one_device_cannot_take_all_connections_before_it_greets(tiny_bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "tokens.json"
    greedy, other = (f"Authorization: Bearer {add_token(path, name)}" for name in ("camera-1", "camera-2"))
    options = ("--tokens", str(path), "--device-connections", "2", "--connections", "3")
    hello = frame(TEXT, DeviceConnection(Terms.of(tiny_bundle)).hello().encode())
    with EdgeProcess(tiny_bundle.folder, options=options) as edge, contextlib.ExitStack() as stack:
        for number in range(6):
            peer = stack.enter_context(dial(edge.url))
            assert b" 101 " in upgrade(peer, greedy)
            if number >= 2:
                # It is told at once, and has not said a word.
                refusal = json.loads(read_frame(peer)[1])
                assert (refusal["type"], "2 connections of this device" in refusal["reason"]) == ("refusal", True)
                assert close_code(peer)[0] == 1008
                peer.close()
        peer = stack.enter_context(dial(edge.url))
        assert b" 101 " in upgrade(peer, other)
        peer.sendall(hello)
        assert json.loads(read_frame(peer)[1])["type"] == "welcome"


def test_connections_that_greet_together_are_counted_together(tiny_bundle: Bundle, tmp_path: Path) -> None:
    token = add_token(tmp_path / "tokens.json", "camera")
    options = ("--tokens", str(tmp_path / "tokens.json"), "--device-connections", "2")
    with EdgeProcess(tiny_bundle.folder, options=options) as edge, contextlib.ExitStack() as stack:
        peers = [stack.enter_context(dial(edge.url)) for _ in range(5)]
        for peer in peers:
            assert b" 101 " in upgrade(peer, f"Authorization: Bearer {token}")
        hello = frame(TEXT, DeviceConnection(Terms.of(tiny_bundle)).hello().encode())
        kinds = []
        for peer in peers:
            peer.sendall(hello)
            kinds.append(json.loads(read_frame(peer)[1])["type"])
        assert kinds == ["welcome"] * 2 + ["refusal"] * 3


def test_a_random_peer_harms_nothing(tiny_bundle: Bundle, target: EdgeProcess) -> None:
    """Seeded noise as HTTP, as frames and as messages."""
    random = np.random.default_rng(0)
    with unharmed(tiny_bundle, target):
        for round_ in range(150):
            noise = random.bytes(int(random.integers(1, 3000)))
            with dial(target.url) as peer, contextlib.suppress(OSError):
                if round_ % 3:
                    upgrade(peer)
                peer.sendall(noise if round_ % 3 < 2 else frame(int(random.integers(1, 3)), noise))
                peer.shutdown(socket.SHUT_WR)
                read_all(peer)


# --- what is served -----------------------------------------------------------------------------------------------


def altered(bundle: Bundle, folder: Path, change: Callable[[Path], None]) -> Path:
    import shutil

    shutil.copytree(bundle.folder, folder)
    change(folder)
    return folder


def test_an_altered_bundle_is_not_served(tiny_bundle: Bundle, tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        with (folder / "segments/whole.onnx").open("r+b") as file:
            file.seek(100)
            file.write(b"\xff")

    folder = altered(tiny_bundle, tmp_path / "altered", change)
    with pytest.raises(LinkError, match="whole.onnx. does not have the sha256 that bundle.json states"):
        EdgeProcess(folder)


def test_a_bundle_that_is_not_signed_is_not_served_where_it_must_be(tiny_bundle: Bundle, tmp_path: Path) -> None:
    from coinfer.signature import new_key, sign

    folder = altered(tiny_bundle, tmp_path / "signed", lambda folder: None)
    public = new_key(tmp_path / "key")
    with pytest.raises(LinkError, match="it is not signed"):
        EdgeProcess(folder, options=("--verify-key", str(public)))
    sign(folder, tmp_path / "key")
    with EdgeProcess(folder, options=("--verify-key", str(public))) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
            assert device.infer(pictures(1)[0]).answered == "edge"
    with pytest.raises(LinkError, match="its signature is not of key"):
        EdgeProcess(folder, options=("--verify-key", str(new_key(tmp_path / "other"))))


@pytest.mark.parametrize("kind", ["external data", "custom operators"])
def test_a_bundle_with_such_a_segment_is_not_served(tiny_bundle: Bundle, tmp_path: Path, kind: str) -> None:
    import onnx

    from coinfer.bundle import load_bundle, write_manifest

    def change(folder: Path) -> None:
        path = folder / "segments/whole.onnx"
        model = onnx.load(path)
        if kind == "external data":
            weights = model.graph.initializer[0]
            weights.data_location = onnx.TensorProto.EXTERNAL
            entry = weights.external_data.add()
            entry.key, entry.value = "location", "/etc/passwd"
        else:
            model.opset_import.append(onnx.helper.make_opsetid("my.ops", 1))
            model.graph.node[0].domain = "my.ops"
        path.write_bytes(model.SerializeToString())
        # Whoever makes a bundle may state any hash.
        write_manifest(folder, load_bundle(tiny_bundle.folder).manifest)

    folder = altered(tiny_bundle, tmp_path / "bad", change)
    line = {"external data": "refers to weights outside itself", "custom operators": "uses custom operators"}[kind]
    with pytest.raises(LinkError, match=line):
        EdgeProcess(folder)


def test_both_ends_set_their_caps(tiny_bundle: Bundle) -> None:
    """No default of a library is left in force: compression off, message sizes as the terms need, no heartbeat."""
    from coinfer.runtime.link import Link
    from coinfer.runtime.server import EdgeServer

    terms = Terms.of(tiny_bundle)
    with EdgeProcess(tiny_bundle.folder) as edge:
        link = Link(edge.url, max_message_bytes=terms.max_reply_bytes(), timeout_s=PATIENCE_S)
        assert link._protocol.max_message_size == terms.max_reply_bytes() and link._protocol.extensions == []
        link.close()
    from coinfer.runtime.app import make_app

    app = make_app(tiny_bundle)
    with socket.socket() as listener:
        config = EdgeServer(app, listener, Access(), "").config
    app.state.edge.close()
    assert config.ws_max_size == terms.max_request_bytes() and not config.ws_per_message_deflate
    assert config.ws_ping_interval is None and config.h11_max_incomplete_event_size == 16384


def test_tls_on_the_edge_is_1_2_at_least(tiny_bundle: Bundle, ca: Path) -> None:
    with EdgeProcess(tiny_bundle.folder, options=tls_options(ca)) as edge:
        for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
            context = DeviceTls(ca=ca / "ca.pem").context()
            context.minimum_version = context.maximum_version = version
            with dial(edge.url, context=context) as peer:
                assert peer.version() == version.name.replace("_", ".")  # type: ignore[attr-defined]
        context = DeviceTls(ca=ca / "ca.pem").context()
        with pytest.warns(DeprecationWarning):
            context.minimum_version = context.maximum_version = ssl.TLSVersion.TLSv1_1
        context.set_ciphers("ALL:@SECLEVEL=0")
        with pytest.raises(OSError):
            dial(edge.url, context=context)
        eventually(lambda: logged(edge, "no TLS came of it"))
