"""The device's worker, in this process: commands in, lines out."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.lab import worker
from coinfer.lab.worker import Command, Done, Ready, Request
from coinfer.profile import Slowdown
from tiny_bundle import DEVICE, SPLIT32, pictures


class _Lines:
    """Standard input or output with a buffer of its own, as `sys.stdin` has."""

    def __init__(self, data: bytes = b"") -> None:
        self.buffer = io.BytesIO(data)


def _run(
    bundle: Bundle, folder: Path, monkeypatch: pytest.MonkeyPatch, *commands: Command | bytes
) -> tuple[int, list[bytes]]:
    np.save(folder / "pixels.npy", pictures(4))
    sent = b"".join(c + b"\n" if isinstance(c, bytes) else msgspec.json.encode(c) + b"\n" for c in commands)
    out: Any = _Lines()
    monkeypatch.setattr(sys, "stdin", _Lines(sent))
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", out)
        code = worker.main([str(bundle.folder), "--pixels", str(folder / "pixels.npy")])
    return code, out.buffer.getvalue().splitlines()


def test_commands_are_answered_in_order(tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code, lines = _run(
        tiny_bundle,
        tmp_path,
        monkeypatch,
        Command(plan=DEVICE, images=(2, 0)),
        Command(plan=DEVICE, images=(1, 1, 3), mode="stream", slowdown=Slowdown(fp32=2, int8=2)),
    )
    assert code == 0
    ready = msgspec.json.decode(lines[0], type=Ready)
    assert 0 < ready.rss_import_bytes and 0 < ready.import_s
    requests = [msgspec.json.decode(line, type=Request) for line in (*lines[1:3], *lines[4:7])]
    assert [request.image for request in requests] == [2, 0, 1, 1, 3]
    for request in requests:
        assert (request.plan, request.answered, request.error) == (DEVICE, "device", None)
        assert request.latency_s == pytest.approx(request.end_s - request.start_s)
        assert 0 < request.head_s <= request.latency_s
    assert requests[2].predicted == requests[3].predicted
    for line in (lines[3], lines[7]):
        assert msgspec.json.decode(line, type=Done).rss_bytes > 0
    assert len(lines) == 8


@pytest.mark.parametrize("mode", ["single", "stream"])
def test_a_request_that_fails_is_a_line(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: Any
) -> None:
    code, lines = _run(tiny_bundle, tmp_path, monkeypatch, Command(plan=SPLIT32, images=(0, 1), mode=mode))
    assert code == 0
    failed = [msgspec.json.decode(line, type=Request) for line in lines[1:3]]
    assert [(request.image, request.answered) for request in failed] == [(0, "failed"), (1, "failed")]
    assert all("edge" in (request.error or "") for request in failed)


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (b"hello", "not a command"),
        (Command(plan=0, images=(4,)), "0 to 3"),
        (Command(plan=99, images=()), "99"),
        (Command(plan=0, images=(1,), arrivals_s=(0.0,)), "arrivals are of a stream"),
        (Command(plan=0, images=(1,), arrivals_s=(0.0, 1.0), mode="stream"), "got 2 for 1 images"),
    ],
)
def test_bad_commands_end_the_worker_with_a_line(
    tiny_bundle: Bundle,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: Command | bytes,
    says: str,
) -> None:
    code, lines = _run(tiny_bundle, tmp_path, monkeypatch, command)
    assert (code, len(lines)) == (1, 1)
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_a_device_has_no_torch(tiny_bundle: Bundle, tmp_path: Path) -> None:
    np.save(tmp_path / "pixels.npy", pictures(1))
    command = [sys.executable, "-m", "coinfer.lab.worker", str(tiny_bundle.folder)]
    command += ["--pixels", str(tmp_path / "pixels.npy")]
    done = subprocess.run(command, input=b"", capture_output=True, check=True, timeout=120)
    assert not msgspec.json.decode(done.stdout, type=Ready).has_torch
