"""Device and edge in two processes on loopback."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection
from websockets.sync.client import connect as websocket

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segments
from coinfer.errors import LinkError, ProtocolError, RefusedError, UsageError
from coinfer.plan import CodecSpec
from coinfer.protocol import DeviceConnection, Failure, Reply, Terms
from coinfer.runtime.device import Device
from coinfer.runtime.edge import listen
from coinfer.runtime.spawn import EdgeProcess
from tiny_bundle import (
    DEVICE,
    MENU,
    SPLIT16,
    SPLIT32,
    SPLIT_TWO,
    UPLOAD,
    UPLOAD_TOP,
    make_tiny_bundle,
    pictures,
)

PATIENCE_S = 30


@pytest.fixture(scope="module")
def edge(tiny_bundle: Bundle) -> Iterator[EdgeProcess]:
    with EdgeProcess(tiny_bundle.folder, workers=2) as process:
        yield process


@pytest.fixture
def device(tiny_bundle: Bundle, edge: EdgeProcess) -> Iterator[Device]:
    with Device(tiny_bundle, edge=edge.url, timeout_s=PATIENCE_S) as device:
        yield device


def local(bundle: Bundle, number: int, picture: np.ndarray) -> np.ndarray:
    """Head and tail in this process, with nothing in between."""
    segments, plan = Segments(bundle.path, bundle.manifest.outputs), bundle.plan(number)
    crossing = (picture[None],) if plan.kind == "upload" else segments.head(plan).run((picture[None],))
    return segments.tail(plan).run(crossing)[0]


def healthz(edge: EdgeProcess) -> dict[str, object]:
    with urllib.request.urlopen(edge.url.replace("ws:", "http:") + "/healthz", timeout=PATIENCE_S) as answer:
        return dict(json.load(answer))


def eventually(is_so: Callable[[], bool]) -> None:
    """Wait until something in another thread or process is so; fails where it takes too long."""
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


# --- the work ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", [UPLOAD, SPLIT32, SPLIT_TWO])
def test_lossless_codecs_change_no_bit(tiny_bundle: Bundle, device: Device, plan: int) -> None:
    for picture in pictures(5):
        expected = local(tiny_bundle, plan, picture)
        np.testing.assert_array_equal(device.infer(picture, plan=plan).outputs[0], expected, strict=True)


@pytest.mark.parametrize(
    ("number", "codec"),
    [
        (UPLOAD, CodecSpec(transform="image", coder="png")),
        (UPLOAD, CodecSpec(transform="image", coder="webp-lossless")),
        (SPLIT_TWO, CodecSpec(transform="float32", coder="zstd")),
    ],
    ids=lambda value: value.name if isinstance(value, CodecSpec) else "",
)
def test_coded_without_loss_no_logit_changes_on_the_wire(tmp_path: Path, number: int, codec: CodecSpec) -> None:
    menu = tuple(msgspec.structs.replace(p, codec=codec) if p.number == number else p for p in MENU)
    bundle = make_tiny_bundle(tmp_path / "bundle", menu=menu)
    with EdgeProcess(bundle.folder) as process, Device(bundle, edge=process.url, timeout_s=PATIENCE_S) as device:
        for picture in pictures(5):
            expected = local(bundle, number, picture)
            np.testing.assert_array_equal(device.infer(picture, plan=number).outputs[0], expected, strict=True)


def test_a_lossy_codec_changes_bits_but_little(tiny_bundle: Bundle, device: Device) -> None:
    picture = pictures(1)[0]
    got, exact = device.infer(picture, plan=SPLIT16).outputs[0], local(tiny_bundle, SPLIT16, picture)
    assert not np.array_equal(got, exact)
    np.testing.assert_allclose(got, exact, atol=1e-2)


def test_top_classes_come_best_first(tiny_bundle: Bundle, device: Device) -> None:
    picture = pictures(1)[0]
    best = device.infer(picture, plan=UPLOAD_TOP)
    expected = np.argsort(-local(tiny_bundle, UPLOAD_TOP, picture)[0])[:3]
    assert best.classes is not None and best.classes.tolist() == expected.tolist()


@pytest.mark.parametrize("plan", [DEVICE, UPLOAD, SPLIT32])
def test_a_stream_is_complete_and_in_order(tiny_bundle: Bundle, device: Device, plan: int) -> None:
    xs = pictures(100)
    singly = [device.infer(x, plan=plan).outputs[0] for x in xs]
    streamed = list(device.stream(iter(xs), plan=plan))
    np.testing.assert_array_equal([a.outputs[0] for a in streamed], singly)
    assert [a.request for a in streamed] == list(range(100, 200))


def test_both_clocks_tell_of_a_request(device: Device) -> None:
    answer = device.infer(pictures(1)[0], plan=SPLIT32)
    stages = {span.stage: span.end_s - span.start_s for span in answer.spans}
    assert list(stages) == ["head", "encode", "exchange", "wait", "decode", "tail"]
    assert stages["exchange"] > stages["wait"] + stages["decode"] + stages["tail"]
    assert answer.outcome.latency_s > stages["head"] + stages["encode"] + stages["exchange"]


def test_the_edge_says_what_it_holds(tiny_bundle: Bundle, edge: EdgeProcess, device: Device) -> None:
    before = healthz(edge)
    device.infer(pictures(1)[0], plan=UPLOAD)
    eventually(lambda: healthz(edge)["requests"] == int(str(before["requests"])) + 1)
    eventually(lambda: healthz(edge)["connections"] == 1)
    after = healthz(edge)
    assert after["bundle"] == tiny_bundle.digest and after["status"] == "ok"
    assert after["plans"] == [UPLOAD, SPLIT32, SPLIT16, SPLIT_TWO, UPLOAD_TOP]


def test_a_heartbeat_returns(device: Device) -> None:
    assert 0 < device.ping() < PATIENCE_S


# --- what the edge is sent that it should not be -----------------------------------------------------


@contextlib.contextmanager
def raw(bundle: Bundle, edge: EdgeProcess) -> Iterator[tuple[ClientConnection, DeviceConnection]]:
    """A greeted WebSocket to send anything on."""
    terms = DeviceConnection(Terms.of(bundle))
    with websocket(edge.url + "/link", compression=None, max_size=None) as connection:
        connection.send(terms.hello())
        terms.receive(connection.recv(PATIENCE_S))
        yield connection, terms


def test_a_payload_that_is_none_fails_its_request_alone(tiny_bundle: Bundle, edge: EdgeProcess) -> None:
    segments = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs)
    payload = segments.codec(tiny_bundle.plan(UPLOAD)).encode((pictures(1),))
    altered = payload[:-1] + bytes([payload[-1] ^ 1])
    with raw(tiny_bundle, edge) as (connection, device):
        for number, bad in enumerate((b"", payload[:-1], altered, payload + b"x", bytes(300))):
            connection.send(device.request(number, UPLOAD, bad))
            failure = device.receive(connection.recv(PATIENCE_S))
            assert isinstance(failure, Failure) and failure.request == number
        connection.send(device.request(99, UPLOAD, payload))
        assert isinstance(device.receive(connection.recv(PATIENCE_S)), Reply)


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (b"\x09" + bytes(7), "unknown message type 9"),
        (b"\x01\0\x63\0" + bytes(4), "plan 99 does not cross the link"),
        (b"", "a message has 8 to"),
        ("text", "a text message after the greeting"),
    ],
)
def test_a_violation_closes_the_link_with_its_reason(
    tiny_bundle: Bundle, edge: EdgeProcess, message: bytes | str, line: str
) -> None:
    with raw(tiny_bundle, edge) as (connection, _):
        connection.send(message)
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE_S)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1002 and line in closed.value.rcvd.reason
    eventually(lambda: any("closed the link" in logged and line in logged for logged in [*edge.log]))


def test_a_message_over_the_limit_closes_the_link(tiny_bundle: Bundle, edge: EdgeProcess) -> None:
    with raw(tiny_bundle, edge) as (connection, device):
        most = Terms.of(tiny_bundle).max_request_bytes()
        connection.send(bytes(most + 1))
        with pytest.raises(ConnectionClosed) as closed:
            connection.recv(PATIENCE_S)
    assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


@pytest.mark.parametrize(
    ("greeting", "line"),
    [
        ('{"type": "hello", "protocol": 1}', "this side speaks protocol 2, the device speaks 1"),
        ("GET / HTTP/1.1", "does not begin with a greeting"),
        (b"\x01" + bytes(7), "a binary message before the greeting"),
    ],
)
def test_another_greeting_is_refused_with_a_reason(edge: EdgeProcess, greeting: bytes | str, line: str) -> None:
    with websocket(edge.url, compression=None) as connection:
        connection.send(greeting)
        assert line in msgspec.json.decode(connection.recv(PATIENCE_S))["reason"]
        with pytest.raises(ConnectionClosed):
            connection.recv(PATIENCE_S)


# --- when it cannot work -----------------------------------------------------------------------------


def test_another_bundle_is_refused_by_name(tmp_path: Path, edge: EdgeProcess, tiny_bundle: Bundle) -> None:
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    mine, theirs = tiny_bundle.digest[:12], other.digest[:12]
    with pytest.raises(RefusedError, match=f"this edge holds bundle {mine}, the device has {theirs}"):
        Device(other, edge=edge.url)


def test_no_edge_there_is_one_line(tiny_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(LinkError, match=f"no edge at ws://127.0.0.1:{port}: connection refused"):
        Device(tiny_bundle, edge=f"ws://127.0.0.1:{port}")


def test_a_web_server_is_not_an_edge(tiny_bundle: Bundle) -> None:
    class Silent(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Silent) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.server_port}/nothing"
        with pytest.raises(ProtocolError, match="does not speak WebSocket: .* HTTP/1.0 404"):
            Device(tiny_bundle, edge=url, timeout_s=PATIENCE_S)
        server.shutdown()
        thread.join()


def test_a_port_in_use_is_one_line_before_anything_is_loaded(tiny_bundle: Bundle) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LinkError, match=f"port {port} of 127.0.0.1 is in use: choose another"):
            listen("127.0.0.1", port)
        with pytest.raises(LinkError, match=f"did not start: ERROR port {port} of 127.0.0.1 is in use"):
            EdgeProcess(tiny_bundle.folder, port=port)


@pytest.mark.parametrize("port", [-1, 65536])
def test_a_port_that_is_none_is_a_usage_error(port: int) -> None:
    with pytest.raises(UsageError, match=f"a port must be 0 to 65535, got {port}"):
        listen("127.0.0.1", port)


def test_an_unknown_host_to_listen_on_is_one_line() -> None:
    with pytest.raises(LinkError, match="cannot listen on nowhere.invalid:0"):
        listen("nowhere.invalid", 0)


def endless() -> Iterator[np.ndarray]:
    while True:
        yield from pictures(10)


def test_an_edge_killed_in_a_stream_is_a_link_error(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge, Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
        with pytest.raises(LinkError, match=f"the link to {edge.url} broke"):
            for answer in device.stream(endless()):
                if answer.request == 20:
                    edge.process.kill()
        assert answer.request >= 20
        edge.process.wait()
        with pytest.raises(LinkError, match="no edge at"):
            device.infer(pictures(1)[0])
    names = {thread.name for thread in threading.enumerate()}
    assert not names & {"coinfer-compute", "coinfer-send", "coinfer-receive"}


def test_an_edge_killed_between_requests_is_a_link_error(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge, Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
        device.infer(pictures(1)[0])
        edge.process.kill()
        edge.process.wait()
        with pytest.raises(LinkError, match="no edge at"):
            device.infer(pictures(1)[0])


def test_an_edge_that_came_back_is_used_again(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge:
        device = Device(tiny_bundle, edge=edge.url, plan=UPLOAD)
        first = device.infer(pictures(1)[0])
    with EdgeProcess(tiny_bundle.folder, port=int(edge.url.rpartition(":")[2])), device:
        np.testing.assert_array_equal(device.infer(pictures(1)[0]).outputs[0], first.outputs[0])


RUN_FOREVER = """
import sys
from pathlib import Path
from coinfer.bundle import load_bundle
from coinfer.errors import CoinferError
from coinfer.runtime.device import Device
import numpy as np

bundle = load_bundle(Path(sys.argv[1]))
def endless():
    while True:
        yield np.zeros((8, 8, 3), np.uint8)
try:
    with Device(bundle, edge=sys.argv[2], plan=1) as device:
        for answer in device.stream(endless()):
            if answer.request == 10:
                print("running", flush=True)
except CoinferError as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def test_a_device_process_ends_when_its_edge_is_killed(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge:
        command = [sys.executable, "-c", RUN_FOREVER, str(tiny_bundle.folder), edge.url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as device:
            assert device.stdout is not None
            assert device.stdout.readline() == "running\n"
            edge.process.kill()
            rest = device.stdout.read().splitlines()
            assert device.wait(PATIENCE_S) == 1
    assert len(rest) == 1 and rest[0].startswith(f"the link to {edge.url} broke")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_edge_cleanly(tiny_bundle: Bundle, number: signal.Signals) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge, Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
        device.infer(pictures(1)[0])
        os.kill(edge.pid, number)
        assert edge.process.wait(PATIENCE_S) == 0
    assert not [line for line in edge.log if "Traceback" in line or "ERROR" in line]


def test_the_edge_ends_with_whoever_started_it(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder) as edge:
        assert edge.process.stdin is not None
        edge.process.stdin.close()
        assert edge.process.wait(PATIENCE_S) == 0


def test_a_loaded_edge_says_how_long_it_took(tiny_bundle: Bundle) -> None:
    with EdgeProcess(tiny_bundle.folder, load=50.0) as edge:
        with Device(tiny_bundle, edge=edge.url, plan=UPLOAD) as device:
            slow = device.infer(pictures(1)[0])
    tail = next(span for span in slow.spans if span.stage == "tail")
    exchange = next(span for span in slow.spans if span.stage == "exchange")
    assert exchange.end_s - exchange.start_s > tail.end_s - tail.start_s > 0
