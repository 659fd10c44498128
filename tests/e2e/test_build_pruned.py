"""A build that prunes: what it makes are candidates like any other, with their ancestry; limits are kept."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from coinfer.build.evaluate import Deployed
from coinfer.build.job import Job
from coinfer.build.make import assemble, build
from coinfer.build.pruned import Pruner
from coinfer.build.sections import BottleneckJob, BuildJob, DataJob, GoalJob, ModelJob, PruneJob
from coinfer.build.spending import Gains
from coinfer.bundle import Bundle
from coinfer.compress.pruned_file import Stage, load_pruned
from coinfer.data import load_source
from coinfer.errors import CutError, DataError, JobError, ModelError, WeightsError
from coinfer.model.zoo import build_model, weights_digest
from coinfer.plan import Candidate
from tiny_nets import OWN_DIGITS

PRUNE = PruneJob(
    keep=(0.7, 0.4), rounds=1, epochs=0, final_epochs=12, cuts=("/relu#1",), counts=3, cut_epochs=4,
    mirror=False, lr=0.01, final_lr=0.012, cut_lr=0.008, batch_size=32, labels=0.8,
)  # fmt: skip
UNITS = BottleneckJob(
    cuts=("/relu#1",), widths=(4,), strides=(2,), prices=(0.001, 0.05), epochs=(15, 15), mirror=False, mixes=0,
    base="both",
)  # fmt: skip


def job(prune: PruneJob, bottleneck: BottleneckJob | None = None, **limits: float) -> Job:
    return Job(
        model=ModelJob(source="own_units:factory", mean=(0.0,), std=(1.0,)),
        data=DataJob(source="digits"),
        goal=GoalJob(max_loss=20.0),
        build=BuildJob(
            rounds=(50, 200), report_images=200, calibration_images=64, cuts=("/relu*",), precisions=("fp32",),
            **limits,
        ),
        bottleneck=bottleneck or BottleneckJob(),
        prune=prune,
    )


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("pruned")
    (folder / "own_units.py").write_text(OWN_DIGITS)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return build(job(PRUNE, UNITS), folder / "bundle")


def work_of(bundle: Bundle) -> Path:
    return bundle.folder.with_name("bundle.work")


def test_what_was_made_runs_alone_and_divided_and_series_at_their_cut_alone(built: Bundle) -> None:
    ways: dict[str, set[str]] = {}
    cuts: dict[str, set[str]] = {}
    for candidate in built.candidates():
        ways.setdefault(candidate.plan.variant, set()).add(candidate.plan.way)
        if candidate.plan.cut is not None:
            cuts.setdefault(candidate.plan.variant, set()).add(candidate.plan.cut)
    everywhere = cuts["own_units_factory"]
    for keep in ("k0.7", "k0.4"):
        assert ways[f"own_units_factory.{keep}"] == {"device", "upload", "split"}
        assert cuts[f"own_units_factory.{keep}"] == everywhere
    series = [name for name in ways if ".f" in name]
    assert series and all(ways[name] == {"split"} and cuts[name] == {"/relu#1"} for name in series)
    units = [name for name in ways if ways[name] == {"unit"}]
    assert {name.rpartition(".c4")[0] for name in units} >= {"own_units_factory"} and len(units) == 2


def test_pruned_networks_are_smaller_on_disk_and_say_how_they_were_made(built: Bundle) -> None:
    work = work_of(built)
    networks = msgspec.json.decode((work / "networks.json").read_bytes(), type=dict)
    size = {name: (work / "segments" / f"{name}.fp32.onnx").stat().st_size for name in networks}
    small, smaller = "own_units_factory.k0.7", "own_units_factory.k0.4"
    assert size[smaller] < size[small] < size["own_units_factory"]
    assert networks[smaller]["base"] == small and len(networks[smaller]["pruned"]) == 2
    series = next(name for name in networks if ".f" in name)
    of = networks[series]["base"]
    assert networks[series]["pruned"][: len(networks[of]["pruned"])] == networks[of]["pruned"]
    rates = {name: networks[name]["pruned"][-1]["recipe"]["final_lr"] for name in (smaller, series)}
    assert rates == {smaller: PRUNE.final_lr, series: PRUNE.cut_lr}
    # In the bundle lie the menu's networks, each with all that it was made of.
    listed = built.networks()
    assert {plan.variant for plan in built.manifest.menu} <= set(listed)
    assert all(one.base is None or one.base in listed for one in listed.values())


def test_a_network_is_replayed_from_its_file(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(built.folder.parent)
    module = build_model("own_units:factory").module
    path = work_of(built) / "pruned" / "own_units_factory.k0.4.safetensors"
    read = load_pruned(path, module, (torch.zeros(1, 1, 8, 8),), network=weights_digest(module))
    weights = load_file(path)
    assert all(torch.equal(value, weights[name]) for name, value in read.module.state_dict().items())
    networks = msgspec.json.decode((work_of(built) / "networks.json").read_bytes(), type=dict)
    stages = msgspec.convert(networks["own_units_factory.k0.4"]["pruned"], tuple[Stage, ...])
    assert stages == read.lineage


def test_a_pruned_plan_answers_as_it_was_weighed(built: Bundle, tmp_path: Path) -> None:
    alive = [c for c in built.candidates() if c.dropped is None and ".k" in c.plan.variant]
    other = assemble(work_of(built), [c.plan.number for c in alive], tmp_path / "pruned")
    images = load_source("digits").drawn("validation", 200)
    assert alive
    for candidate in alive:
        classes, num_bytes, _ = Deployed(
            other.folder, other.plan(candidate.plan.number), other.manifest.outputs
        ).classify(images.pixels)
        assert 100 * np.mean(classes == images.labels) == pytest.approx(candidate.evidence.accuracy, abs=0.51)
        assert np.mean(num_bytes) == pytest.approx(candidate.evidence.payload_bytes, abs=1.0)


def test_a_second_build_trains_nothing_and_files_are_taken_as_they_are(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    stages: list[str] = []
    build(job(PRUNE, UNITS), folder / "again", work=work_of(built), progress=lambda stage, *_: stages.append(stage))
    assert not [stage for stage in stages if "final" in stage or "alone" in stage]
    file = work_of(built) / "pruned" / "own_units_factory.k0.4.safetensors"
    copied = folder / "mine.safetensors"
    copied.write_bytes(file.read_bytes())
    given = build(job(PruneJob(networks=(str(copied),))), folder / "given")
    assert "own_units_factory.mine" in {c.plan.variant for c in given.candidates()}
    copied.write_bytes(copied.read_bytes()[:100])
    with pytest.raises(WeightsError, match=r"pruned network .*mine.safetensors cannot be read"):
        build(job(PruneJob(networks=(str(copied),))), folder / "given")


def test_no_more_is_trained_than_the_limit_allows(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)

    def made(trainings: int) -> list[str]:
        limited = build(job(PRUNE, UNITS, trainings=trainings), folder / "limited")
        assert f"{trainings} trainings" in (folder / "limited.work" / "log.txt").read_text() or not trainings
        return sorted({c.plan.variant for c in limited.candidates()} - {"own_units_factory"})

    assert made(0) == []
    one, two = made(1), made(2)
    assert len(one) == 1 and len(two) == 2 and set(one) < set(two)
    ledger = msgspec.json.decode((folder / "limited.work" / "spent.json").read_bytes())
    assert len(ledger[1]) == 2 and all(entry["seconds"] > 0 for entry in ledger[1])


def all_gain(gains: Gains, best: object, candidates: list[Candidate]) -> float:
    """Whatever there are: an upload of pictures this small is better than any split."""
    return float(len(candidates))


def test_where_no_smaller_share_fits_into_the_limit_step_2_begins(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)

    def expected(pruner: Pruner, epochs: int, share: float) -> float:
        """The second share of step 1, from 0.7 to 0.4, is said to take far more than the limit."""
        return 1e9 if epochs == PRUNE.final_epochs and share < 0.6 else 1.0

    monkeypatch.setattr(Pruner, "_seconds", expected)
    monkeypatch.setattr(Gains, "of", all_gain)
    made = build(job(PRUNE, minutes=60.0), folder / "one-share")
    said = (folder / "one-share.work" / "log.txt").read_text()
    assert "not trained, beyond the limit: prune to 0.4 of macs" in said
    assert any(".k0.7." in c.plan.variant and ".f" in c.plan.variant for c in made.candidates())


def test_a_series_may_be_at_a_cut_that_is_no_candidate_of_its_own(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    monkeypatch.setattr(Gains, "of", all_gain)
    series = PruneJob(cuts=("/relu#1",), counts=(6,), cut_epochs=4, mirror=False, lr=0.01, batch_size=32)
    wanted = job(series, trainings=1)
    elsewhere = msgspec.structs.replace(wanted, build=msgspec.structs.replace(wanted.build, cuts=("/relu#0",)))
    made = build(elsewhere, folder / "elsewhere")
    cuts = {(c.plan.variant, c.plan.cut) for c in made.candidates() if c.plan.cut is not None}
    assert cuts == {("own_units_factory", "/relu#0"), ("own_units_factory._relu_1.f6", "/relu#1")}


@pytest.mark.parametrize(
    ("prune", "error", "words"),
    [
        (PruneJob(keep=(0.5,), cuts=("layer9#0",)), CutError, "no cut"),
        # Fused with the norm behind it.
        (PruneJob(keep=(0.5,), cuts=("conv1#0",)), JobError, 'cuts "conv1#0" is no deployable cut; near are .*#0'),
        (PruneJob(keep=(0.5,), cuts=("layer9*",)), JobError, "fits no cut of which .*: the nearest are"),
        (PruneJob(keep=(0.5,), cuts=("/relu#1*",), ignore=("conv2",)), JobError, "fits no cut of which channels"),
        (PruneJob(keep=(0.5,), region=("layer9*",)), ModelError, 'region "layer9\\*" fits no layer of'),
        (PruneJob(keep=(0.5,), ignore=("conv9",)), ModelError, 'ignore "conv9" fits no layer of .*; near are conv'),
        (PruneJob(keep=(0.5,), region=("classifier",)), ModelError, "no channel can be removed in the region"),
        (PruneJob(keep=(0.5,), ignore=("*",)), ModelError, "without"),
        (PruneJob(keep=(0.001,), least=4), ModelError, "would empty layers, .* with 4 channels left in each"),
        (PruneJob(keep=(0.9, 0.001), least=4), ModelError, "would empty layers"),
        (PruneJob(keep=(0.5, 0.001), least=4, budget="parameters"), ModelError, "of the parameters .* would empty"),
        (PruneJob(keep=(0.50000001, 0.5)), JobError, "differ in six digits"),
        (PruneJob(keep=(0.5,), batch_size=9999), DataError, "batch_size must be at most the .* pictures, got 9999"),
        (PruneJob(keep=(0.5,), budget="latency", latency_at="nowhere#0"), CutError, "no cut"),
        (PruneJob(keep=(0.5,), cuts=("/relu#1",), ignore=("conv2",)), CutError, "no channel that crosses at"),
    ],
)
def test_what_cannot_be_pruned_is_refused_before_anything_is_trained(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, prune: PruneJob, error: type[Exception], words: str
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    stages: list[str] = []
    quick = msgspec.structs.replace(prune, rounds=1)
    with pytest.raises(error, match=words):
        build(job(quick), folder / "refused", progress=lambda stage, *_: stages.append(stage))
    assert not (folder / "refused").exists() and not [stage for stage in stages if "round" in stage]


def test_counts_that_cannot_be_made_are_named(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    many = PruneJob(cuts=("/relu#1",), counts=(99, 50), mirror=False, batch_size=32)
    made = build(job(many), folder / "many")
    assert {c.plan.variant for c in made.candidates()} == {"own_units_factory"}
    told = "counts (99, 50) at /relu#1: 32 channels cross there, of which 1 or more stay, [] are made"
    assert told in (folder / "many.work" / "log.txt").read_text()


def test_a_latency_is_measured_as_deployed_and_met_as_far_as_it_can_be(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    few = PruneJob(
        keep=(0.001,), budget="latency", unreachable="nearest", least=4, rounds=1, epochs=0, final_epochs=1,
        mirror=False, batch_size=32,
    )  # fmt: skip
    build(job(few), folder / "quick")
    said = (folder / "quick.work" / "log.txt").read_text()
    assert "own_units_factory.k0.001: no network within" in said and "would empty" in said


def test_where_step_1_left_one_channel_no_series_begins_and_no_smaller_share_is_tried(
    built: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    least = PruneJob(
        keep=(0.001, 0.0005), unreachable="nearest", score="magnitude", rounds=1, epochs=0, final_epochs=1,
        cuts=("/relu#1",), mirror=False, batch_size=32,
    )  # fmt: skip
    made = build(msgspec.structs.replace(job(least), goal=GoalJob(max_loss=100.0)), folder / "least")
    assert {c.plan.variant for c in made.candidates()} == {"own_units_factory", "own_units_factory.k0.001"}
    said = (folder / "least.work" / "log.txt").read_text()
    assert "no series from own_units_factory.k0.001: no channel" in said and '"conv2": it has one channel' in said


def test_a_score_of_labels_is_refused_where_there_are_none(built: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = built.folder.parent
    monkeypatch.chdir(folder)
    unlabelled = msgspec.structs.replace(job(PRUNE), data=DataJob(source="digits", labels=False))
    with pytest.raises(ModelError, match=r'pictures have none: take "slimming" or "magnitude" \(data "digits"\)'):
        build(unlabelled, folder / "refused")
    few = PruneJob(keep=(0.7,), score="magnitude", rounds=1, epochs=0, final_epochs=1, mirror=False, batch_size=32)
    made = build(msgspec.structs.replace(unlabelled, prune=few), folder / "unlabelled")
    assert "own_units_factory.k0.7" in {candidate.plan.variant for candidate in made.candidates()}
