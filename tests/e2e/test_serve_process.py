"""`coinfer serve` as an operator uses it: config file, reload, logs, the end; and the commands that go with it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import typer
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect as websocket

from coinfer.bundle import Bundle, load_bundle
from coinfer.cli.app import app
from coinfer.engine.segments import Segments
from coinfer.errors import LinkError, RefusedError
from coinfer.protocol import Busy, DeviceConnection, Failure, Reply, Terms, Welcome
from coinfer.runtime.app import EdgeLimits
from coinfer.runtime.certificates import FILES
from coinfer.runtime.device import Device
from coinfer.runtime.spawn import EdgeProcess
from coinfer.runtime.tls import DeviceTls
from coinfer.signature import sign
from tiny_bundle import MENU, UPLOAD, make_tiny_bundle, pictures

pytest.importorskip("cryptography", reason="certificates need the edge extra")

PATIENCE_S = 30.0
COINFER = [sys.executable, "-m", "coinfer.cli"]


class Served:
    """A `coinfer serve` that listens: its address, process and log lines so far."""

    def __init__(self, *arguments: object) -> None:
        command = [*COINFER, "serve", *map(str, arguments), "--json"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.log: list[str] = []
        self._reader = threading.Thread(target=self._read)
        self._reader.start()
        assert self.process.stdout is not None
        said = ""
        while not said.endswith("}\n") and (line := self.process.stdout.readline()):
            said += line
        self.said = json.loads(said) if said else {}
        self.url = self.said.get("url", "")

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.log.extend(line.rstrip() for line in iter(self.process.stderr.readline, ""))

    def end(self) -> int:
        self.process.terminate()
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        for pipe in (self.process.stdout, self.process.stderr):
            assert pipe is not None
            pipe.close()
        return code


@contextmanager
def served(*arguments: object) -> Iterator[Served]:
    edge = Served(*arguments)
    try:
        assert edge.url, edge.log
        yield edge
    finally:
        edge.end()


def coinfer(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COINFER, *map(str, arguments)], capture_output=True, text=True, timeout=PATIENCE_S)


def eventually(is_so: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


def write_config(path: Path, **values: object) -> Path:
    lines = (f"{key.replace('_', '-')} = {json.dumps(value)}" for key, value in values.items())
    path.write_text("\n".join(lines))
    return path


# --- the config file ----------------------------------------------------------------------------------------------


def test_a_config_file_gives_options_and_the_command_line_wins(tiny_bundle: Bundle, tmp_path: Path) -> None:
    config = write_config(tmp_path / "edge.toml", port=0, connections=1, hello="7s", log="json", device_connections=9)
    options = ("--config", config, "--connections", 2)
    with served(tiny_bundle.folder, *options) as edge:
        # From the file: the port that the system chose, and lines of JSON.
        assert edge.url != "ws://127.0.0.1:8300"
        devices = [Device(tiny_bundle, edge=edge.url, plan=UPLOAD) for _ in range(2)]
        with pytest.raises(RefusedError, match="already serves 2 connections"):
            Device(tiny_bundle, edge=edge.url)
        for device in devices:
            device.close()
        eventually(lambda: any(json.loads(line)["message"].startswith("refused") for line in edge.log))


def test_a_config_file_can_name_the_bundle_too(tiny_bundle: Bundle, tmp_path: Path) -> None:
    with served("--config", write_config(tmp_path / "c.toml", bundle=str(tiny_bundle.folder), port=0)) as edge:
        assert edge.said["bundle"] == tiny_bundle.digest


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("prot = 1", '"prot" is no option of this command; these are: batch-wait'),
        ("max_batch = 2", '"max_batch" is no option'),
        ('config = "x"', '"config" is no option'),
        ("port = true", '"port" must be a text or a number, got True'),
        ('insecure = "yes"', '"insecure" must be true or false, got \'yes\''),
        ("port = [1]", '"port" must be a text or a number, got [1]'),
        ("[limits]\nidle = 1", '"limits" is no option'),
        ("port = 70000", "65535"),
        ("port = ", "--config is not TOML"),
        ("idle = '5 parsecs'", "5 parsecs"),
    ],
)
def test_a_config_file_that_is_wrong_is_one_line(tiny_bundle: Bundle, tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "edge.toml").write_text(text)
    done = coinfer("serve", tiny_bundle.folder, "--config", tmp_path / "edge.toml")
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1


def test_a_config_file_that_is_not_there_is_one_line(tiny_bundle: Bundle, tmp_path: Path) -> None:
    done = coinfer("serve", tiny_bundle.folder, "--config", tmp_path / "nothing.toml")
    assert done.returncode == 2 and "--config cannot be read: no such file" in done.stderr


def test_messages_that_leave_no_room_for_a_greeting_are_refused_at_the_start(tiny_bundle: Bundle) -> None:
    least = len(Terms.of(tiny_bundle).hello())
    done = coinfer("serve", tiny_bundle.folder, "--port", 0, "--max-message-bytes", least - 1)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"messages of up to {least - 1} B leave a device no room for its greeting of {least} B" in done.stderr
    with served(tiny_bundle.folder, "--port", 0, "--max-message-bytes", least) as edge:
        Device(tiny_bundle, edge=edge.url).close()


def test_every_limit_of_an_edge_is_an_option_with_its_default() -> None:
    params = {param.name: param for param in typer.main.get_command(app).commands["serve"].params}  # type: ignore[attr-defined]
    defaults = EdgeLimits()
    for field in EdgeLimits.__struct_fields__:
        default = params[field.removesuffix("_s")].default
        expected = getattr(defaults, field)
        assert default == (f"{expected:g}s" if field.endswith("_s") else expected), field


# --- logs ---------------------------------------------------------------------------------------------------------


def test_json_logs_say_when_what_and_whose(tiny_bundle: Bundle, tmp_path: Path) -> None:
    token = coinfer("token", "add", "camera-1", "--file", tmp_path / "tokens.json").stdout.strip()
    options = ("--port", 0, "--log", "json", "--tokens", tmp_path / "tokens.json")
    with served(tiny_bundle.folder, *options) as edge:
        device = DeviceConnection(Terms.of(tiny_bundle))
        headers = {"Authorization": f"Bearer {token}"}
        with websocket(edge.url, compression=None, additional_headers=headers) as connection:
            connection.send(device.hello())
            device.receive(connection.recv(PATIENCE_S))
            connection.send(device.request(5, UPLOAD, b"no payload"))
            device.receive(connection.recv(PATIENCE_S))
        with pytest.raises(RefusedError):
            Device(tiny_bundle, edge=edge.url)
        eventually(lambda: any("no token" in line for line in edge.log))
        asked = urllib.request.Request(edge.url.replace("ws:", "http:") + "/v2/models/nothing", headers=headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(asked, timeout=PATIENCE_S)
        caught.value.close()
    lines = [json.loads(line) for line in edge.log]
    assert all({"time", "level", "message"} <= line.keys() for line in lines)
    failed = next(line for line in lines if line["message"].startswith("request 5 failed"))
    assert (failed["level"], failed["device"], failed["request"]) == ("warning", "camera-1", 5)
    assert failed["plan"] == UPLOAD and "peer" not in failed
    refused = next(line for line in lines if "no token" in line["message"])
    assert refused["peer"].startswith("127.0.0.1:") and "device" not in refused
    over_http = next(line for line in lines if 'got "nothing"' in line["message"])
    assert over_http["peer"].startswith("127.0.0.1:") and over_http["device"] == "camera-1"


# --- reload -------------------------------------------------------------------------------------------------------


def answers_of(bundle: Bundle, edge: Served, picture: np.ndarray) -> np.ndarray:
    with Device(bundle, edge=edge.url, plan=UPLOAD, timeout_s=PATIENCE_S) as device:
        return device.infer(picture).outputs[0]


def test_a_bundle_that_changed_is_served_after_a_reload(tmp_path: Path) -> None:
    picture = pictures(1)[0]
    before = make_tiny_bundle(tmp_path / "bundle")
    mine = Path(shutil.copytree(before.folder, tmp_path / "mine"))
    with served(tmp_path / "bundle", "--port", 0) as edge:
        old = Device(load_bundle(mine), edge=edge.url, plan=UPLOAD)
        first = old.infer(picture).outputs[0]
        # A reload where nothing changed ends no connection.
        os.kill(edge.process.pid, signal.SIGHUP)
        np.testing.assert_array_equal(old.infer(picture).outputs[0], first)
        after = make_tiny_bundle(tmp_path / "bundle", seed=1)
        os.kill(edge.process.pid, signal.SIGHUP)
        eventually(lambda: any(f"serves bundle {after.digest[:12]} now" in line for line in edge.log))
        second = answers_of(after, edge, picture)
        assert not np.array_equal(first, second)
        segments = Segments(after.path, after.manifest.outputs)
        np.testing.assert_array_equal(second, segments.tail(after.plan(UPLOAD)).run((picture[None],))[0])
        with old, pytest.raises(LinkError):
            old.infer(picture)
        with pytest.raises(RefusedError, match=f"this edge holds bundle {after.digest[:12]}"):
            Device(load_bundle(mine), edge=edge.url)


def test_a_reload_lets_in_what_the_new_bundles_largest_request_needs(tmp_path: Path) -> None:
    before = make_tiny_bundle(tmp_path / "bundle", menu=MENU[: UPLOAD + 1])
    old_bytes = Terms.of(before).max_request_bytes()
    with served(tmp_path / "bundle", "--port", 0) as edge:
        after = make_tiny_bundle(tmp_path / "bundle")
        os.kill(edge.process.pid, signal.SIGHUP)
        eventually(lambda: any(f"serves bundle {after.digest[:12]} now" in line for line in edge.log))
        terms = Terms.of(after)
        assert terms.max_request_bytes() > old_bytes + 8
        device = DeviceConnection(terms)
        with websocket(edge.url, compression=None) as connection:
            connection.send(device.hello())
            welcome = device.receive(connection.recv(PATIENCE_S))
            assert isinstance(welcome, Welcome) and welcome.limits.max_message_bytes == terms.max_request_bytes()
            # The longest request that the welcome allows is read: that its payload is none is its own failure.
            connection.send(device.request(0, UPLOAD, bytes(terms.max_request_bytes() - 8)))
            assert isinstance(device.receive(connection.recv(PATIENCE_S)), Failure)
            with pytest.raises(ConnectionClosed) as closed:
                connection.send(bytes(terms.max_request_bytes() + 1))
                connection.recv(PATIENCE_S)
            assert closed.value.rcvd is not None and closed.value.rcvd.code == 1009


def test_a_broken_new_bundle_keeps_the_old_one(tmp_path: Path) -> None:
    picture = pictures(1)[0]
    bundle = make_tiny_bundle(tmp_path / "bundle")
    mine = load_bundle(Path(shutil.copytree(bundle.folder, tmp_path / "mine")))
    with served(tmp_path / "bundle", "--port", 0) as edge:
        first = answers_of(mine, edge, picture)
        make_tiny_bundle(tmp_path / "bundle", seed=1)
        (tmp_path / "bundle" / "segments/whole.onnx").write_bytes(b"broken")
        for content in (None, b"not JSON"):
            if content is not None:
                (tmp_path / "bundle" / "bundle.json").write_bytes(content)
            seen = len(edge.log)
            os.kill(edge.process.pid, signal.SIGHUP)
            eventually(lambda seen=seen: any("kept the bundle of before" in line for line in edge.log[seen:]))
            np.testing.assert_array_equal(answers_of(mine, edge, picture), first)


def test_an_unsigned_new_bundle_keeps_the_old_one(tmp_path: Path) -> None:
    bundle = make_tiny_bundle(tmp_path / "bundle")
    mine = load_bundle(Path(shutil.copytree(bundle.folder, tmp_path / "mine")))
    assert coinfer("sign", "--new-key", tmp_path / "key").returncode == 0
    assert coinfer("sign", tmp_path / "bundle", "--key", tmp_path / "key").returncode == 0
    with served(tmp_path / "bundle", "--port", 0, "--verify-key", tmp_path / "key.pub") as edge:
        after = make_tiny_bundle(tmp_path / "bundle", seed=1)
        os.kill(edge.process.pid, signal.SIGHUP)
        eventually(lambda: any("kept the bundle of before: it is not signed" in line for line in edge.log))
        answers_of(mine, edge, pictures(1)[0])
        sign(tmp_path / "bundle", tmp_path / "key")
        os.kill(edge.process.pid, signal.SIGHUP)
        eventually(lambda: any(f"serves bundle {after.digest[:12]} now" in line for line in edge.log))


# --- the end ------------------------------------------------------------------------------------------------------


def test_sigterm_answers_what_was_read_once_and_loses_nothing(tiny_bundle: Bundle) -> None:
    """A slow edge with many requests in its line is told to end: all that it has read get one answer each."""
    number = 24
    segments = Segments(tiny_bundle.path, tiny_bundle.manifest.outputs)
    plan = tiny_bundle.plan(UPLOAD)
    xs = pictures(number)
    payloads = [segments.codec(plan).encode((x[None],)) for x in xs]
    exact = [segments.tail(plan).run((x[None],))[0] for x in xs]
    options = ("--max-wait", "60", "--in-flight", str(number))
    with EdgeProcess(tiny_bundle.folder, load=100.0, options=options) as edge:
        device = DeviceConnection(Terms.of(tiny_bundle))
        with websocket(edge.url, compression=None) as connection:
            connection.send(device.hello())
            device.receive(connection.recv(PATIENCE_S))
            for request, payload in enumerate(payloads):
                connection.send(device.request(request, UPLOAD, payload))
            url = edge.url.replace("ws:", "http:") + "/healthz"

            def in_hand() -> int:
                with urllib.request.urlopen(url, timeout=PATIENCE_S) as answer:
                    health = json.load(answer)
                # One is being computed, and is in no count.
                return int(health["waiting"]) + int(health["requests"]) + 1

            eventually(lambda: in_hand() >= number)
            os.kill(edge.pid, signal.SIGTERM)
            got: Counter[int] = Counter()
            with pytest.raises(ConnectionClosed) as closed:
                while True:
                    event = device.receive(connection.recv(PATIENCE_S))
                    assert isinstance(event, Reply) and not isinstance(event, Busy)
                    np.testing.assert_array_equal(event.result.outputs[0], exact[event.request])
                    got[event.request] += 1
        assert got == Counter(range(number))
        assert closed.value.rcvd is not None
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1012, "this edge is going away")
        assert edge.process.wait(PATIENCE_S) == 0
    assert not [line for line in edge.log if "ERROR" in line or "unanswered" in line]


# --- the two-minute recipe ----------------------------------------------------------------------------------------


def test_cert_token_serve_run(tiny_bundle: Bundle, tmp_path: Path) -> None:
    """docs/security.md, command by command."""
    assert coinfer("cert", tmp_path / "ca", "--host", "127.0.0.1", "--host", "edge.local").returncode == 0
    assert {path.name for path in (tmp_path / "ca").iterdir()} == set(FILES)
    made = coinfer("token", "add", "camera-1", "--file", tmp_path / "tokens.json")
    assert made.returncode == 0 and made.stdout.startswith("camera-1.") and made.stderr == ""
    (tmp_path / "token").write_text(made.stdout)
    options = ("--cert", tmp_path / "ca/server.pem", "--key", tmp_path / "ca/server.key")
    with served(
        tiny_bundle.folder, "--host", "0.0.0.0", "--port", 0, *options, "--tokens", tmp_path / "tokens.json"
    ) as edge:
        url = edge.url.replace("0.0.0.0", "127.0.0.1")
        assert url.startswith("wss://")
        np.save(tmp_path / "x.npy", pictures(3))
        trust = ("--token-file", tmp_path / "token", "--ca", tmp_path / "ca/ca.pem")
        done = coinfer(
            "run", tiny_bundle.folder, "--edge", url, "--plan", UPLOAD, "--data", tmp_path / "x.npy", *trust
        )
        assert done.returncode == 0, done.stderr
        assert [json.loads(line)["answered"] for line in done.stdout.splitlines()] == ["edge"] * 3
        listed = coinfer("token", "list", "--file", tmp_path / "tokens.json", "--json")
        assert list(json.loads(listed.stdout)["devices"]) == ["camera-1"]
        assert coinfer("token", "revoke", "camera-1", "--file", tmp_path / "tokens.json").returncode == 0
        eventually(lambda: any("tokens are read anew: 0 devices" in line for line in edge.log))
        with pytest.raises(RefusedError, match="another token than was given"):
            Device(
                tiny_bundle, edge=url, token=made.stdout.strip(), tls=DeviceTls(ca=tmp_path / "ca/ca.pem")
            ).close()


def test_cert_keeps_its_keys_and_says_that_it_is_for_tests(tmp_path: Path) -> None:
    done = coinfer("cert", tmp_path / "ca", "--host", "localhost", "--json")
    assert "for tests only" in done.stderr and json.loads(done.stdout)["hosts"] == ["localhost"]
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "ca").glob("*.key")} == {0o600}
    again = coinfer("cert", tmp_path / "ca", "--host", "localhost")
    assert again.returncode == 2 and "a key is never overwritten" in again.stderr
    assert coinfer("cert", tmp_path / "ca", "--revoke", tmp_path / "ca/client.pem").returncode == 0
    for wrong in ([], ["--host", "x", "--revoke", tmp_path / "ca/client.pem"]):
        done = coinfer("cert", tmp_path / "other", *wrong)
        assert done.returncode == 2 and "needs --host NAME" in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [["token", "add", "--file", "t"], ["token", "list", "x", "--file", "t"], ["sign"], ["sign", "b"],
     ["sign", "--key", "k"], ["sign", "b", "--key", "k", "--new-key", "n"]],
)  # fmt: skip
def test_commands_say_what_they_need(arguments: list[str]) -> None:
    done = coinfer(*arguments)
    assert done.returncode == 2 and done.stderr.startswith("coinfer: error: `coinfer ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("arguments", [["cert", "DIR", "--host", "x"], ["sign", "--new-key", "DIR"]])
def test_without_the_library_a_line_says_what_to_install(tmp_path: Path, arguments: list[str]) -> None:
    program = (
        "import sys\nsys.modules['cryptography'] = None\n"
        "from coinfer.cli.app import main\nsys.exit(main(sys.argv[1:]))"
    )
    given = [str(tmp_path / "made") if word == "DIR" else word for word in arguments]
    command = [sys.executable, "-c", program, *given]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 1 and not (tmp_path / "made").exists()
    assert done.stderr.startswith("coinfer: error: this command needs cryptography") and done.stderr.count("\n") == 1
    assert 'pip install "coinfer[edge]"' in done.stderr
