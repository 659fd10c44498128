"""The command line in this process: what each command prints, and one clear line for each kind of bad input."""

from __future__ import annotations

import json
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
from PIL import Image

from coinfer.bundle import Bundle, load_bundle, write_manifest
from coinfer.cli import main
from coinfer.cli.app import COMMANDS
from coinfer.cli.pictures import test_images as images_of
from coinfer.data import load_source
from coinfer.errors import DataError, UsageError
from coinfer.plan import Candidate, Evidence
from coinfer.profile import RADIOS, Machine, Profile, Timing
from tiny_bundle import DEVICE, MENU, SPLIT16, SPLIT32, UPLOAD, UPLOAD_TOP, make_tiny_bundle, pictures

LOSSES = {SPLIT16: 0.5, UPLOAD: 3.0, UPLOAD_TOP: 3.0}
MACHINE = Machine(name="m", processor="p", cores=1, system="s", python="3", versions={})


def profile_of(seconds: float, segments: tuple[str, ...] | None = None) -> Profile:
    """A profile in which everything takes so long; the menu's segments unless told otherwise."""
    timing = Timing(median_s=seconds, p5_s=seconds, p95_s=seconds, repeats=3)
    names = {name for plan in MENU for name in (plan.head, plan.tail) if name} if segments is None else set(segments)
    return Profile(
        machine=MACHINE,
        threads=1,
        date="2000-01-01",
        segments={name: timing for name in names},
        codecs={str(plan.number): (timing, timing) for plan in MENU if plan.codec is not None},
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle with made-up evidence: the device takes 10 ms, a split 1 ms and 1,000 B."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    made = make_tiny_bundle(folder)
    sizes = {"device": 0.0, "upload": 200.0, "split": 1000.0}
    known = [
        Candidate(
            plan=plan,
            evidence=Evidence(
                split="validation",
                num_images=10,
                accuracy=0.5,
                accuracy_ci=0.1,
                loss_points=LOSSES.get(plan.number, 0.0),
                loss_ci_points=0.1,
                payload_bytes=sizes[plan.kind],
                payload_bytes_p95=sizes[plan.kind],
                reply_bytes=0.0 if plan.kind == "device" else 20.0,
                head_s={"device": 0.010, "upload": 0.0, "split": 0.001}[plan.kind],
                encode_s=0.0,
                decode_s=0.0,
                tail_s=0.0,
            ),
        )
        for plan in MENU
    ]
    (folder / "evidence.json").write_bytes(msgspec.json.encode(known))
    (folder / "profile.json").write_bytes(msgspec.json.encode(profile_of(0.001)))
    write_manifest(folder, made.manifest)
    return load_bundle(folder)


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Done]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs one command line in this process."""

    def call(*arguments: object) -> Done:
        code = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


def assert_fails(done: Done, *words: str, code: int = 1) -> None:
    """One line on stderr that begins as errors do and holds the words; nothing on stdout."""
    assert (done.code, done.out) == (code, "")
    assert done.err.startswith("coinfer: error: ") and done.err.count("\n") == 1
    for word in words:
        assert word in done.err, done.err


# The commands as such.


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_explains_itself_and_prints_json(run: Run, name: str):
    done = run(name, "-h")
    assert done.code == 0 and f"coinfer {name}" in done.out and "--json" in done.out
    assert done.out == run(name, "--help").out


def test_without_a_command_the_help_is_shown(run: Run):
    done = run()
    assert done.code == 0 and all(name in done.out for name in COMMANDS) and done.out == run("-h").out


def test_version(run: Run):
    assert run("--version").out == "coinfer 0.1.0\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["frobnicate"], ["frobnicate"]),
        (["plan"], ["BUNDLE"]),
        (["plan", "x", "--frob"], ["--frob"]),
        (["plan", "x", "--top-n", "0"], ["--top-n"]),
        (["profile", "x", "--repeats", "many"], ["--repeats", "integer"]),
        (["serve", "x", "--port", "65536"], ["--port", "65535"]),
    ],
)
def test_a_wrong_command_line_is_one_line_and_code_2(run: Run, arguments: list[str], words: list[str]):
    assert_fails(run(*arguments), *words, code=2)


def test_debug_adds_the_traceback(run: Run, tmp_path: Path):
    assert "Traceback" not in run("plan", tmp_path).err
    done = run("--debug", "plan", tmp_path)
    assert "Traceback" in done.err and "BundleError" in done.err and done.code == 1


def test_an_interrupt_is_one_word_and_code_1(run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def stop(folder: Path) -> Bundle:
        raise KeyboardInterrupt

    monkeypatch.setattr("coinfer.cli.plan.load_bundle", stop)
    assert run("plan", tmp_path) == Done(1, "", "coinfer: interrupted\n")


def test_a_polite_kill_is_an_interrupt_and_the_handler_is_given_back(
    run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    def kill(folder: Path) -> Bundle:
        signal.raise_signal(signal.SIGTERM)
        raise AssertionError("still here")

    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr("coinfer.cli.plan.load_bundle", kill)
    assert run("plan", tmp_path) == Done(1, "", "coinfer: interrupted\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_a_light_installation_lacks_is_named(run: Run, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert_fails(run("inspect", "resnet20"), "torch", 'pip install "coinfer[build]"')


# inspect

FACTORIES = """
import torch
from torch import nn

def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))

class Fickle(nn.Module):
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

def fickle():
    return Fickle()

def nothing():
    return 3
"""


@pytest.fixture
def factories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module of the user's own in the current folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_nets", raising=False)
    (tmp_path / "my_nets.py").write_text(FACTORIES)
    return "my_nets"


def test_inspect_prints_the_cuts_of_an_own_model(run: Run, factories: str):
    done = run("inspect", f"{factories}:small", "--input", "3x8x8", "--json")
    assert done.code == 0 and set(done.json) == {"model", "input", "cuts"}
    assert done.json["model"] == "my_nets:small" and done.json["input"]["shape"] == [3, 8, 8]
    assert [set(cut) for cut in done.json["cuts"]] == [{"name", "specs", "num_bytes", "compute_share"}] * 3
    first = done.json["cuts"][0]
    assert (first["specs"][0]["shape"], first["num_bytes"]) == ([4, 6, 6], 4 * 6 * 6 * 4)
    shares = [cut["compute_share"] for cut in done.json["cuts"]]
    assert shares == sorted(shares) and 0 < shares[0] < 1
    table = run("inspect", f"{factories}:small", "--input", "3x8x8").out
    assert all(cut["name"] in table for cut in done.json["cuts"]) and "4x6x6 float32" in table


def test_inspect_refuses_what_is_no_model(run: Run, factories: str):
    assert_fails(run("inspect", "resnet21"), "resnet21", "resnet20")
    assert_fails(run("inspect", f"{factories}:nothing", "--input", "3x8x8"), "nothing", "int")
    assert_fails(run("inspect", f"{factories}:absent", "--input", "3x8x8"), "absent")
    assert_fails(run("inspect", "no_such_module:make"), "no_such_module")
    assert_fails(run("inspect", f"{factories}:small"), "--input", code=2)
    assert_fails(run("inspect", f"{factories}:small", "--input", "3xx8"), "3xx8", code=2)
    assert_fails(run("inspect", "resnet20", "--weights", "absent.safetensors"), "absent.safetensors", "resnet20")


def test_inspect_says_why_a_model_cannot_be_captured(run: Run, factories: str):
    assert_fails(run("inspect", f"{factories}:fickle", "--input", "3x8x8"), "cannot capture Fickle", "x.sum() > 0")


# build, as far as it can be refused at once

JOB = '[model]\nsource = "resnet20"\n[data]\nsource = "digits"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[model]\nsource = "resnet21"\n[data]\nsource = "scene-digits"\n', ["resnet21", "resnet20"]),
        ('[model]\nsource = "scene-resnet"\n[data]\nsource = "scene-digit"\n', ["scene-digit"]),
        (JOB + '[codec]\nname = "zip"\n', ["codec", "job.toml"]),
        (JOB + '[link]\nrate = "fast"\n[goal]\nminimise = "cost"\n', ["cost", "job.toml"]),
        (JOB + "[goal]\nmax_loss = -1\n", ["max_loss", "-1"]),
        ("[model\n", ["job.toml", "TOML"]),
        ('[model]\nsource = "resnet20"\nweights = "absent.safetensors"\n[data]\nsource = "digits"\n', ["absent"]),
    ],
    ids=["model", "data", "codec", "goal", "loss", "toml", "weights"],
)
def test_build_refuses_a_job_and_leaves_nothing(run: Run, tmp_path: Path, text: str, words: list[str]):
    (tmp_path / "job.toml").write_text(text)
    done = run("build", tmp_path / "job.toml", "-o", tmp_path / "out", "--work", tmp_path / "work")
    last = Done(done.code, done.out, done.err.splitlines(keepends=True)[-1])
    assert_fails(last, *words)
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out*"))


def test_build_needs_a_job_and_a_place(run: Run, tmp_path: Path):
    assert_fails(run("build", tmp_path / "absent.toml", "-o", tmp_path / "out"), "absent.toml")
    assert_fails(run("build", tmp_path / "absent.toml"), "--out", code=2)


# Bundles that are not what they should be: the same for every command that loads one.


def test_no_bundle_an_altered_one_and_one_of_another_version(run: Run, tmp_path: Path):
    assert_fails(run("profile", tmp_path / "absent"), "absent", "coinfer build")
    made = make_tiny_bundle(tmp_path / "tiny")
    segment = made.folder / "segments" / "whole.onnx"
    whole = segment.read_bytes()
    segment.write_bytes(whole[:-1] + b"x")
    assert_fails(run("serve", made.folder), "segments/whole.onnx", "sha256")
    segment.unlink()
    assert_fails(run("run", made.folder, "--data", "x.npy"), "segments/whole.onnx", "missing")
    segment.write_bytes(whole)
    manifest = made.folder / "bundle.json"
    manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 99', 1))
    assert_fails(run("plan", made.folder), "99", "must be 1")


# plan


def test_plan_prints_every_candidate_best_first(run: Run, bundle: Bundle):
    done = run("plan", bundle.folder, "--rate", "10Mbit/s", "--rtt", "2ms", "--json")
    assert done.code == 0 and {"goal", "chosen", "candidates"} <= set(done.json)
    rows = done.json["candidates"]
    assert len(rows) == len(MENU) and done.json["chosen"] == rows[0]
    assert {"kind", "cut", "codec", "bytes", "loss", "latency_s", "throughput_hz", "energy_j"} <= set(rows[0])
    assert (rows[0]["kind"], rows[0]["cut"], rows[0]["codec"]) == ("split", "early#0", "float32-none")
    allowed = [row for row in rows if row["rejected"] is None]
    assert [row["latency_s"] for row in allowed] == sorted(row["latency_s"] for row in allowed)
    assert [row["plan"] for row in rows if row["rejected"] is not None] == [UPLOAD, UPLOAD_TOP]
    assert "split" in done.json["reason"] and done.json["constraints"][0]["name"] == "max_loss_points"


def test_plan_follows_the_link_and_the_device(run: Run, bundle: Bundle):
    def kind(*options: str) -> str:
        done = run("plan", bundle.folder, "--json", *options)
        assert done.code == 0, done.err
        return str(done.json["chosen"]["kind"])

    assert kind("--rate", "10kbit/s") == "device"
    assert kind("--rate", "10kbit/s", "--slowdown", "1000") == "split"
    assert kind("--rate", "10Mbit/s", "--rtt", "1ms") == "split"
    assert kind("--rate", "10Mbit/s", "--goal", "bytes") == "device"
    assert kind("--rate", "10Mbit/s", "--rtt", "1ms", "--max-loss", "5") == "upload"


def test_plan_prints_a_table_the_reason_and_what_a_constraint_cost(run: Run, bundle: Bundle):
    text = run("plan", bundle.folder, "--rate", "10Mbit/s", "--rtt", "1ms").out
    assert "Why: " in text and "chosen" in text and "early#0" in text
    assert "The constraint max_loss_points = 1 cost " in text and " -> " in text
    assert "cost nothing" in run("plan", bundle.folder, "--rate", "10kbit/s").out


def test_plan_without_a_feasible_candidate_names_the_nearest_miss(
    run: Run, bundle: Bundle, tmp_path: Path
):
    known = [c for c in bundle.candidates() if c.evidence.loss_points]
    made = make_tiny_bundle(tmp_path / "lossy")
    (made.folder / "evidence.json").write_bytes(msgspec.json.encode(known))
    (made.folder / "profile.json").write_bytes(msgspec.json.encode(profile_of(0.001)))
    write_manifest(made.folder, made.manifest)
    assert_fails(run("plan", made.folder, "--max-loss", "0.1", "--rate", "1Mbit/s"), "0.1", "0.5")


def test_plan_says_what_a_stricter_limit_may_miss(run: Run, bundle: Bundle):
    limit = bundle.manifest.max_loss_points
    stricter = run("plan", bundle.folder, "--max-loss", limit / 2)
    assert stricter.code == 0 and f"at losses up to {limit:g} points" in stricter.err
    assert run("plan", bundle.folder, "--max-loss", limit).err == ""


def test_plan_takes_the_times_of_other_machines(run: Run, bundle: Bundle, tmp_path: Path):
    slow, partial = tmp_path / "slow.json", tmp_path / "partial.json"
    slow.write_bytes(msgspec.json.encode(profile_of(2.0)))
    partial.write_bytes(msgspec.json.encode(profile_of(0.002, ("segments/whole.onnx",))))
    done = run("plan", bundle.folder, "--device-profile", slow, "--json", "--max-loss", "5")
    by_plan = {row["plan"]: row for row in done.json["candidates"]}
    assert by_plan[DEVICE]["latency_s"] == 2.0 and by_plan[SPLIT32]["latency_s"] > 4.0
    done = run("plan", bundle.folder, "--device-profile", partial, "--edge-profile", slow, "--json")
    by_plan = {row["plan"]: row for row in done.json["candidates"]}
    assert by_plan[DEVICE]["latency_s"] == 0.002 and "profile" in by_plan[SPLIT32]["rejected"]


def test_a_profile_of_another_bundle_is_refused(run: Run, bundle: Bundle, tmp_path: Path):
    file = tmp_path / "other.json"
    other = msgspec.structs.replace(profile_of(0.001), bundle="ab" * 32)
    file.write_bytes(msgspec.json.encode(other))
    for option in ("--device-profile", "--edge-profile"):
        assert_fails(run("plan", bundle.folder, option, file), "is of bundle abababababab", bundle.digest[:12])
    assert_fails(run("profile", bundle.folder, "-o", tmp_path), "--out", str(tmp_path), code=2)
    assert_fails(run("profile", bundle.folder, "-o", tmp_path / "none" / "x.json"), "none", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.json"]


def test_plan_pins_layers_and_draws_what_is_unbeaten(run: Run, bundle: Bundle, tmp_path: Path):
    done = run("plan", bundle.folder, "--rate", "10Mbit/s", "--pin", "early=edge", "--max-loss", "5", "--json")
    kept = {row["kind"] for row in done.json["candidates"] if row["rejected"] is None}
    assert done.code == 0 and kept == {"upload"}
    assert {row["rejected"] for row in done.json["candidates"]} == {None, "not early=edge"}
    assert_fails(run("plan", bundle.folder, "--pin", "nothing.*=edge"), "nothing.*=edge", "early#0")
    assert_fails(run("plan", bundle.folder, "--pin", "early"), "PATTERN=device")
    plot = tmp_path / "front.png"
    done = run("plan", bundle.folder, "--rate", "10Mbit/s", "--pareto", "--plot", plot)
    assert done.code == 0 and plot.read_bytes().startswith(b"\x89PNG")
    assert "highest accuracy at" in run("plan", bundle.folder, "--goal", "accuracy").out


def test_plan_is_told_how_requests_come(run: Run, bundle: Bundle):
    words = ["plan", bundle.folder, "--rate", "1Mbit/s", "--json"]
    lone, even, chance, crowd = (
        run(*words, *options).json["chosen"]["latency_s"]
        for options in (
            [], ["--arrival-rate", "5"], ["--arrival-rate", "5", "--poisson"],
            ["--arrival-rate", "5", "--poisson", "--devices", "20"],
        )
    )  # fmt: skip
    assert lone == even < chance <= crowd
    assert_fails(run(*words, "--arrival-rate", "1e9"), "min_throughput_hz", "relax")
    # A rate that is named can be held, whatever else is asked.
    for asked in (["--deadline", "10ms"], ["--deadline", "12ms", "--poisson"], ["--max-loss", "5", "--poisson"]):
        refused = run(*words, "--arrival-rate", "1e9", *asked)
        assert_fails(refused, "relax min_throughput_hz from 1e+09 to")
        named = refused.err.split("from 1e+09 to ")[1].split(",")[0].split()[0]
        assert run(*words, "--arrival-rate", named, *asked).code == 0
        assert run(*words, "--arrival-rate", 1.02 * float(named), *asked).code == 1
    assert_fails(run(*words, "--deadline", "1us"), "latency", "relax max_latency_s from 1e-06 to")


def test_plan_prices_energy_where_powers_are_given(run: Run, bundle: Bundle):
    done = run("plan", bundle.folder, "--goal", "energy", "--device-power", "2", "--radio", "wifi", "--json")
    by_plan = {row["plan"]: row for row in done.json["candidates"]}
    assert by_plan[DEVICE]["energy_j"] == pytest.approx(0.02)
    assert_fails(run("plan", bundle.folder, "--goal", "energy"), "power")
    power = ("--device-power", "2", "--radio", "wifi")
    tail = run("plan", bundle.folder, *power, "--radio-tail", "0.5", "--json").json["candidates"]
    for row in tail:
        before = by_plan[row["plan"]]["energy_j"]
        assert row["energy_j"] == pytest.approx(before if row["kind"] == "device" else before + 0.5)
    limited = run("plan", bundle.folder, *power, "--radio-tail", "0.5", "--max-energy", "100", "--json").json
    assert limited["chosen"]["plan"] == DEVICE
    assert all("energy" in row["rejected"] for row in limited["candidates"] if row["kind"] != "device")
    assert_fails(run("plan", bundle.folder, "--max-energy", "1"), "--device-power", code=2)
    assert_fails(run("plan", bundle.folder, "--radio-tail", "1"), "--radio", code=2)
    assert_fails(run("plan", bundle.folder, "--device-power", "-2"), "--device-power", "-2", code=2)


def test_a_bundle_built_for_energy_brings_its_powers(run: Run, bundle: Bundle, tmp_path: Path):
    folder = tmp_path / "energy"
    shutil.copytree(bundle.folder, folder)
    radio = msgspec.structs.replace(RADIOS["wifi"], tail_j=0.5)
    powers = {"goal": "energy", "device_power_w": 2.0, "radio": radio, "max_energy_j": 0.1}
    write_manifest(folder, msgspec.structs.replace(bundle.manifest, **powers))
    planned = run("plan", folder, "--json").json
    assert planned["goal"]["minimise"] == "energy" and planned["chosen"]["plan"] == DEVICE
    assert all("energy" in row["rejected"] for row in planned["candidates"] if row["kind"] != "device")
    other = run("plan", folder, "--max-energy", "1000", "--device-power", "9", "--radio", "wifi", "--json").json
    assert other["chosen"]["kind"] == "split"
    np.save(tmp_path / "x.npy", pictures(1)[0])
    done = run("run", folder, "--data", tmp_path / "x.npy", "--json")
    assert done.code == 0 and done.json["summary"]["plan"] == DEVICE, done.err


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--rate", "3"], ['"3"', "kbit/s"], 2),
        (["--rtt", "soon"], ["soon"], 2),
        (["--goal", "speed"], ["speed", "latency"], 2),
        (["--max-loss", "-1"], ["-1"], 2),
        (["--slowdown", "0"], ["--slowdown", "0"], 2),
        (["--int8-slowdown", "3"], ["--slowdown"], 2),
        (["--edge-load", "0"], ["--edge-load"], 2),
        (["--radio", "5g"], ["5g", "wifi"], 2),
        (["--device-profile", "absent.json"], ["absent.json"], 1),
        (["--device-profile", __file__], ["test_cli.py", "coinfer profile"], 1),
    ],
)
def test_plan_refuses_conditions(run: Run, bundle: Bundle, options: list[str], words: list[str], code: int):
    assert_fails(run("plan", bundle.folder, *options), *words, code=code)


# profile


def test_profile_times_everything_and_plan_reads_it(run: Run, bundle: Bundle, tmp_path: Path):
    from safetensors.numpy import save_file

    made = make_tiny_bundle(tmp_path / "tiny")
    save_file({"pixels": pictures(4)}, made.folder / "samples.safetensors")
    for name in ("evidence.json", "profile.json"):
        (made.folder / name).write_bytes((bundle.folder / name).read_bytes())
    write_manifest(made.folder, made.manifest)
    done = run("profile", made.folder, "--repeats", 3, "-o", tmp_path / "board.json", "--json")
    assert done.code == 0, done.err
    assert set(done.json["segments"]) == {name for plan in MENU for name in (plan.head, plan.tail) if name}
    assert json.loads((tmp_path / "board.json").read_text()) == done.json
    assert run("plan", made.folder, "--device-profile", tmp_path / "board.json").code == 0
    assert "segments/whole.onnx" in run("profile", made.folder, "--repeats", 2).out
    # An error of the system itself is one line as well.
    target = tmp_path / "nowhere" / "profile.json"
    assert_fails(run("profile", made.folder, "--repeats", 1, "-o", target), "nowhere", code=2)


# run, with plans of the device alone; the edge is in tests/e2e/test_cli.py


def test_run_answers_line_by_line_with_a_summary(run: Run, bundle: Bundle, tmp_path: Path):
    np.save(tmp_path / "x.npy", pictures(5))
    done = run("run", bundle.folder, "--data", tmp_path / "x.npy", "--plan", DEVICE, "--limit", 4)
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["request"] for line in lines] == [0, 1, 2, 3]
    assert {(line["plan"], line["answered"], line["payload_bytes"]) for line in lines} == {(DEVICE, "device", 0)}
    assert all(line["class"] == "abcde"[line["label"]] for line in lines)
    assert "4 requests by plan 0" in done.err and "not slowed" in done.err
    whole = run("run", bundle.folder, "--data", tmp_path / "x.npy", "--plan", DEVICE, "--json", "--stream").json
    assert [a["label"] for a in whole["answers"]][:4] == [line["label"] for line in lines]
    assert whole["summary"]["requests"] == 5 and whole["summary"]["accuracy"] is None


def test_run_counts_what_its_policy_drops_and_what_is_late(run: Run, bundle: Bundle, tmp_path: Path):
    np.save(tmp_path / "x.npy", pictures(40))
    words = ["run", bundle.folder, "--data", tmp_path / "x.npy", "--plan", DEVICE, "--json", "--stream"]
    # Pictures of a file are all there at once: one waits, the others make way for the newest.
    dropping = run(*words, "--policy", "drop-oldest", "--slowdown", "50", "--unordered").json
    answered = [answer["answered"] for answer in dropping["answers"]]
    assert len(answered) == 40 and set(answered) == {"device", "dropped"}
    assert dropping["summary"]["unanswered"] == {"dropped": answered.count("dropped")}
    assert dropping["summary"]["requests"] == answered.count("device") >= 1
    late = run(*words, "--deadline", "1us").json
    assert late["summary"]["unanswered"] == {"late": 40} and late["summary"]["requests"] == 0
    assert_fails(run(*words, "--policy", "drop"), "drop-oldest")
    paced = run(*words, "--period", "30ms", "--limit", 10).json
    assert paced["summary"]["requests"] == 10
    # None comes before its time: the last one after nine periods.
    assert paced["summary"]["throughput_hz"] <= 10 / (9 * 0.03)
    assert_fails(run(*[word for word in words if word != "--stream"], "--period", "1s"), "--period", code=2)


def test_run_without_an_edge_chooses_among_the_device_plans(run: Run, bundle: Bundle, tmp_path: Path):
    np.save(tmp_path / "x.npy", pictures(1)[0])
    done = run("run", bundle.folder, "--data", tmp_path / "x.npy", "--slowdown", 2, "--json")
    assert done.code == 0, done.err
    assert done.json["summary"]["plan"] == DEVICE and "slowed 2x" in done.json["summary"]["device"]


def test_run_takes_a_folder_of_pictures_of_any_size(run: Run, bundle: Bundle, tmp_path: Path):
    for place, name in enumerate(("b", "d")):
        (tmp_path / name).mkdir()
        Image.fromarray(np.full((20 + place, 30, 3), 100, np.uint8)).save(tmp_path / name / "one.png")
    done = run("run", bundle.folder, "--data", f"folder:{tmp_path}", "--plan", DEVICE, "--json")
    assert done.code == 0, done.err
    answers = done.json["answers"]
    assert [Path(answer["input"]).parent.name for answer in answers] == ["b", "d"]
    rights = sum(answer["class"] == Path(answer["input"]).parent.name for answer in answers)
    assert done.json["summary"]["accuracy"] == 100 * rights / 2


@pytest.mark.parametrize(
    ("options", "words", "code"),
    [
        (["--plan", "99"], ["99", "menu"], 1),
        (["--plan", "best"], ["best", "auto"], 2),
        (["--plan", str(SPLIT32)], ["--edge"], 2),
        (["--edge", "ws://127.0.0.1:1", "--strict"], ["--rate"], 2),
        (["--strict", "--plan", "0"], ["--edge"], 2),
        (["--fallback", "0", "--plan", "0"], ["--edge"], 2),
        (["--edge", "ws://127.0.0.1:1", "--fallback", "1"], ["fallback", "device alone"], 1),
        (["--edge", "ws://127.0.0.1:1", "--token-file", "nowhere"], ["token's file", "nowhere"], 2),
        (["--metrics", "9100", "--plan", "0"], ["--metrics", "--edge"], 2),
        (["--log", "xml", "--plan", "0"], ["xml", "json"], 2),
        (["--plan", "²"], ["²", "auto"], 2),
        (["--edge", "ws://127.0.0.1:1", "--hedge", "-1"], ["--hedge", "-1"], 2),
        (["--edge", "ws://127.0.0.1:1", "--notice", "0s"], ["--notice", "0s"], 2),
        (["--plan", "0", "--timeline", "/nowhere/x"], ["--timeline", "/nowhere/x"], 2),
        (["--edge", "http://127.0.0.1:1", "--plan", "0"], ["http://127.0.0.1:1"], 2),
        (["--plan", "0", "--slowdown", "0.5"], ["0.5"], 1),
    ],
)
def test_run_refuses_options(
    run: Run, bundle: Bundle, tmp_path: Path, options: list[str], words: list[str], code: int
):
    np.save(tmp_path / "x.npy", pictures(1))
    assert_fails(run("run", bundle.folder, "--data", tmp_path / "x.npy", *options), *words, code=code)


def test_pictures_of_another_size_or_kind_are_refused(run: Run, bundle: Bundle, tmp_path: Path):
    def refused(data: object, *words: str) -> None:
        assert_fails(run("run", bundle.folder, "--data", data, "--plan", DEVICE), *words)
        if not str(data).startswith("folder:"):
            assert_fails(run("evaluate", bundle.folder, "--data", data, "--plan", DEVICE), *words)

    np.save(tmp_path / "large.npy", np.zeros((2, 9, 8, 3), np.uint8))
    refused(tmp_path / "large.npy", "8 x 8 x 3", "9 x 8 x 3")
    np.save(tmp_path / "float.npy", np.zeros((2, 8, 8, 3), np.float32))
    refused(tmp_path / "float.npy", "uint8", "float32")
    np.save(tmp_path / "none.npy", np.zeros((0, 8, 8, 3), np.uint8))
    refused(tmp_path / "none.npy", "at least 1")
    (tmp_path / "text.npy").write_text("no array")
    refused(tmp_path / "text.npy", "text.npy")
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    refused(tmp_path / "objects.npy", "objects.npy")
    refused(tmp_path / "absent.npy", "absent.npy")
    refused("folder:" + str(tmp_path / "absent"), "absent")
    refused(f"folder:{tmp_path}", "no pictures")
    (tmp_path / "broken.png").write_text("no picture")
    refused(f"folder:{tmp_path}", "broken.png")
    refused("digitz", "digitz", "digits")
    refused("scene-digits", "8x8", "64x64")


# evaluate, serve, bench and demo, as far as they can be refused at once


def test_evaluate_counts_losses_against_the_reference(run: Run, bundle: Bundle, tmp_path: Path):
    np.save(tmp_path / "x.npy", pictures(6))
    done = run("evaluate", bundle.folder, "--plan", SPLIT32, "--data", tmp_path / "x.npy", "--limit", 5, "--json")
    assert done.code == 0, done.err
    evidence = done.json["evidence"]
    assert (evidence["num_images"], evidence["loss_points"], evidence["split"]) == (5, 0.0, "test")
    assert evidence["payload_bytes"] == 4 * 8 * 8 * 4 + 6
    text = run("evaluate", bundle.folder, "--plan", SPLIT32, "--data", tmp_path / "x.npy").out
    assert "on 6 pictures" in text and "1.03 kB" in text


def test_evaluate_counts_classes_by_their_names(bundle: Bundle, tmp_path: Path):
    # As in the bundle, but for one class, so that the folder's own numbers are others.
    names = bundle.manifest.classes
    height, width, _ = bundle.manifest.input.shape
    for name in names[1:]:
        (tmp_path / "own" / name).mkdir(parents=True)
        for number in range(20):
            picture = Image.new("RGB", (width, height), (names.index(name), number, 0))
            picture.save(tmp_path / "own" / name / f"{number}.png")
    images = images_of(f"folder:{tmp_path / 'own'}", bundle, limit=None, data_dir=None)
    assert images.labels is not None and len(images) > 3
    assert images.labels.tolist() == images.pixels[:, 0, 0, 0].tolist()
    (tmp_path / "own" / "zebra").mkdir()
    with pytest.raises(DataError, match="zebra"):
        images_of(f"folder:{tmp_path / 'own'}", bundle, limit=None, data_dir=None)


def test_a_folder_is_the_bundles_own_by_whatever_path(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    height, width, _ = bundle.manifest.input.shape
    (tmp_path / "photos").mkdir()
    for number in range(30):
        Image.new("RGB", (width, height), (number, 0, 0)).save(tmp_path / "photos" / f"{number}.png")
    own = msgspec.structs.replace(bundle.manifest, data=f"folder:{tmp_path / 'photos'}", holdout="test-fifth")
    monkeypatch.chdir(tmp_path)
    mine = Bundle(bundle.folder, own, bundle.digest)
    kept = [
        images_of(source, mine, limit=None, data_dir=None).pixels[:, 0, 0, 0].tolist()
        for source in ("folder:photos", f"folder:{tmp_path / 'photos'}", "folder:./photos/")
    ]
    assert kept[0] == kept[1] == kept[2]
    every = load_source(f"folder:{tmp_path / 'photos'}", size=(height, width)).images("test")
    assert len(kept[0]) < len(every)


def test_evaluate_knows_the_menu(run: Run, bundle: Bundle):
    assert_fails(run("evaluate", bundle.folder, "--plan", 99, "--data", "digits"), "99", "menu")
    assert_fails(run("evaluate", bundle.folder, "--plan", 0), "--data", code=2)


def test_serve_bench_and_demo_refuse_options(run: Run, bundle: Bundle):
    assert_fails(run("serve", bundle.folder, "--load", 0.5), "0.5", code=2)
    assert_fails(run("bench", bundle.folder, "--rates", "1Mbit/s,"), '""', code=2)
    assert_fails(run("bench", bundle.folder, "--edge-load", 0.5), "0.5", code=2)
    assert_fails(run("bench", bundle.folder), "noise")
    assert_fails(run("demo", "--data", "mnist"), "mnist", "scene-digits", code=2)


# --- simulate --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def busy_bundle(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with 2 ms at the edge."""
    folder = tmp_path_factory.mktemp("cli") / "busy"
    shutil.copytree(bundle.folder, folder)
    slow = [
        msgspec.structs.replace(
            c, evidence=msgspec.structs.replace(c.evidence, tail_s=0.0 if c.plan.kind == "device" else 0.002)
        )
        for c in bundle.candidates()
    ]
    (folder / "evidence.json").write_bytes(msgspec.json.encode(slow))
    write_manifest(folder, bundle.manifest)
    return load_bundle(folder)


def test_a_fleet_is_simulated_over_a_trace(busy_bundle: Bundle, run: Run, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("seconds,bit/s\n0,1e6\n1,0\n2,5e6\n")
    words = ["simulate", busy_bundle.folder, "--devices", "20", "--trace", trace, "--plan", SPLIT32]
    words += ["--period", "500ms", "--duration", "30s", "--deadline", "100ms"]
    found = run(*words, "--json").json
    assert (found["how"], found["devices"], found["requests"], found["plan"]) == ("simulated", 20, 1200, SPLIT32)
    assert found["latency_p50_s"] < found["latency_p95_s"] < found["latency_p99_s"] < 2.0
    assert 0 < found["late_share"] < 1 and 0 < found["edge_busy_share"] < 1
    assert "later than the deadline" in run(*words).out


def test_the_best_plan_is_one_that_serves_all_devices(busy_bundle: Bundle, run: Run) -> None:
    words = ["simulate", busy_bundle.folder, "--rate", "10Mbit/s", "--rtt", "2ms", "--period", "1s", "--duration", "3s"]
    alone, crowd = (run(*words, "--devices", devices, "--json").json["plan"] for devices in (1, 2000))
    assert alone != crowd == DEVICE


def test_requests_by_chance_come_within_the_duration(busy_bundle: Bundle, run: Run) -> None:
    words = ["simulate", busy_bundle.folder, "--plan", DEVICE, "--devices", 300, "--period", "1s", "--duration", "4s"]
    found = run(*words, "--poisson", "--json").json
    assert found["requests"] == 1200 and found["throughput_hz"] == pytest.approx(300, rel=0.05)


def test_requests_come_as_recorded(busy_bundle: Bundle, run: Run, tmp_path: Path) -> None:
    times = tmp_path / "times.txt"
    times.write_text("# a camera that moves\n0.0\n0.1  # door\n\n0.1\n3.5\n")
    words = ["simulate", busy_bundle.folder, "--plan", DEVICE, "--devices", "3", "--arrivals", times, "--json"]
    found = run(*words).json
    assert found["requests"] == 12 and found["latency_p99_s"] < 1.0
    assert_fails(run(*words, "--poisson"), "--arrivals or --poisson", code=2)
    times.write_text("0.0\nsoon\n")
    assert_fails(run(*words), "seconds a line", "soon", "times.txt")
    times.write_text("2.0\n1.0\n")
    assert_fails(run(*words), "do not fall")


def test_simulated_devices_that_share_an_edge_wait_for_it(busy_bundle: Bundle, run: Run) -> None:
    words = ["simulate", busy_bundle.folder, "--plan", UPLOAD, "--rate", "100Mbit/s", "--poisson", "--json"]
    words += ["--period", "100ms", "--duration", "20s"]
    alone, many, helped = (
        run(*words, "--devices", devices, "--workers", workers).json for devices, workers in ((1, 1), (40, 1), (40, 4))
    )
    assert many["latency_p95_s"] > 1.2 * helped["latency_p95_s"] >= 1.2 * alone["latency_p50_s"]
    assert many["edge_busy_share"] > 10 * alone["edge_busy_share"]
    assert many["edge_wait_p95_s"] > 10 * helped["edge_wait_p95_s"]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--duration", "1ms"], "must be 1 to 40000000 requests, got 0"),
        (["--devices", "10000000", "--period", "10ms"], "must be 1 to 40000000 requests"),
        (["--plan", "x"], '--plan must be a number of the menu or auto, got "x"'),
        (["--trace", "none.csv"], "cannot read a trace"),
    ],
)
def test_a_simulation_that_cannot_be_is_refused(bundle: Bundle, run: Run, words: list[str], line: str) -> None:
    done = run("simulate", bundle.folder, *words)
    assert done.code in (1, 2) and line in done.err


def test_a_devices_token_is_checked_before_it_is_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from coinfer.cli.run import TOKEN, secrets_of
    from coinfer.runtime.tokens import add_token

    url, file, token = "ws://127.0.0.1:1", tmp_path / "token", add_token(tmp_path / "tokens.json", "camera")
    monkeypatch.setenv(TOKEN, token)
    assert secrets_of(url, None, None, None, None) == {"token": token, "tls": None}
    file.write_text("my secret password")
    monkeypatch.setenv(TOKEN, "another secret password")
    for token_file, where in ((file, str(file)), (None, TOKEN)):
        with pytest.raises(UsageError, match="a token is NAME.SECRET") as caught:
            secrets_of(url, token_file, None, None, None)
        assert where in str(caught.value) and "password" not in str(caught.value)
    file.write_text(f"{token}\n")
    assert secrets_of(url, file, None, None, None)["token"] == token
    monkeypatch.delenv(TOKEN)
    assert secrets_of(url, None, None, None, None) == {"token": None, "tls": None}
