"""A build with exits: their candidates are what the deployed plan does, and what it does over the link."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.build.evaluate import Deployed
from coinfer.build.job import Job
from coinfer.build.make import assemble, build
from coinfer.build.sections import BuildJob, DataJob, ExitsJob, ModelJob
from coinfer.bundle import Bundle
from coinfer.data import load_source
from coinfer.errors import CoinferError, CutError, JobError, PlanError
from coinfer.exits import load_evidence
from coinfer.plan import Candidate
from coinfer.runtime.device import Device
from coinfer.runtime.spawn import EdgeProcess
from coinfer.search import estimate
from coinfer.search.menu import BASE
from tiny_nets import OWN_DIGITS

EXITS = ExitsJob(cuts=("/relu#0", "/relu#1"), width=8, epochs=40, losses=(0.5, 4.0), mirror=False)


def job(exits: ExitsJob) -> Job:
    return Job(
        model=ModelJob(source="own_exits:factory", mean=(0.0,), std=(1.0,)),
        data=DataJob(source="digits"),
        build=BuildJob(rounds=(50, 200), report_images=200, calibration_images=64),
        exits=exits,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("exits")
    (folder / "own_exits.py").write_text(OWN_DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return build(job(EXITS), folder / "bundle")


def with_exits(bundle: Bundle) -> list[Candidate]:
    return [c for c in bundle.candidates() if c.plan.exits]


def test_plans_that_survived_are_there_again_with_exits(built: Bundle) -> None:
    found = with_exits(built)
    kinds = {c.plan.kind for c in built.candidates() if c.dropped is None}
    assert {c.plan.kind for c in found} == kinds
    assert {c.plan.precision for c in found} == {"fp32", "int8"}
    assert all(c.dropped is None and c.evidence.times_how == "measured" for c in found)
    for c in found:
        assert c.evidence.loss_points is not None and c.evidence.loss_points <= 4.0
        assert len(c.evidence.exit_shares) == len(c.plan.exits) and 0 < sum(c.evidence.exit_shares) <= 1
    numbers = [c.plan.number for c in built.candidates()]
    assert len(set(numbers)) == len(numbers)


def test_an_exit_spares_the_device_what_lies_behind_it(built: Bundle) -> None:
    seconds = {name: timing.median_s for name, timing in built.profile().segments.items()}
    early = [c for c in with_exits(built) if c.plan.kind == "device"]
    assert early
    for c in early:
        parts = [seconds[name] for name in c.plan.segments_on("device")]
        left, want = 1.0, parts[0]
        for classified, rest, share in zip(parts[1::2], parts[2::2], c.evidence.exit_shares, strict=True):
            want += left * classified
            left -= share
            want += left * rest
        assert c.evidence.head_s + c.evidence.exit_s == pytest.approx(want)
        assert estimate(c, BASE).stages_s == pytest.approx(
            {"head": c.evidence.head_s, "exit": c.evidence.exit_s}, rel=1e-9
        ) or c.plan.precision == "int8"


def test_evidence_is_what_the_deployed_plan_does(built: Bundle, tmp_path: Path) -> None:
    work = built.folder.with_name("bundle.work")
    found = with_exits(built)
    other = assemble(work, [c.plan.number for c in found], tmp_path / "all")
    images = load_source("digits").drawn("validation", 200)
    for c in found:
        plan = other.plan(c.plan.number)
        classes, num_bytes, by = Deployed(other.folder, plan, other.manifest.outputs).classify(images.pixels)
        assert 100 * np.mean(classes == images.labels) == pytest.approx(c.evidence.accuracy, abs=0.51)
        shares = np.bincount(by, minlength=len(plan.exits) + 1) / 200
        assert shares[:-1] == pytest.approx(c.evidence.exit_shares, abs=0.011)
        known = load_evidence(other.path(c.evidence.exit_file))
        rules = [exit.rule for exit in plan.exits]
        at = known.at([rule.threshold for rule in rules])
        assert at.accuracy == c.evidence.accuracy and at.shares[:-1] == c.evidence.exit_shares
        if plan.kind != "device":
            assert np.mean(num_bytes) == pytest.approx(at.mean_bytes, rel=0.05)


def test_plans_with_exits_run_over_the_link(built: Bundle, tmp_path: Path) -> None:
    found = with_exits(built)
    remote = [c for c in found if c.plan.kind != "device"]
    if not remote:
        pytest.skip("nothing but device plans survived")
    other = assemble(built.folder.with_name("bundle.work"), [c.plan.number for c in found], tmp_path / "run")
    images = load_source("digits").drawn("validation", 40)
    with EdgeProcess(other.folder) as edge, Device(other, edge=edge.url) as device:
        for c in [*remote[:4], found[0]]:
            plan = other.plan(c.plan.number)
            want = Deployed(other.folder, plan, other.manifest.outputs).classify(images.pixels)
            answers = list(device.stream(images.pixels, plan=plan.number))
            assert [a.label for a in answers] == want.classes.tolist()
            places = [len(plan.exits) if a.outcome.exit is None else a.outcome.exit for a in answers]
            assert places == want.answered_by.tolist()
            assert [a.outcome.payload_bytes for a in answers] == want.num_bytes.tolist()


def test_a_second_build_finds_its_exits_and_another_takes_their_file(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    (file,) = (folder / "bundle.work" / "exits").glob("own_exits*.safetensors")
    stages: list[str] = []
    build(job(EXITS), folder / "again", work=folder / "bundle.work", progress=lambda stage, *_: stages.append(stage))
    assert not any("exit at" in stage for stage in stages)
    given = msgspec.structs.replace(EXITS, cuts=(), files=(str(file),))
    other = build(job(given), folder / "given", work=folder / "given.work")
    assert {e.cut for c in with_exits(other) for e in c.plan.exits} <= {"/relu#0", "/relu#1"} and with_exits(other)


def test_joint_training_makes_one_more_network(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    asked = msgspec.structs.replace(EXITS, cuts=("/relu#1",), epochs=10, joint_epochs=2, losses=(8.0,))
    bundle = build(job(asked), folder / "joint", work=folder / "joint.work")
    joint = [c for c in bundle.candidates() if c.plan.variant.endswith(".joint")]
    assert joint and {c.plan.variant for c in with_exits(bundle)} == {joint[0].plan.variant}
    own = next(c for c in joint if c.plan.kind == "device" and not c.plan.exits)
    assert own.evidence.loss_points is not None and own.evidence.loss_points < 8


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"cuts": ("layer9#0",)}, CutError, "no cut"),
        ({"most": 1}, JobError, "fit 2 cuts of the network, more than most = 1"),
    ],
)
def test_exits_that_do_not_fit_are_refused(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, change: dict, error: type[Exception], words: str
) -> None:
    monkeypatch.chdir(built.folder.parent)
    with pytest.raises(error, match=words):
        wanted = job(msgspec.structs.replace(EXITS, **change))
        build(wanted, built.folder.with_name("none"), work=built.folder.with_name("bundle.work"))
    assert not built.folder.with_name("none").exists()


@pytest.mark.parametrize(
    "change", [{"losses": ()}, {"losses": (-1.0,)}, {"width": -1}, {"labels": 2.0}, {"weights": (0.0,)}]
)
def test_sections_that_make_no_sense_are_refused(change: dict) -> None:
    with pytest.raises(JobError, match=r"\[exits\]"):
        msgspec.structs.replace(EXITS, **change)


def test_exits_of_a_network_without_classes_are_refused_in_a_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "maps.py").write_text(
        "from torch import nn\n\n\ndef factory():\n    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU())\n"
    )
    monkeypatch.chdir(tmp_path)
    wanted = msgspec.structs.replace(
        job(ExitsJob(cuts=("/0#0",))), model=ModelJob(source="maps:factory", mean=(0.0,), std=(1.0,))
    )
    with pytest.raises(CoinferError, match="an exit learns classes from the network's first output, which is of shape"):
        build(wanted, tmp_path / "bundle")


def test_a_plan_of_another_menu_has_no_evidence(built: Bundle) -> None:
    with pytest.raises(PlanError, match="did not survive"):
        assemble(built.folder.with_name("bundle.work"), [9999], built.folder.with_name("none"))
