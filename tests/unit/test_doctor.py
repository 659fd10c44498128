"""`coinfer doctor`: what can be wrong is one line that says what to do, and nothing ends it early."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from safetensors.numpy import save_file

from coinfer.bundle import Bundle, load_bundle, write_manifest
from coinfer.cli import doctor as doctor_module
from coinfer.cli import installation, main
from coinfer.cli.doctor import bundle_findings, codecs, encryption, fallback, versions
from coinfer.cli.installation import Finding
from coinfer.engine.segments import Segments
from coinfer.runtime.spawn import EdgeProcess
from tiny_bundle import EXITS, MENU, make_tiny_bundle, pictures


def run_doctor(*arguments: str | Path) -> tuple[int, dict[str, Finding]]:
    """Exit code and findings by their checks, of a process of its own."""
    command = [sys.executable, "-m", "coinfer.cli", "doctor", "--json", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    found = json.loads(done.stdout)
    findings = {entry["check"]: Finding(**entry) for entry in found["checks"]}
    assert found["ok"] == (done.returncode == 0) == all(one.state != "wrong" for one in findings.values())
    return done.returncode, findings


@pytest.fixture
def copy(tmp_path: Path) -> Bundle:
    """A bundle to be altered."""
    return make_tiny_bundle(tmp_path / "tiny")


# --- a whole installation ----------------------------------------------------------------------------


def test_a_sound_installation_with_a_sound_bundle_and_edge_has_nothing_wrong(exit_bundle: Bundle):
    with EdgeProcess(exit_bundle.folder) as edge:
        code, found = run_doctor(exit_bundle.folder, "--edge", edge.url)
    assert code == 0
    needed = {"python", "numpy", "onnxruntime", "msgspec", "websockets", "safetensors", "pillow", "zstandard"}
    needed |= {"extra edge", "range coder", "onnx runtime", "processor", "cores", "memory", "clock", "open files"}
    needed |= {"temporary files", "bundle", "versions", "segments", "codecs", "fallback"}
    needed |= {"edge", "TLS", "edge's bundle", "round trip"}
    assert needed <= set(found)
    assert found["numpy"].text == np.__version__
    assert exit_bundle.digest[:12] in found["bundle"].text and exit_bundle.digest[:12] in found["edge's bundle"].text
    coded = sum(plan.codec is not None for plan in (*MENU, *EXITS))
    assert found["codecs"].text == f"pictures of noise come back as they should by {coded} plans"
    assert found["fallback"].text == "without an edge the device answers by plan 0, 6, 7, 13"
    assert all(bool(one.advice) == (one.state != "ok") for one in found.values())


def test_a_line_a_check_and_the_exit_code_says_whether_something_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.split()[0] in ("ok", "warning") for line in lines) and len(lines) > 15
    assert main(["doctor", str(tmp_path)]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("wrong   bundle: no bundle.json in ") and " -> copy the bundle anew" in last


def test_an_edge_without_a_bundle_is_a_wrong_command_line(capsys: pytest.CaptureFixture[str], tiny_bundle: Bundle):
    assert main(["doctor", "--edge", "ws://127.0.0.1:8300"]) == 2
    assert "--edge needs a BUNDLE too" in capsys.readouterr().err
    assert main(["doctor", str(tiny_bundle.folder), "--ca", "ca.pem"]) == 2
    assert "--token-file, --ca, --cert and --key are for an --edge" in capsys.readouterr().err


# --- packages --------------------------------------------------------------------------------------


def named(findings: Iterator[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes packages have other versions, None for missing."""
    true = metadata.version

    def pretend(**versions: str | None) -> None:
        def version(name: str) -> str:
            if name.replace("-", "_") not in versions:
                return true(name)
            told = versions[name.replace("-", "_")]
            if told is None:
                raise metadata.PackageNotFoundError(name)
            return told

        monkeypatch.setattr(metadata, "version", version)

    return pretend


def test_a_package_out_of_bounds_or_missing_is_wrong(installed: Callable[..., None]):
    installed(numpy="1.25.9", zstandard=None)
    found = named(installation.packages())
    assert found["numpy"] == Finding(
        check="numpy", state="wrong", text="is 1.25.9, coinfer needs >=1.26", advice='pip install "numpy>=1.26"'
    )
    assert (found["zstandard"].state, found["zstandard"].text) == ("wrong", "is missing")
    assert found["pillow"].state == "ok"


def test_a_package_that_is_there_but_does_not_load_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "websockets", None)
    found = named(installation.packages())["websockets"]
    assert found.state == "wrong" and "does not load" in found.text


def test_an_extra_is_complete_or_absent_or_incomplete(installed: Callable[..., None]):
    assert named(installation.packages())["extra edge"].text == "complete (to serve)"
    installed(uvicorn="0.1")
    found = named(installation.packages())["extra edge"]
    assert (found.state, found.advice) == ("warning", 'pip install "coinfer[edge]" to serve')
    assert found.text == "incomplete: uvicorn is 0.1, coinfer needs >=0.35"
    edge = [line.partition(";")[0] for line in metadata.requires("coinfer") or [] if 'extra == "edge"' in line]
    installed(**{installation._parts(line)[0].replace("-", "_"): None for line in edge})
    found = named(installation.packages())["extra edge"]
    assert found.state == "ok" and found.text.startswith("not installed; it is needed to serve alone")


def test_without_constriction_the_numpy_coder_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, installed: Callable[..., None]
):
    assert installation.coder() == Finding(check="range coder", state="ok", text="by constriction")
    monkeypatch.setitem(sys.modules, "constriction", None)
    assert installation.coder().state == "warning" and "by numpy" in installation.coder().text
    installed(constriction=None)
    assert named(installation.packages())["constriction"].state == "warning"


def test_another_python_than_is_needed_is_wrong(monkeypatch: pytest.MonkeyPatch):
    assert installation.python().state == "ok"
    monkeypatch.setattr(sys, "version_info", (3, 10, 2))
    found = installation.python()
    assert (found.state, found.text) == ("wrong", "3.10.2, coinfer needs >=3.11")


@pytest.mark.parametrize("module", ["numpy", "onnxruntime", "websockets", "PIL", "zstandard", "packaging"])
def test_whatever_is_missing_the_doctor_speaks_to_the_end(tiny_bundle: Bundle, module: str):
    program = f"import sys; sys.modules[{module!r}] = None; from coinfer.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "doctor", str(tiny_bundle.folder), "--edge", "ws://127.0.0.1:1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    # Compiled modules write a line of their own there.
    assert done.returncode == 1 and "Traceback" not in done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith("wrong") and module.lower() in line.lower() for line in lines)
    # To the end: the last checks of the machine were made all the same.
    assert any(line.startswith("ok      temporary files") for line in lines)


# --- the machine -----------------------------------------------------------------------------------


def test_the_engines_model_doubles_what_it_is_given():
    model = onnx.load_from_string(installation._DOUBLE)
    onnx.checker.check_model(model)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"])], "double", values[:1], values[1:])
    assert model.graph == graph
    assert installation.engine().state == "ok"


def test_an_engine_that_does_not_compute_is_wrong(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(installation, "_DOUBLE", b"no model")
    assert installation.engine().state == "wrong" and "does not compute" in installation.engine().text
    other = onnx.load_from_string(onnx.ModelProto().SerializeToString())
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Mul", ["x", "x"], ["y"])], "square", values[:1], values[1:])
    other = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    monkeypatch.setattr(installation, "_DOUBLE", other.SerializeToString())
    assert installation.engine().text == "1, 2, 3 doubled is [[1. 4. 9.]]"


CPUS = {
    "x86 with VNNI": ("processor : 0\nflags\t\t: fpu avx2 avx512_vnni\n", "ok", "AVX-512 VNNI"),
    "x86 without": ("flags\t\t: fpu sse2 avx2\n", "warning", "int8 may gain little"),
    "ARM v8.2": ("Features\t: fp asimd asimddp\n", "ok", "dot product"),
    "Cortex-A72": ("Features\t: fp asimd evtstrm crc32 cpuid\n", "warning", "int8 may gain little"),
}


@pytest.mark.parametrize(("text", "state", "says"), CPUS.values(), ids=CPUS)
def test_what_a_processor_means_for_int8(tmp_path: Path, text: str, state: str, says: str):
    path = tmp_path / "cpuinfo"
    path.write_text(text)
    found = installation.processor(path)
    assert found.state == state and says in found.text


def test_cores_are_those_allowed_and_a_containers_share(tmp_path: Path):
    path = tmp_path / "cpu.max"
    allowed = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}"
    assert installation.cores(path).text == allowed
    for text, state in (("max 100000\n", "ok"), ("150000 100000", "ok"), ("50000 100000", "warning"), ("junk", "ok")):
        path.write_text(text)
        assert installation.cores(path).state == state
    path.write_text("50000 100000")
    assert f"{allowed}, but 0.5 of one by the container's limit" in installation.cores(path).text


@pytest.mark.parametrize(("left", "state"), [(50_000, "wrong"), (100_000, "warning"), (4_000_000, "ok")])
def test_memory_that_is_left_is_the_systems_or_the_containers(tmp_path: Path, left: int, state: str):
    meminfo, limit, used = (tmp_path / name for name in ("meminfo", "max", "current"))
    meminfo.write_text(f"MemTotal: 9000000 kB\nMemAvailable:   {left} kB\n")
    assert installation.memory(meminfo, limit, used).state == state
    meminfo.write_text("MemAvailable:   9000000 kB\n")
    limit.write_text(str(1024 * left + 7))
    used.write_text("7")
    assert installation.memory(meminfo, limit, used).state == state
    limit.write_text("max\n")
    assert installation.memory(meminfo, limit, used).state == "ok"


def test_a_clock_that_goes_back_is_wrong(monkeypatch: pytest.MonkeyPatch):
    assert installation.clock().state == "ok"
    told = iter([1.0, 2.0, 1.5] + [3.0] * 10_000)
    monkeypatch.setattr(time, "perf_counter", lambda: next(told))
    assert installation.clock().state == "wrong"


LIMITS = [(10, "wrong"), (256, "warning"), (1024, "ok"), (resource.RLIM_INFINITY, "ok")]


@pytest.mark.parametrize(("soft", "state"), LIMITS)
def test_few_open_files_are_said(monkeypatch: pytest.MonkeyPatch, soft: int, state: str):
    monkeypatch.setattr(resource, "getrlimit", lambda what: (soft, soft))
    assert installation.files().state == state


def test_temporary_files_that_cannot_be_written_are_wrong(monkeypatch: pytest.MonkeyPatch):
    def refuse(**options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(installation.tempfile, "TemporaryFile", refuse)
    found = installation.scratch()
    assert (found.state, found.text) == ("wrong", "cannot be written: no space left on device")


# --- a bundle --------------------------------------------------------------------------------------


def rewritten(bundle: Bundle, **fields: Any) -> Bundle:
    """The same folder with other fields in its manifest, and all that lies in it listed."""
    write_manifest(bundle.folder, msgspec.structs.replace(bundle.manifest, **fields))
    return load_bundle(bundle.folder)


def test_an_altered_bundle_is_wrong_and_named(copy: Bundle):
    path = copy.path("segments/whole.onnx")
    path.write_bytes(path.read_bytes() + b"\0")
    code, found = run_doctor(copy.folder)
    assert code == 1 and found["bundle"].state == "wrong"
    assert "segments/whole.onnx" in found["bundle"].text and "segments" not in found


def test_a_segment_that_does_not_load_is_named_with_its_plan(copy: Bundle):
    (copy.folder / "segments/whole.onnx").write_bytes(b"no model")
    bundle = rewritten(copy)
    found = named(bundle_findings(bundle))
    assert found["segments"].state == "wrong"
    assert found["segments"].text.startswith("plan 0: ") and "whole.onnx" in found["segments"].text


def test_the_bundles_own_pictures_go_through_its_codecs(copy: Bundle, monkeypatch: pytest.MonkeyPatch):
    save_file({"pixels": pictures(4)}, copy.folder / "samples.safetensors")
    bundle = rewritten(copy)
    segments = Segments(bundle.path, bundle.manifest.outputs)
    assert codecs(bundle, segments).text == "the bundle's pictures come back as they should by 5 plans"
    other = segments.codec(bundle.plan(2))
    true = other.decode
    monkeypatch.setattr(other, "decode", lambda payload: tuple(array + 1 for array in true(payload)))
    found = codecs(bundle, segments)
    assert found.state == "wrong" and found.text.startswith("plan 2: what is decoded is not what was encoded")


def test_a_bundle_without_a_plan_for_the_device_alone_is_wrong(copy: Bundle):
    assert fallback(copy).state == "ok"
    bundle = rewritten(copy, menu=tuple(plan for plan in MENU if plan.kind != "device"))
    assert fallback(bundle).state == "wrong"


def test_other_versions_than_the_builders_are_a_warning(copy: Bundle):
    found = versions(copy)
    assert found.state == "warning" and found.text.startswith("built with coinfer test, here ")
    assert versions(rewritten(copy, coinfer=doctor_module.__version__)).state == "ok"


# --- an edge ---------------------------------------------------------------------------------------


def test_an_edge_with_another_bundle_is_wrong_and_so_is_none(tiny_bundle: Bundle, tmp_path: Path):
    other = make_tiny_bundle(tmp_path / "other", seed=1)
    with EdgeProcess(other.folder) as edge:
        code, found = run_doctor(tiny_bundle.folder, "--edge", edge.url)
        url = edge.url
    assert code == 1 and found["edge"].state == "wrong"
    assert other.digest[:12] in found["edge"].text and "the same bundle" in found["edge"].advice
    code, found = run_doctor(tiny_bundle.folder, "--edge", url)
    assert code == 1 and "connection refused" in found["edge"].text
    assert found["edge"].advice == "is the edge running, and no firewall in between?"


def test_an_edge_with_tls_and_tokens_is_verified_and_a_stranger_to_it_is_told(tiny_bundle: Bundle, tmp_path: Path):
    pytest.importorskip("cryptography")
    from coinfer.runtime.certificates import make_test_ca
    from coinfer.runtime.tokens import add_token

    for name in ("mine", "other"):
        (tmp_path / name).mkdir()
        make_test_ca(tmp_path / name, ["127.0.0.1"])
    tokens, token = tmp_path / "tokens.json", tmp_path / "token"
    token.write_text(add_token(tokens, "camera") + "\n")
    mine, other = tmp_path / "mine", tmp_path / "other"
    options = ["--cert", mine / "server.pem", "--key", mine / "server.key", "--tokens", tokens]
    with EdgeProcess(tiny_bundle.folder, options=list(map(str, options))) as edge:
        to_edge = [tiny_bundle.folder, "--edge", edge.url]
        code, found = run_doctor(*to_edge, "--ca", mine / "ca.pem", "--token-file", token)
        assert code == 0 and found["TLS"].text == "the edge's certificate and name were verified"
        code, found = run_doctor(*to_edge, "--ca", mine / "ca.pem")
        assert code == 1 and found["edge"].state == "wrong" and "token" in found["edge"].text
        code, found = run_doctor(*to_edge, "--ca", other / "ca.pem", "--token-file", token)
        assert code == 1 and found["edge"].state == "wrong" and "certificate" in found["edge"].text


URLS = {
    "ws://127.0.0.1:8300": ("ok", "none is needed"),
    "ws://[::1]:8300": ("ok", "none is needed"),
    "ws://[::ffff:127.0.0.1]:8300": ("ok", "none is needed"),
    "ws://[::ffff:192.0.2.7]:8300": ("warning", "reads and alters"),
    "ws://localhost:8300": ("ok", "none is needed"),
    "ws://192.0.2.7:8300": ("warning", "reads and alters"),
    "ws://edge.local:8300": ("warning", "reads and alters"),
    "wss://edge.local:8300": ("ok", "verified"),
}


@pytest.mark.parametrize("url", URLS)
def test_what_can_be_read_on_the_way_is_said(url: str):
    state, says = URLS[url]
    assert encryption(url).state == state and says in encryption(url).text
