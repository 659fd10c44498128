"""A real bundle without torch: two convolutions and a classifier on 8 x 8 pictures, made with onnx.helper.

    input (8, 8, 3) uint8 -> r = relu(conv(input)) -> s = conv(r) -> logits (5,) of the mean of r + s

Cut "early#0" crosses r, cut "late#0" crosses r and s (its head gives them in the other order, as an
exporter may), cut "sum#0" crosses r + s.  EXITS are more plans, with classifiers of the means of r and of r + s.
"""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from coinfer.bundle import FORMAT, Bundle, Manifest, load_bundle, new_folder, write_manifest
from coinfer.plan import Candidate, CodecSpec, Evidence, Exit, ExitRule, Plan, Preprocess, Side, TensorSpec
from coinfer.profile import Conditions, Link, Machine, Profile
from coinfer.search.goal import Goal
from coinfer.search.planmap import plan_map

PICTURE = (8, 8, 3)
CLASSES = 5
INPUT = TensorSpec(name="input", shape=PICTURE, dtype="uint8")
OUTPUTS = (TensorSpec(name="logits", shape=(CLASSES,)),)
R = TensorSpec(name="r", shape=(4, 8, 8))
S = TensorSpec(name="s", shape=(4, 8, 8))
SUM = TensorSpec(name="sum", shape=(4, 8, 8))

DEVICE, UPLOAD, SPLIT32, SPLIT16, SPLIT_TWO, UPLOAD_TOP, DEVICE_TOP = range(7)

_FLOAT32 = CodecSpec(transform="float32")
_RAW = CodecSpec(transform="image")
MENU = (
    Plan(number=DEVICE, kind="device", variant="tiny", head="segments/whole.onnx"),
    Plan(
        number=UPLOAD,
        kind="upload",
        variant="tiny",
        tail="segments/whole.onnx",
        codec=_RAW,
        crossing=(INPUT,),
    ),
    Plan(
        number=SPLIT32,
        kind="split",
        variant="tiny",
        cut="early#0",
        codec=_FLOAT32,
        crossing=(R,),
        head="segments/early.head.onnx",
        tail="segments/early.tail.onnx",
    ),
    Plan(
        number=SPLIT16,
        kind="split",
        variant="tiny",
        cut="early#0",
        codec=CodecSpec(transform="float16"),
        crossing=(R,),
        head="segments/early.head.onnx",
        tail="segments/early.tail.onnx",
    ),
    Plan(
        number=SPLIT_TWO,
        kind="split",
        variant="tiny",
        cut="late#0",
        codec=_FLOAT32,
        crossing=(R, S),
        head="segments/late.head.onnx",
        tail="segments/late.tail.onnx",
    ),
    Plan(
        number=UPLOAD_TOP,
        kind="upload",
        variant="tiny",
        tail="segments/whole.onnx",
        codec=_RAW,
        crossing=(INPUT,),
        top=3,
    ),
    Plan(number=DEVICE_TOP, kind="device", variant="tiny", head="segments/whole.onnx", top=3),
)


def exit_at(side: Side, cut: str, rest: str | None, threshold: float) -> Exit:
    """An exit at "early#0" or "sum#0"; `rest` names the segment behind it."""
    stem = cut.removesuffix("#0")
    return Exit(
        side=side,
        cut=cut,
        value=R if stem == "early" else SUM,
        classifier=f"segments/{stem}.exit.onnx",
        rest=None if rest is None else f"segments/{rest}.onnx",
        rule=ExitRule(threshold=threshold),
    )


# For arithmetic alone: no files of it exist.
EXIT_PLAN = Plan(
    number=1, kind="split", variant="n", cut="late#0", codec=CodecSpec(transform="float32"), head="a", tail="t",
    exits=(exit_at("device", "early#0", "b", 0.5), exit_at("edge", "sum#0", "u", 0.5)),
)  # fmt: skip
SECONDS = {
    "a": 3.0, "segments/early.exit.onnx": 1.0, "segments/b.onnx": 4.0,
    "t": 2.0, "segments/sum.exit.onnx": 0.5, "segments/u.onnx": 8.0,
}  # fmt: skip

DEVICE_EXIT, SPLIT_EXIT, SPLIT_AT_EXIT, UPLOAD_EXITS, SPLIT_EXITS, UPLOAD_EXIT_TOP, DEVICE_EXIT_TOP = range(7, 14)
# Of noise, about half are at least so sure at the exit behind r, and at the one behind r + s.
SURE_R, SURE_SUM = 0.859, 0.403
EXITS = (
    Plan(
        number=DEVICE_EXIT,
        kind="device",
        variant="tiny",
        head="segments/early.head.onnx",
        exits=(exit_at("device", "early#0", "early.tail", SURE_R),),
    ),
    Plan(
        number=SPLIT_EXIT,
        kind="split",
        variant="tiny",
        cut="late#0",
        codec=_FLOAT32,
        crossing=(R, S),
        head="segments/early.head.onnx",
        tail="segments/late.tail.onnx",
        exits=(exit_at("device", "early#0", "early.late", SURE_R),),
    ),
    Plan(
        number=SPLIT_AT_EXIT,
        kind="split",
        variant="tiny",
        cut="early#0",
        codec=_FLOAT32,
        crossing=(R,),
        head="segments/early.head.onnx",
        tail="segments/early.tail.onnx",
        exits=(exit_at("device", "early#0", None, SURE_R),),
    ),
    Plan(
        number=UPLOAD_EXITS,
        kind="upload",
        variant="tiny",
        codec=_RAW,
        crossing=(INPUT,),
        tail="segments/early.head.onnx",
        exits=(exit_at("edge", "early#0", "early.sum", SURE_R), exit_at("edge", "sum#0", "sum.tail", SURE_SUM)),
    ),
    Plan(
        number=SPLIT_EXITS,
        kind="split",
        variant="tiny",
        cut="early#0",
        codec=_FLOAT32,
        crossing=(R,),
        head="segments/early.head.onnx",
        tail="segments/early.sum.onnx",
        exits=(exit_at("device", "early#0", None, SURE_R), exit_at("edge", "sum#0", "sum.tail", SURE_SUM)),
    ),
    Plan(
        number=UPLOAD_EXIT_TOP,
        kind="upload",
        variant="tiny",
        codec=_RAW,
        crossing=(INPUT,),
        tail="segments/early.head.onnx",
        exits=(exit_at("edge", "early#0", "early.tail", SURE_R),),
        top=2,
    ),
    Plan(
        number=DEVICE_EXIT_TOP,
        kind="device",
        variant="tiny",
        head="segments/early.head.onnx",
        exits=(exit_at("device", "early#0", "early.tail", SURE_R),),
        top=2,
    ),
)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    kind = TensorProto.UINT8 if spec.dtype == "uint8" else TensorProto.FLOAT
    return helper.make_tensor_value_info(spec.name, kind, ["N", *spec.shape])


def _save(path: Path, nodes: list[onnx.NodeProto], ins: list[TensorSpec], outs: list[TensorSpec], seed: int) -> None:
    random = np.random.default_rng(seed)
    weights = {
        "w1": random.standard_normal((4, 3, 3, 3)) / 255,
        "w2": random.standard_normal((4, 4, 3, 3)) / 6,
        "w3": random.standard_normal((4, CLASSES)),
        "b3": random.standard_normal(CLASSES),
        "w4": random.standard_normal((4, CLASSES)) * 2,
        "w5": random.standard_normal((4, CLASSES)),
    }
    used = {name for node in nodes for name in node.input}
    initializers = [
        numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items() if name in used
    ]
    graph = helper.make_graph(nodes, "tiny", [_value(s) for s in ins], [_value(s) for s in outs], initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    path.parent.mkdir(exist_ok=True)
    onnx.save(model, path)


def _segments(folder: Path, seed: int) -> None:
    early = [
        helper.make_node("Cast", ["input"], ["float"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["float"], ["planes"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["planes", "w1"], ["c"], pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c"], ["r"]),
    ]
    late = [helper.make_node("Conv", ["r", "w2"], ["s"], pads=[1, 1, 1, 1])]
    add = [helper.make_node("Add", ["r", "s"], ["sum"])]
    end = [
        helper.make_node("GlobalAveragePool", ["sum"], ["pooled"]),
        helper.make_node("Flatten", ["pooled"], ["flat"]),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"]),
    ]
    rest = add + end
    outs = list(OUTPUTS)
    _save(folder / "segments/whole.onnx", early + late + rest, [INPUT], outs, seed)
    _save(folder / "segments/early.head.onnx", early, [INPUT], [R], seed)
    _save(folder / "segments/early.tail.onnx", late + rest, [R], outs, seed)
    _save(folder / "segments/late.head.onnx", early + late, [INPUT], [S, R], seed)
    _save(folder / "segments/late.tail.onnx", rest, [S, R], outs, seed)
    _save(folder / "segments/early.late.onnx", late, [R], [S, R], seed)
    _save(folder / "segments/early.sum.onnx", late + add, [R], [SUM], seed)
    _save(folder / "segments/sum.tail.onnx", end, [SUM], outs, seed)
    for value, weights in ((R, "w4"), (SUM, "w5")):
        classify = [
            helper.make_node("GlobalAveragePool", [value.name], ["pooled"]),
            helper.make_node("Flatten", ["pooled"], ["flat"]),
            helper.make_node("Gemm", ["flat", weights], ["logits"]),
        ]
        stem = "early" if value is R else "sum"
        _save(folder / f"segments/{stem}.exit.onnx", classify, [value], outs, seed)


# Seconds of the device (head and encoding) and of the edge (decoding and tail), payload bytes, points of loss: made up
# so that the device alone is best on a slow link, a split on a faster one, the upload on a fast one.
EVIDENCE = {
    DEVICE: (0.040, 0.0, 0.0, 0.0),
    UPLOAD: (0.001, 0.002, 20_000.0, 0.0),
    SPLIT32: (0.010, 0.002, 2_000.0, 0.0),
    SPLIT16: (0.012, 0.002, 1_000.0, 0.1),
}
ASSUMED = Conditions(link=Link(rate_bps=1e6, delay_s=0.001))


def candidates(menu: tuple[Plan, ...] = MENU) -> list[Candidate]:
    """The plans of which EVIDENCE has something, with it."""
    found = []
    for plan in menu:
        if plan.number in EVIDENCE:
            device_s, edge_s, num_bytes, loss = EVIDENCE[plan.number]
            evidence = Evidence(
                split="validation", num_images=100, accuracy=90.0 - loss, accuracy_ci=1.0, loss_points=loss,
                loss_ci_points=1.0, payload_bytes=num_bytes, payload_bytes_p95=num_bytes,
                reply_bytes=20.0 * (edge_s > 0),
                head_s=device_s if plan.head else 0.0, encode_s=0.0 if plan.head else device_s,
                decode_s=0.0, tail_s=edge_s,
            )  # fmt: skip
            found.append(Candidate(plan=plan, evidence=evidence))
    return found


def make_tiny_bundle(
    folder: Path, *, seed: int = 0, menu: tuple[Plan, ...] = MENU, has_evidence: bool = False
) -> Bundle:
    """Write the bundle to `folder` and load it; another seed is another network.

    With `has_evidence` it has EVIDENCE, the map of plans that follows from it under ASSUMED, and a profile of no times.
    """
    with new_folder(folder) as temporary:
        _segments(temporary, seed)
        if has_evidence:
            known = candidates(menu)
            (temporary / "evidence.json").write_bytes(msgspec.json.encode(known))
            (temporary / "map.json").write_bytes(msgspec.json.encode(plan_map(known, Goal(), ASSUMED)))
            machine = Machine(name="here", processor="made up", cores=1, system="Linux", python="", versions={})
            profile = Profile(machine=machine, threads=1, date="2000-01-01", segments={}, codecs={})
            (temporary / "profile.json").write_bytes(msgspec.json.encode(profile))
        write_manifest(
            temporary,
            Manifest(
                format=FORMAT,
                coinfer="test",
                model="tiny",
                data="noise",
                created="2000-01-01T00:00:00+00:00",
                input=INPUT,
                outputs=OUTPUTS,
                preprocess=Preprocess(mean=(0.0,), std=(1.0,)),
                classes=tuple("abcde"),
                goal="latency",
                max_loss_points=1.0,
                reference_plan=DEVICE,
                reference_accuracy=1.0,
                is_agreement=False,
                int8_slowdown_ratio=1.0,
                cuts=("early#0", "late#0"),
                weights_sha256={},
                menu=menu,
                files={},
            ),
        )
    return load_bundle(folder)


def pictures(count: int, *, seed: int = 0) -> np.ndarray:
    """(count, 8, 8, 3) uint8 noise."""
    return np.random.default_rng(seed).integers(0, 256, (count, *PICTURE), dtype=np.uint8)
