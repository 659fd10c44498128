"""The kernel's shaper: refusals everywhere, the link itself where it works."""

import subprocess
import sys
from pathlib import Path

import pytest

from coinfer.errors import LinkError
from coinfer.lab import namespace
from coinfer.lab.namespace import NamespaceLink, why_not
from coinfer.profile import Link, Trace


def _spaces() -> list[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=False)
    return [line.split()[0] for line in done.stdout.splitlines()]


def test_who_is_not_root_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    with pytest.raises(LinkError, match="needs root"), NamespaceLink(Link(rate_bps=1e6)):
        pass


def test_missing_tools_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(LinkError, match='"ip"'), NamespaceLink(Link(rate_bps=1e6)):
        pass


def test_a_refused_command_is_quoted() -> None:
    with pytest.raises(LinkError, match=r"`.*exit\(3\).*` was refused: no way"):
        namespace._command(sys.executable, "-c", "import sys; sys.stderr.write('no way\\n'); sys.exit(3)")
    with pytest.raises(LinkError, match="nothing-here"):
        namespace._command("nothing-here")


def test_traces_are_refused() -> None:
    trace = Trace(name="t", start_s=(0.0,), rate_bps=(1.0,), duration_s=1.0)
    with pytest.raises(LinkError, match="trace"):
        NamespaceLink(Link(rate_bps=1e6)).set(Link(rate_bps=1e6, trace=trace))


SERVER = """
import socket
s = socket.create_server(("10.213.0.2", 5000)); print("up", flush=True)
c, _ = s.accept(); c.sendall(c.recv(5)[::-1])
"""
CLIENT = """
import socket
c = socket.create_connection(("10.213.0.2", 5000), 10); c.sendall(b"hello"); print(c.recv(5).decode())
"""


def test_two_processes_talk_over_the_shaped_link_and_all_is_removed(tmp_path: Path) -> None:
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    before = _spaces()
    try:
        with NamespaceLink(Link(rate_bps=1e6, down_rate_bps=2e6)) as link:
            server = link.launch("edge", [sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
            assert server.stdout is not None and server.stdout.readline() == b"up\n"
            client = link.launch("device", [sys.executable, "-c", CLIENT], stdout=subprocess.PIPE)
            assert client.communicate()[0] == b"olleh\n"
            server.stdout.close()
            queue = subprocess.run(
                ["tc", "-n", link._spaces["device"], "qdisc"], capture_output=True, text=True, check=True
            )
            assert "tbf" in queue.stdout and "1Mbit" in queue.stdout
            left = link.launch("edge", [sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    except LinkError as error:
        pytest.skip(f"the kernel refuses: {error}")
    assert left.poll() is not None
    assert left.stdin is not None
    left.stdin.close()
    assert _spaces() == before
