"""A whole build of a small own network on real digits: what the bundle says is what its files do."""

from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.build.drafts import all_drafts
from coinfer.build.evaluate import Deployed, evaluate_plan, loss_of
from coinfer.build.job import Job, conditions_of
from coinfer.build.make import assemble, build
from coinfer.build.measured import calibrate_and_weigh
from coinfer.build.progress import quiet
from coinfer.build.rounds import classify_splits, classify_wholes
from coinfer.build.sections import BuildJob, DataJob, ModelJob
from coinfer.build.variants import add_variants
from coinfer.build.workshop import prepare
from coinfer.bundle import Bundle
from coinfer.data import load_source
from coinfer.engine.onnx import Session
from coinfer.engine.plans import profile_bundle
from coinfer.errors import BundleError, DataError, PlanError
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.runtime.device import Device
from coinfer.search.goal import Goal
from coinfer.search.planmap import built_goal, load_map, loaded
from coinfer.search.solve import baselines, search
from tiny_nets import OWN_DIGITS

OWN = ModelJob(source="own_digits:factory", mean=(0.0,), std=(1.0,))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("build")
    (folder / "own_digits.py").write_text(OWN_DIGITS)
    job = Job(
        model=OWN,
        data=DataJob(source="digits"),
        build=BuildJob(rounds=(50, 200), report_images=200, calibration_images=64),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        return build(job, folder / "bundle")


def test_every_kind_is_on_the_menu_and_every_candidate_is_accounted_for(built: Bundle) -> None:
    candidates = built.candidates()
    assert {plan.kind for plan in built.manifest.menu} == {"device", "upload", "split"}
    assert [c.plan.number for c in candidates] == list(range(len(candidates)))
    for candidate in candidates:
        assert candidate.dropped is None or "image" in candidate.dropped
        if candidate.dropped is None:
            assert candidate.evidence.num_images == 200
    on_menu = {plan.number for plan in built.manifest.menu}
    assert {c.plan.number for c in candidates if c.reported is not None} == on_menu
    assert not list(built.folder.parent.glob(".bundle*"))


def test_what_is_dropped_untried_has_a_hopeless_neighbour_that_sends_more(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(built.folder.parent)
    options = BuildJob(rounds=(200,), calibration_images=64, precisions=("fp32",), keep_all=True)
    every = Job(model=OWN, data=DataJob(source="digits"), build=options)
    workshop = prepare(every, tmp_path / "work")
    add_variants(workshop, progress=quiet)
    drafts = all_drafts(workshop)
    tables = calibrate_and_weigh(workshop, drafts, progress=quiet)
    for draft in drafts:
        draft.is_rival = True
    answers = classify_wholes(workshop, drafts, tables, workshop.validation, progress=quiet)
    workshop = replace(workshop, job=msgspec.structs.replace(every, build=BuildJob(rounds=(200,))))
    classify_splits(workshop, drafts, tables, workshop.validation, answers, progress=quiet)
    by_label = {draft.plan.label: draft for draft in drafts}
    untried = [draft for draft in drafts if draft.dropped is not None]
    assert untried
    for draft in untried:
        label = str(draft.dropped).removeprefix("after 200 images: ")
        neighbour = by_label[label.removesuffix(" sends more of the same kind and is hopeless")]
        assert len(draft.correct) == 0 and draft.plan.cut == neighbour.plan.cut
        loss, margin = loss_of(answers.is_right, neighbour.correct)
        assert loss - margin > workshop.job.goal.max_loss
        assert neighbour.payload_bytes >= draft.payload_bytes
        assert neighbour.plan.codec is not None and draft.plan.codec is not None
        assert neighbour.plan.codec.transform == draft.plan.codec.transform


def test_all_candidates_are_classified_where_all_are_to_be_kept(
    built: Bundle, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(built.folder.parent)
    options = BuildJob(
        rounds=(60,), report_images=20, calibration_images=64, precisions=("fp32",), cuts=("/relu#0",), keep_all=True
    )
    job = Job(model=OWN, data=DataJob(source="digits"), build=options)
    candidates = build(job, tmp_path / "all").candidates()
    assert len({c.plan.codec for c in candidates if c.plan.kind == "split"}) > 20
    assert all(c.dropped is None and c.evidence.num_images == 60 for c in candidates)


def test_the_bundles_map_is_what_a_search_chooses_with_the_exchange(built: Bundle, tmp_path: Path) -> None:
    job = Job(model=OWN, data=DataJob(source="digits"))
    again = assemble(
        built.folder.parent / "bundle.work", [plan.number for plan in built.manifest.menu], tmp_path / "again",
        exchange=lambda bundle: 0.25,
    )  # fmt: skip
    found = load_map(again)
    assert again.profile().exchange_s == found.base.exchange_s == 0.25
    assert found.base.link.delay_s == conditions_of(job, int8_ratio=1.0).link.delay_s
    on_menu = [c for c in again.candidates() if c.plan.number in {plan.number for plan in again.manifest.menu}]
    for rate_bps, edge_load in ((found.rates_bps[3], 1.0), (found.rates_bps[-1], 4.0)):
        best = search(on_menu, loaded(found.base, rate_bps, edge_load, 2.0), built_goal(again.manifest)).best
        assert found.at(rate_bps, edge_load=edge_load, device_load=2.0) == on_menu[best].plan.number
    (again.folder / "map.json").write_text("{}")
    with pytest.raises(BundleError, match="map.json"):
        load_map(Bundle(again.folder, again.manifest, again.digest))


def test_the_reference_is_the_network_itself(built: Bundle) -> None:
    reference = next(c for c in built.candidates() if c.plan.number == built.manifest.reference_plan)
    assert (reference.plan.kind, reference.plan.precision) == ("device", "fp32")
    assert reference.evidence.loss_points == 0.0
    assert built.manifest.reference_accuracy > 85


def test_reported_evidence_is_what_the_files_give(built: Bundle) -> None:
    images = load_source("digits").drawn("test", 200)
    known = {c.plan.number: c for c in built.candidates()}
    for plan in built.manifest.menu:
        again = evaluate_plan(built, plan.number, images, threads=1)
        reported = known[plan.number].reported
        assert reported is not None
        assert (again.accuracy, again.loss_points) == (reported.accuracy, reported.loss_points)
        assert again.payload_bytes == reported.payload_bytes
        sizes = Deployed(built.folder, plan, built.manifest.outputs).classify(images.pixels).num_bytes
        assert again.payload_bytes == pytest.approx(float(np.mean(sizes)))


def test_the_device_runs_its_plans_without_an_edge(built: Bundle) -> None:
    picture = load_source("digits").images("test").pixels[0]
    plan = built.plan(built.manifest.reference_plan)
    expected = Session(built.path(str(plan.head))).run([picture[None]])[0]
    with Device(built, plan=plan.number) as device:
        answer = device.infer(picture)
    assert answer.answered == "device"
    assert np.array_equal(np.asarray(answer.outputs[0]).ravel(), expected.ravel())


def test_a_profile_covers_the_menu_and_prices_it(built: Bundle) -> None:
    profile = profile_bundle(built, repeats=3)
    names = {n for plan in built.manifest.menu for n in (plan.head, plan.tail) if n is not None}
    assert set(profile.segments) == names
    assert set(profile.codecs) == {str(plan.number) for plan in built.manifest.menu if plan.codec is not None}


def test_a_slow_link_keeps_everything_on_the_device(built: Bundle) -> None:
    candidates = built.candidates()
    slow = Conditions(link=Link(rate_bps=100.0), device=Slowdown(fp32=1, int8=1))
    assert candidates[search(candidates, slow, Goal()).best].plan.kind == "device"
    assert set(baselines(candidates, slow, Goal())) == {"device", "upload", "split"}


def test_other_plans_can_be_assembled_later(built: Bundle, tmp_path: Path) -> None:
    work = built.folder.with_name("bundle.work")
    alive = [c.plan.number for c in built.candidates() if c.dropped is None]
    other = assemble(work, alive[-2:], tmp_path / "other")
    assert {p.number for p in other.manifest.menu} == {*alive[-2:], built.manifest.reference_plan}
    dropped = next(c.plan.number for c in built.candidates() if c.dropped is not None)
    with pytest.raises(PlanError, match=str(dropped)):
        assemble(work, [dropped], tmp_path / "none")
    with pytest.raises(BundleError, match="not a finished workshop"):
        assemble(tmp_path, [0], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pictures_of_another_size_are_refused(built: Bundle) -> None:
    images = load_source("digits").images("test")
    wrong = type(images)(images.pixels[:, :4], images.labels)
    with pytest.raises(DataError, match=r"\(8, 8, 1\)"):
        evaluate_plan(built, built.manifest.reference_plan, wrong)
    with pytest.raises(DataError, match="no images"):
        evaluate_plan(built, built.manifest.reference_plan, images.pick(slice(0)))
