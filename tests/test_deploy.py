"""The files of deploy/: units that systemd takes, options that exist, containers without more than they need."""

from __future__ import annotations

import http.server
import re
import shlex
import shutil
import socket
import ssl
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from coinfer.bundle import Bundle
from coinfer.runtime.spawn import EdgeProcess

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
UNITS = sorted(DEPLOY.glob("*.service"))
CONTAINERS = sorted(DEPLOY.glob("Containerfile.*"))
each_unit = pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
each_container = pytest.mark.parametrize("path", CONTAINERS, ids=lambda path: path.suffix[1:])


def entries(path: Path) -> dict[tuple[str, str], list[str]]:
    """(section, key) -> values of a unit, continued lines joined."""
    found: dict[tuple[str, str], list[str]] = {}
    section = ""
    for line in path.read_text().replace("\\\n", " ").splitlines():
        if line.startswith("["):
            section = line.strip("[]")
        elif line.strip() and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault((section, key), []).append(value)
    return found


def known_options(command: str) -> set[str]:
    typer = pytest.importorskip("typer")
    from coinfer.cli.app import app

    params = typer.main.get_command(app).commands[command].params
    return {option for param in params for option in (*param.opts, *param.secondary_opts)}


def check_command(words: list[str]) -> None:
    """The words of a call of coinfer name a command and options that there are."""
    assert Path(words[0]).name == "coinfer"
    used = {word.split("=")[0] for word in words[2:] if word.startswith("-")}
    assert used <= known_options(words[1]), words


# --- systemd ---------------------------------------------------------------------------------------


def test_there_is_a_unit_for_either_machine():
    assert [path.stem for path in UNITS] == ["coinfer-device", "coinfer-edge"]


@each_unit
def test_systemd_takes_the_unit(path: Path, tmp_path: Path):
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is not here; the other tests parse the units")
    # The program of an installation stands where this one's is.
    text = path.read_text().replace("/opt/coinfer/bin/coinfer", shutil.which("true") or "/bin/true")
    copy = tmp_path / path.name
    copy.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


@each_unit
def test_a_unit_starts_what_there_is_with_options_that_there_are(path: Path):
    (line,) = entries(path)["Service", "ExecStart"]
    check_command(shlex.split(line))


@each_unit
def test_a_unit_is_closed_and_comes_back(path: Path):
    found = entries(path)
    for key, value in {
        "NoNewPrivileges": "yes",
        "ProtectSystem": "strict",
        "ProtectHome": "yes",
        "PrivateTmp": "yes",
        "CapabilityBoundingSet": "",
        "RestrictNamespaces": "yes",
        "Restart": "always",
        "User": "coinfer",
    }.items():
        assert found["Service", key] == [value], key
    assert found["Unit", "StartLimitIntervalSec"] == ["0"]


def test_an_edge_has_the_time_to_answer_what_it_has_read_and_reloads_by_signal():
    pytest.importorskip("uvicorn")
    from coinfer.runtime.server import DRAIN_S

    found = entries(DEPLOY / "coinfer-edge.service")
    assert int(found["Service", "TimeoutStopSec"][0]) >= 2 * DRAIN_S
    assert found["Service", "ExecReload"] == ["/bin/kill -HUP $MAINPID"]
    assert found["Service", "KillSignal"] == ["SIGTERM"]


def test_the_devices_environment_has_what_its_unit_asks_for():
    found = entries(DEPLOY / "coinfer-device.service")
    asked = set(re.findall(r"\$\{(\w+)\}", found["Service", "ExecStart"][0]))
    lines = [line for line in (DEPLOY / "device.env").read_text().splitlines() if not line.startswith("#")]
    given = dict(line.split("=", 1) for line in lines)
    assert set(given) == asked == {"EDGE", "DATA"}
    assert given["EDGE"].startswith("wss://")


def test_the_edges_configuration_has_options_of_serve_the_commented_ones_too():
    text = (DEPLOY / "edge.toml").read_text()
    whole = re.sub(r"^# (?=[a-z-]+ = )", "", text, flags=re.MULTILINE)
    values = tomllib.loads(whole)
    assert len(values) > len(tomllib.loads(text)) > 5
    assert {f"--{key}" for key in values} <= known_options("serve")
    # Beyond this machine TLS and tokens are needed, and insecure is not among them.
    assert values["host"] == "0.0.0.0" and {"cert", "key", "tokens"} <= set(tomllib.loads(text))
    assert "insecure" not in values


# --- containers ------------------------------------------------------------------------------------


def instructions(path: Path) -> list[tuple[str, str]]:
    """(instruction, rest) of a Containerfile, continued lines joined, comments left out."""
    lines = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined)]


@each_container
def test_a_container_is_slim_without_root_and_copies_what_there_is(path: Path):
    found = instructions(path)
    starts = [place for place, (word, _) in enumerate(found) if word == "FROM"]
    assert all(found[place][1].split()[0] == "python:3.11-slim" for place in starts) and len(starts) == 2
    for word, rest in found:
        if word == "COPY" and not rest.startswith("--from="):
            assert all((ROOT / name).exists() for name in rest.split()[:-1]), rest
    # What runs is the last stage: no compiler, no packages of the system, nothing built, and a user of its own.
    last = found[starts[-1] :]
    ran = " ".join(rest for word, rest in last if word == "RUN")
    assert "--only-binary=:all:" in ran and "apt" not in ran and "gcc" not in ran
    (user,) = [rest for word, rest in last if word == "USER"]
    assert user.isdigit() and int(user) > 0 and f"--uid {user}" in ran
    assert last[-1][0] == "CMD" and last[-2] == ("ENTRYPOINT", '["coinfer"]')


@each_container
def test_a_containers_command_and_health_check_exist(path: Path):
    found = dict(instructions(path))
    check_command(["coinfer", *words_of(found["CMD"])])
    health = words_of(found["HEALTHCHECK"].partition("CMD ")[2])
    if path.suffix == ".edge":
        assert health == ["python", "/usr/local/lib/coinfer/healthcheck.py", found["EXPOSE"]]
    else:
        check_command(health)


def words_of(text: str) -> list[str]:
    words = tomllib.loads(f"words = {text}")["words"]
    assert all(isinstance(word, str) for word in words)
    return words


def healthy(port: int) -> bool:
    done = subprocess.run([sys.executable, DEPLOY / "healthcheck.py", str(port)], capture_output=True, timeout=60)
    assert done.stderr == b"" and done.returncode in (0, 1)
    return done.returncode == 0


def test_a_living_edge_is_healthy_and_none_is_not(tiny_bundle: Bundle):
    with EdgeProcess(tiny_bundle.folder) as edge:
        port = int(edge.url.rpartition(":")[2].strip("/"))
        assert healthy(port)
    assert not healthy(port)


@contextmanager
def web_server(status: int, context: ssl.SSLContext | None = None) -> Iterator[int]:
    """A server on loopback that answers everything with one status."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, *parts: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        def handle_error(self, request: object, client: object) -> None:
            # A peer that does not speak TLS, or has no certificate.
            pass

        def get_request(self) -> tuple[socket.socket, object]:
            link, address = super().get_request()
            return (link if context is None else context.wrap_socket(link, server_side=True)), address

    with Server(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


def test_an_edge_that_answers_something_else_is_not_healthy():
    with web_server(200) as port:
        assert healthy(port)
    with web_server(503) as port:
        assert not healthy(port)


@pytest.mark.parametrize("must_show", [False, True], ids=["TLS", "with certificates of devices"])
def test_an_edge_behind_tls_is_healthy_also_where_devices_need_certificates(tmp_path: Path, must_show: bool):
    pytest.importorskip("cryptography")
    from coinfer.runtime.certificates import make_test_ca

    make_test_ca(tmp_path, ["edge.example.org"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    if must_show:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(tmp_path / "ca.pem")
    with web_server(200, context) as port:
        assert healthy(port)


# --- what is written about them ----------------------------------------------------------------------


def test_the_page_of_deploy_names_every_file_and_commands_that_exist():
    text = (DEPLOY / "README.md").read_text()
    for path in DEPLOY.iterdir():
        assert path.name == "README.md" or f"`{path.name}`" in text, path.name
    (table, *_) = text.split("\n## ")
    assert all((DEPLOY / name).is_file() for name in re.findall(r"`([^`]+)`", table))
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "coinfer":
                check_command(words)
