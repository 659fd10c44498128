from __future__ import annotations

import itertools

import msgspec
import pytest

from coinfer.errors import PlanError
from coinfer.plan import Candidate, CodecSpec, Plan, TensorSpec
from tiny_bundle import exit_at

CODEC = CodecSpec(transform="uniform", bits=4, per_channel=True, coder="range")


def test_sizes_of_values():
    assert TensorSpec(name="x", shape=(16, 8, 8)).num_bytes == 4096
    assert TensorSpec(name="q", shape=(16, 8, 8), dtype="uint8").num_bytes == 1024
    assert TensorSpec(name="s", shape=(), dtype="int64").num_bytes == 8


def test_a_value_of_another_dtype_has_no_size():
    with pytest.raises(PlanError, match='got "complex64" .value "z".'):
        _ = TensorSpec(name="z", shape=(2,), dtype="complex64").num_bytes


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        (CodecSpec(transform="float32"), "float32-none"),
        (CodecSpec(transform="float16", coder="zstd"), "float16-zstd"),
        (CODEC, "uniform4c-range"),
        (CodecSpec(transform="uniform", bits=1, coder="zstd"), "uniform1-zstd"),
        (CodecSpec(transform="picture", coder="jpeg", quality=50), "picture-jpeg-q50"),
        (CodecSpec(transform="image"), "raw"),
        (CodecSpec(transform="image", coder="png"), "png"),
        (CodecSpec(transform="image", coder="jpeg-bare", quality=80), "jpeg-bare-q80"),
    ],
)
def test_codecs_have_a_canonical_name(spec, name):
    assert spec.name == name


PARTS = {"head": "head.onnx", "tail": "tail.onnx", "cut": "layer1#0", "codec": CODEC}
NEEDED = {"device": {"head"}, "upload": {"tail", "codec"}, "split": {"head", "tail", "cut", "codec"}}


@pytest.mark.parametrize("kind", ["device", "upload", "split"])
def test_a_plan_has_exactly_the_parts_of_its_kind(kind):
    for count in range(len(PARTS) + 1):
        for given in itertools.combinations(PARTS, count):
            fields = {"number": 3, "kind": kind, "variant": "net", **{name: PARTS[name] for name in given}}
            if set(given) == NEEDED[kind]:
                assert Plan(**fields).kind == kind
            else:
                with pytest.raises(PlanError, match=f"a {kind} plan has .* got .* .plan 3."):
                    Plan(**fields)


def test_labels_name_what_tells_plans_apart(trio):
    assert [candidate.plan.label for candidate in trio] == [
        "device net",
        "upload net png",
        "split net layer2#0 uniform2c-range",
    ]
    assert Plan(number=0, kind="device", variant="net", precision="int8", head="h").label == "device net int8"


def test_plans_and_evidence_survive_json(trio):
    for candidate in trio:
        assert msgspec.json.decode(msgspec.json.encode(candidate), type=Candidate) == candidate


def test_unknown_fields_and_changes_are_refused(trio):
    with pytest.raises(msgspec.ValidationError, match="unknown field `layer`"):
        msgspec.json.decode(b'{"number": 0, "kind": "device", "variant": "n", "head": "h", "layer": 3}', type=Plan)
    with pytest.raises(AttributeError, match="immutable"):
        trio[0].plan.number = 5
    with pytest.raises(TypeError):
        Plan(0, "device", "net")


def test_exits_come_in_order_and_where_the_plan_computes():
    here, there = exit_at("device", "early#0", "b", 0.5), exit_at("edge", "sum#0", "u", 0.5)
    plan = {"number": 1, "variant": "n"}
    split = {**plan, **PARTS, "kind": "split"}
    both = Plan(**split, exits=(here, there))
    assert both.exits_on("device") == (here,) and both.exits_on("edge") == (there,)
    assert both.segments == (
        *("head.onnx", "segments/early.exit.onnx", "segments/b.onnx"),
        *("tail.onnx", "segments/sum.exit.onnx", "segments/u.onnx"),
    )
    assert both.label.endswith("exits early#0 >= 0.5, sum#0 >= 0.5")
    with pytest.raises(PlanError, match="the device's first, got .'edge', 'device'."):
        Plan(**split, exits=(there, here))
    with pytest.raises(PlanError, match="a device plan's exits are where it computes"):
        Plan(**plan, kind="device", head="h", exits=(there,))
    with pytest.raises(PlanError, match="an upload|a upload plan's exits"):
        Plan(**plan, kind="upload", tail="t", codec=CODEC, exits=(here,))
    last = msgspec.structs.replace(here, rest=None)
    assert Plan(**split, exits=(last, there)).exits[0].rest is None
    for kind, parts in (("device", {"head": "h"}), ("split", PARTS)):
        wrong = (last, here) if kind == "split" else (last,)
        with pytest.raises(PlanError, match='has no rest, not "early#0"'):
            Plan(**plan, **parts, kind=kind, exits=wrong)
