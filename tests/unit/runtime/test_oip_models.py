"""Which models are offered of a menu."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle, load_bundle, write_manifest
from coinfer.engine.segments import Segments
from coinfer.engine.sides import run_batch
from coinfer.plan import Candidate, CodecSpec, Evidence, Plan
from coinfer.runtime.oip_models import Model, offered
from tiny_bundle import DEVICE, EXITS, MENU, UPLOAD, UPLOAD_EXITS, make_tiny_bundle, pictures


def models_of(bundle: Bundle) -> dict[str, Model]:
    return offered(bundle, Segments(bundle.path, bundle.manifest.outputs))


def upload(number: int, tail: str, coder: str = "png", quality: int | None = None) -> Plan:
    codec = CodecSpec(transform="image", coder=coder, quality=quality)  # type: ignore[arg-type]
    return msgspec.structs.replace(MENU[UPLOAD], number=number, variant=f"net {tail}", tail=tail, codec=codec)


def with_accuracies(bundle: Bundle, accuracies: dict[int, float]) -> Bundle:
    """The same bundle with evidence of these plans."""
    evidence = Evidence(
        split="validation", num_images=100, accuracy=0.0, accuracy_ci=0.0, loss_points=0.0, loss_ci_points=0.0,
        payload_bytes=1.0, payload_bytes_p95=1.0, reply_bytes=1.0, head_s=0.0, encode_s=0.0, decode_s=0.0, tail_s=0.0,
    )  # fmt: skip
    candidates = [
        Candidate(plan=plan, evidence=msgspec.structs.replace(evidence, accuracy=accuracies[plan.number]))
        for plan in bundle.manifest.menu
        if plan.number in accuracies
    ]
    (bundle.folder / "evidence.json").write_bytes(msgspec.json.encode(candidates))
    write_manifest(bundle.folder, bundle.manifest)
    return load_bundle(bundle.folder)


WHOLE, OTHER = "segments/whole.onnx", "segments/other.onnx"


@pytest.fixture
def two_networks(tmp_path: Path) -> Bundle:
    """Upload plans 1 and 5 serve one network, 7 and 8 another; 7 and 8 take files."""
    menu = (*MENU, upload(7, OTHER), upload(8, OTHER, "jpeg-bare", 90))
    bundle = make_tiny_bundle(tmp_path / "two", menu=MENU)
    other = make_tiny_bundle(tmp_path / "other", seed=9)
    (bundle.folder / OTHER).write_bytes(other.path(WHOLE).read_bytes())
    write_manifest(bundle.folder, msgspec.structs.replace(bundle.manifest, menu=menu))
    return load_bundle(bundle.folder)


def test_without_evidence_the_first_upload_plan_has_the_models_name(two_networks: Bundle) -> None:
    found = models_of(two_networks)
    assert {name: model.plan.number for name, model in found.items()} == {
        "tiny": UPLOAD, "tiny.plan7": 7, "tiny.plan7.png": 7, "tiny.plan8.jpeg": 8,
    }  # fmt: skip
    assert found["tiny"].accuracy is None


def test_the_most_accurate_upload_plan_has_the_models_name(two_networks: Bundle) -> None:
    bundle = with_accuracies(two_networks, {UPLOAD: 90.0, 5: 90.5, 7: 91.0, 8: 92.0, DEVICE: 99.0})
    found = models_of(bundle)
    assert {name: model.plan.number for name, model in found.items()} == {
        "tiny": 8, "tiny.plan5": 5, "tiny.plan7.png": 7, "tiny.plan8.jpeg": 8,
    }  # fmt: skip
    assert found["tiny"].accuracy == 92.0
    metadata = found["tiny"].metadata()["parameters"]
    assert metadata == {
        "plan": 8, "variant": f"net {OTHER}", "precision": "fp32", "takes": "tensors",
        "accuracy_percent": 92.0, "is_most_accurate": True,
    }  # fmt: skip
    assert found["tiny.plan7.png"].metadata()["parameters"]["takes"] == "png files"
    assert not found["tiny.plan5"].is_best


def test_where_nothing_is_uploaded_the_device_plans_stand_in(tmp_path: Path) -> None:
    menu = tuple(plan for plan in MENU if plan.kind != "upload")
    bundle = make_tiny_bundle(tmp_path / "devices", menu=menu)
    segments = Segments(bundle.path, bundle.manifest.outputs)
    found = offered(bundle, segments)
    assert {name: model.plan.number for name, model in found.items()} == {"tiny": DEVICE}
    plan, xs = found["tiny"].plan, pictures(3)
    assert plan.kind == "upload" and plan.top is None
    answers = run_batch(plan, "edge", segments, [xs])
    expected = segments.head(bundle.plan(DEVICE)).run((xs,))[0]
    np.testing.assert_array_equal(np.concatenate([answer.values[0] for answer in answers]), expected)


def test_a_network_with_exits_is_one_of_its_own_and_its_second(exit_bundle: Bundle) -> None:
    found = models_of(exit_bundle)
    numbers = [model.plan.number for model in found.values()]
    assert numbers[0] == UPLOAD and UPLOAD_EXITS in numbers
    assert found[f"tiny.plan{UPLOAD_EXITS}"].plan.exits == exit_bundle.plan(UPLOAD_EXITS).exits


def test_a_device_plans_exits_are_the_edges_when_it_stands_in(tmp_path: Path) -> None:
    menu = (MENU[DEVICE], *(plan for plan in EXITS if plan.kind == "device"))
    bundle = make_tiny_bundle(tmp_path / "exits", menu=menu)
    segments = Segments(bundle.path, bundle.manifest.outputs)
    found = offered(bundle, segments)
    assert [model.plan.number for model in found.values()] == [DEVICE, 7]
    xs = pictures(40)
    answers = run_batch(found["tiny.plan7"].plan, "edge", segments, [xs])
    by_device = run_batch(bundle.plan(7), "device", segments, [xs])
    assert {answer.exit for answer in answers} == {None, 0}
    for mine, theirs in zip(answers, by_device, strict=True):
        assert mine.exit == theirs.exit
        np.testing.assert_array_equal(mine.values[0], theirs.values[0])
