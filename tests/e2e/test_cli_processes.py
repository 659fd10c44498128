"""The command line as a user meets it: processes, ports, Ctrl-C, and the example with an own model."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest

from coinfer.bundle import Bundle, load_bundle
from tiny_bundle import DEVICE, SPLIT32, SPLIT_TWO, UPLOAD, make_tiny_bundle, pictures

COINFER = (sys.executable, "-m", "coinfer.cli")
EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model"


def coinfer(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """One command in a process of its own."""
    command = [*COINFER, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=cwd)


@contextmanager
def serving(folder: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`coinfer serve` on a port of the system's choice: its address and its process."""
    command = [*COINFER, "serve", str(folder), "--port", "0", "--json", *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as edge:
        try:
            assert edge.stdout is not None
            text = ""
            while not text.rstrip().endswith("]\n}"):
                line = edge.stdout.readline()
                assert line, edge.communicate()[1]
                text += line
            yield json.loads(text)["url"], edge
        finally:
            edge.kill()


def assert_fails(done: subprocess.CompletedProcess[str], *words: str, code: int = 1) -> None:
    """One clear line, no traceback, the exit code."""
    assert (done.returncode, done.stdout) == (code, ""), done
    assert done.stderr.startswith("coinfer: error: ") and done.stderr.count("\n") == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A .npy file of eight pictures."""
    path = tmp_path_factory.mktemp("data") / "x.npy"
    np.save(path, pictures(8))
    return path


def test_help_and_device_load_nothing_of_torch(tiny_bundle: Bundle, data: Path):
    program = (
        "import sys; from coinfer.cli import main; code = main(sys.argv[1:])\n"
        "heavy = {'torch', 'onnx', 'scipy', 'sklearn', 'matplotlib', 'uvicorn', 'starlette'} & set(sys.modules)\n"
        "print(code, sorted(heavy), 'numpy' in sys.modules, file=sys.stderr)"
    )

    def loads(*arguments: object) -> str:
        command = [sys.executable, "-c", program, *(str(argument) for argument in arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stderr.splitlines()[-1]

    assert loads("--help") == "0 [] False"
    assert loads("run", "--help") == "0 [] False"
    assert loads("run", tiny_bundle.folder, "--data", data, "--plan", DEVICE) == "0 [] True"


def test_edge_and_device_in_two_processes(tiny_bundle: Bundle, data: Path):
    alone = coinfer("run", tiny_bundle.folder, "--data", data, "--plan", DEVICE)
    expected = [json.loads(line)["label"] for line in alone.stdout.splitlines()]
    assert len(expected) == 8
    with serving(tiny_bundle.folder) as (url, edge):
        for options in (["--plan", UPLOAD], ["--plan", SPLIT32], ["--plan", SPLIT_TWO, "--stream"]):
            patient = ["--notice", "60s", "--hedge", "inf"]
            done = coinfer("run", tiny_bundle.folder, "--edge", url, "--data", data, *options, *patient)
            assert done.returncode == 0, done.stderr
            lines = [json.loads(line) for line in done.stdout.splitlines()]
            assert [line["label"] for line in lines] == expected
            assert {line["answered"] for line in lines} == {"edge"}
            assert all(0 < line["payload_bytes"] < line["wire_bytes"] for line in lines)
            assert "8 requests" in done.stderr
        edge.send_signal(signal.SIGINT)
        assert edge.wait(20) == 0


def test_every_picture_is_answered_although_the_edge_is_killed(tiny_bundle: Bundle, data: Path):
    alone = coinfer("run", tiny_bundle.folder, "--data", data, "--plan", DEVICE)
    labels = [json.loads(line)["label"] for line in alone.stdout.splitlines()]
    with serving(tiny_bundle.folder) as (url, edge):
        words = ["run", tiny_bundle.folder, "--edge", url, "--data", data, "--plan", UPLOAD]
        words += ["--stream", "--period", "200ms", "--notice", "5s", "--hedge", "inf", "--log", "json"]
        device = subprocess.Popen(
            [*COINFER, *(str(word) for word in words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert device.stdout is not None
        # The first ones may come before the link, and be the device's.
        entries = []
        while not entries or entries[-1]["answered"] != "edge":
            entries.append(json.loads(device.stdout.readline()))
        edge.kill()
        rest, log = device.communicate(timeout=60)
    entries += [json.loads(line) for line in rest.splitlines()]
    assert device.returncode == 0, log
    assert entries[-1]["answered"] == "fallback"
    assert [entry["label"] for entry in entries] == labels
    events = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    assert any("link lost" in event["message"] for event in events)
    assert "by the device in the edge's place" in log


def test_a_port_in_use(tiny_bundle: Bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_fails(coinfer("serve", tiny_bundle.folder, "--port", port), str(port), "in use", "--port")


def run_against(folder: Path, data: Path, url: str) -> subprocess.CompletedProcess[str]:
    return coinfer("run", folder, "--edge", url, "--data", data, "--plan", SPLIT32, "--strict")


def test_an_edge_that_is_not_there(tiny_bundle: Bundle, data: Path):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    assert_fails(run_against(tiny_bundle.folder, data, f"ws://127.0.0.1:{port}"), f"ws://127.0.0.1:{port}")


class _Page(BaseHTTPRequestHandler):
    """Somebody's web server."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello")

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def test_an_edge_that_speaks_another_protocol(tiny_bundle: Bundle, data: Path):
    with HTTPServer(("127.0.0.1", 0), _Page) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        url = f"ws://127.0.0.1:{server.server_port}"
        try:
            assert_fails(run_against(tiny_bundle.folder, data, url), url)
        finally:
            server.shutdown()
            thread.join()


def test_an_edge_that_holds_another_bundle(tiny_bundle: Bundle, data: Path, tmp_path: Path):
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    with serving(other.folder) as (url, _):
        assert_fails(run_against(tiny_bundle.folder, data, url), "bundle", other.digest[:12])


def test_output_may_be_cut_short(tiny_bundle: Bundle, data: Path):
    run = " ".join([*COINFER, "run", str(tiny_bundle.folder), "--data", str(data), "--plan", str(DEVICE)])
    done = subprocess.run(
        ["bash", "-c", f"{run} | head -n 1; exit ${{PIPESTATUS[0]}}"], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.count("\n") == 1 and "Traceback" not in done.stderr


# The example with an own model, as its README says, with less of everything.

LESS = """
[build]
rounds = [8, 12]
report_images = 8
calibration_images = 8
precisions = ["fp32"]
cuts = ["body.1#0", "body.2#0"]
"""


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example's folder, its pictures made, its network trained for an epoch, its bundle built."""
    folder = tmp_path_factory.mktemp("example")
    for file in EXAMPLE.iterdir():
        if file.suffix in (".py", ".toml"):
            shutil.copy(file, folder)
    (folder / "job.toml").write_text((folder / "job.toml").read_text() + LESS)
    for script in (["make_images.py", "images", "25"], ["train.py", "1"]):
        subprocess.run([sys.executable, *script], cwd=folder, check=True, timeout=240)
    done = coinfer("build", "job.toml", "-o", "bundle", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def test_an_own_model_is_built_planned_and_run(example: Path):
    bundle = load_bundle(example / "bundle")
    assert bundle.manifest.classes == ("circle", "cross", "square", "triangle")
    assert {candidate.plan.kind for candidate in bundle.candidates()} == {"device", "upload", "split"}
    planned = coinfer("plan", "bundle", "--rate", "300kbit/s", "--slowdown", "300", "--json", cwd=example)
    assert planned.returncode == 0, planned.stderr
    assert len(json.loads(planned.stdout)["candidates"]) == len(bundle.candidates())
    remote = next(plan for plan in bundle.manifest.menu if plan.kind != "device")
    with serving(example / "bundle") as (url, _):
        done = coinfer(
            *("run", "bundle", "--edge", url, "--data", "folder:images/cross", "--limit", "3"),
            *("--plan", remote.number, "--json"),
            cwd=example,
        )
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert [answer["answered"] for answer in answers] == ["edge"] * 3
    evaluated = coinfer(
        "evaluate", "bundle", "--plan", remote.number, "--data", "folder:images", "--limit", "5", "--json", cwd=example
    )
    assert json.loads(evaluated.stdout)["evidence"]["num_images"] == 5


SLOW = pytest.mark.slow


@pytest.mark.parametrize("stage", [pytest.param("networks", marks=SLOW), pytest.param("codecs", marks=SLOW), "report"])
def test_ctrl_c_in_the_middle_of_a_build_leaves_nothing(example: Path, tmp_path: Path, stage: str):
    # Its exports are at hand from the first build, except where exporting itself is to be stopped.
    work = tmp_path / "work"
    if stage != "networks":
        shutil.copytree(example / "bundle.work", work)
    command = [*COINFER, "build", "job.toml", "-o", str(tmp_path / "out"), "--work", str(work)]

    def interruptible() -> None:
        # What a shell starts in the background inherits that Ctrl-C is ignored.
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    with subprocess.Popen(
        command, cwd=example, stderr=subprocess.PIPE, text=True, start_new_session=True, preexec_fn=interruptible
    ) as build:
        assert build.stderr is not None
        for line in build.stderr:
            if line.startswith(stage):
                os.killpg(build.pid, signal.SIGINT)
                break
        else:
            raise AssertionError(f"the build never came to {stage}")
        rest = build.stderr.read()
        assert build.wait(60) == 1
    assert rest.splitlines()[-1] == "coinfer: interrupted" and "Traceback" not in rest
    assert not (tmp_path / "out").exists()
    assert [path.name for path in tmp_path.iterdir()] in ([], ["work"])
    with pytest.raises(ProcessLookupError):
        os.killpg(build.pid, 0)


def test_a_build_that_fails_leaves_the_bundle_that_was_there(example: Path, tmp_path: Path):
    shutil.copytree(example / "bundle", tmp_path / "bundle")
    before = load_bundle(tmp_path / "bundle").digest
    (tmp_path / "job.toml").write_text((example / "job.toml").read_text().replace("shapes_net:make", "shapes_net:mak"))
    done = coinfer("build", tmp_path / "job.toml", "-o", tmp_path / "bundle", cwd=example)
    assert done.returncode == 1 and "mak" in done.stderr.splitlines()[-1]
    assert load_bundle(tmp_path / "bundle").digest == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    done = coinfer("build", "job.toml", "-o", tmp_path / "mine", "--work", example / "bundle.work", cwd=example)
    assert_fails(done, "mine", "not a bundle", code=1)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"
