"""Exported networks and their segments against torch, value by value."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from coinfer.engine.onnx import Session
from coinfer.errors import CaptureError, CutError, EngineError
from coinfer.model import export
from coinfer.model.cut import split
from coinfer.model.export import Whole, cut_onnx, export_onnx, load_whole
from coinfer.model.graph import Graph, capture, tensors_in
from coinfer.plan import Preprocess, TensorSpec
from tiny_nets import PREPROCESS, TINY, ByNumpy, Chain, TwoInputs, make, pictures, scaled

EXPORTED = ("residual", "transformer")


def worst(wanted: object, got: object) -> float:
    """The largest difference, in units of the largest magnitude."""
    pairs = zip(tensors_in(wanted), tensors_in(got), strict=True)
    return max(float((a - b).abs().max() / a.abs().max()) for a, b in pairs)


def run(path: Path, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    return Session(path).run(arrays)


def sample(whole: Whole, count: int) -> tuple[np.ndarray, torch.Tensor]:
    """What an exported network takes, and the same for the captured one."""
    if whole.input.dtype == "float32":
        return pictures(count).numpy(), pictures(count)
    pixels = np.random.default_rng(3).integers(0, 256, (count, *whole.input.shape), dtype=np.uint8)
    return pixels, scaled(pixels)


@torch.no_grad()
def check_cuts(graph: Graph, whole: Whole, folder: Path) -> None:
    """Every deployed cut, at batch 1 and 3: what crosses, and the answer."""
    head, tail = folder / "head.onnx", folder / "tail.onnx"
    assert len(whole.cuts) >= 4
    for cut in whole.cuts:
        cut_onnx(whole, cut.name, head=head, tail=tail)
        ours, theirs = split(graph, graph.cut(cut.name))
        for batch in (1, 3):
            given, x = sample(whole, batch)
            wanted = ours(x)
            crossing = run(head, (given,))
            assert worst(wanted, tuple(map(torch.from_numpy, crossing))) < 1e-4
            assert worst(theirs(*wanted), tuple(map(torch.from_numpy, run(tail, crossing)))) < 1e-4


@pytest.mark.parametrize("name", EXPORTED)
def test_head_and_tail_give_what_torch_gives(
    name: str, graphs: dict[str, Graph], wholes: dict[str, Whole], tmp_path: Path
) -> None:
    check_cuts(graphs[name], wholes[name], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(TINY) - set(EXPORTED)))
def test_other_heads_and_tails_too(name: str, graphs: dict[str, Graph], tmp_path: Path) -> None:
    whole = export_onnx(graphs[name], tmp_path / "whole.onnx")
    check_cuts(graphs[name], whole, tmp_path)


@pytest.mark.parametrize("name", EXPORTED)
def test_segments_state_their_inputs_and_outputs(name: str, wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes[name]
    cut = whole.cuts[len(whole.cuts) // 2]
    cut_onnx(whole, cut.name, head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
    head, tail = Session(tmp_path / "head.onnx"), Session(tmp_path / "tail.onnx")
    assert (head.inputs, head.outputs) == ((whole.input,), cut.specs)
    assert (tail.inputs, tail.outputs) == (cut.specs, whole.outputs)


def test_only_what_was_folded_is_no_cut(graphs: dict[str, Graph], wholes: dict[str, Whole]) -> None:
    deployed = [cut.name for cut in wholes["residual"].cuts]
    every = [cut.name for cut in graphs["residual"].cuts()]
    assert set(every) - set(deployed) == {
        "conv1#0",
        "layer1.0.conv1#0",
        "layer1.0.conv2#0",
        "layer2.0.conv1#0",
        "layer2.0.conv2#0",
    }
    assert deployed == [name for name in every if name in deployed]
    assert wholes["residual"].cut("layer1.0#0").compute_share == graphs["residual"].cut("layer1").compute_share


def test_batch_norms_are_folded(wholes: dict[str, Whole]) -> None:
    kinds = {node.op_type for node in onnx.load(wholes["residual"].path).graph.node}
    network = {"Conv", "Relu", "Add", "Slice", "Pad", "GlobalAveragePool", "Reshape", "Gemm"}
    assert kinds == network | {"Transpose", "Cast", "Mul", "Add"}


def test_a_tail_asks_what_crosses_for_the_batch_size(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["transformer"]
    cut = whole.cut("/transpose#0")
    cut_onnx(whole, cut.name, head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
    shapes = [node for node in onnx.load(tmp_path / "tail.onnx").graph.node if node.op_type == "Shape"]
    assert [list(node.input) for node in shapes] == [[cut.specs[0].name]]
    assert not [node for node in onnx.load(tmp_path / "head.onnx").graph.node if node.op_type == "Shape"]


def test_weights_are_divided(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = wholes["residual"]
    cut_onnx(whole, "layer1.0#0", head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
    names = [
        {tensor.name for tensor in onnx.load(path).graph.initializer if "folded" in tensor.name}
        for path in (tmp_path / "head.onnx", tmp_path / "tail.onnx", whole.path)
    ]
    assert not names[0] & names[1]
    assert names[0] | names[1] == names[2]
    assert len(names[0]) == 6 and len(names[1]) == 4


def test_preprocessing_takes_pictures(graphs: dict[str, Graph], wholes: dict[str, Whole]) -> None:
    whole = wholes["residual"]
    assert whole.input == TensorSpec(name="input", shape=(16, 16, 3), dtype="uint8")
    given, x = sample(whole, 2)
    with torch.no_grad():
        wanted = graphs["residual"].module(x)
    assert worst((wanted,), (torch.from_numpy(run(whole.path, (given,))[0]),)) < 1e-5


@pytest.mark.slow
def test_several_inputs(tmp_path: Path) -> None:
    graph = capture(make(TwoInputs), (torch.zeros(1, 4), torch.zeros(1, 4)))
    whole = export_onnx(graph, tmp_path / "two.onnx")
    assert [whole.input.name, *(spec.name for spec in whole.more_inputs)] == ["x", "y"]
    cut_onnx(whole, "a#0", head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
    x, y = torch.randn(2, 4), torch.randn(2, 4)
    got = run(tmp_path / "tail.onnx", run(tmp_path / "head.onnx", (x.numpy(), y.numpy())))
    assert worst((graph.module(x, y)[0].detach(),), (torch.from_numpy(got[0]),)) < 1e-5


def test_the_record_is_beside_the_file(wholes: dict[str, Whole]) -> None:
    whole = wholes["residual"]
    record = whole.path.with_name("residual.fp32.json")
    assert load_whole(whole.path) == whole
    assert msgspec.json.decode(record.read_bytes())["path"] == "residual.fp32.onnx"


def test_files_do_not_tell_where_they_were_made(wholes: dict[str, Whole]) -> None:
    for whole in wholes.values():
        content = whole.path.read_bytes() + whole.path.with_suffix(".json").read_bytes()
        assert b".py" not in content and str(whole.path.parent).encode() not in content


def test_nothing_but_file_and_record_is_left(wholes: dict[str, Whole]) -> None:
    folder = wholes["residual"].path.parent
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        f"{name}.fp32.{suffix}" for name in EXPORTED for suffix in ("json", "onnx")
    )


def test_a_network_that_exports_wrongly_is_refused(
    graphs: dict[str, Graph], wholes: dict[str, Whole], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = onnx.load(wholes["transformer"].path)
    weight = next(tensor for tensor in model.graph.initializer if list(tensor.dims) == [8, 3, 8, 8])
    changed = numpy_helper.to_array(weight) * 1.1
    weight.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), weight.name))
    names = {spec.name: spec.name for spec in (*graphs["transformer"].inputs, *graphs["transformer"].outputs)}
    monkeypatch.setattr(export, "_translate", lambda graph, folded: (model, names))
    with pytest.raises(EngineError, match=r'gives another value "\w+" than the captured one: off by .* allowed is'):
        export_onnx(graphs["transformer"], tmp_path / "wrong.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_onnx_does_not_know_is_refused(tmp_path: Path) -> None:
    graph = capture(make(ByNumpy), torch.zeros(1, 4))
    with pytest.raises(CaptureError, match="cannot export this network, captured by fx, to ONNX: "):
        export_onnx(graph, tmp_path / "numpy.onnx")


def test_preprocessing_must_fit(graphs: dict[str, Graph], tmp_path: Path) -> None:
    grey = Preprocess(mean=(0.5,), std=(0.5,))
    with pytest.raises(CaptureError, match=r'preprocessing of 1 channels needs one input \(1, H, W\), got 1 with "x"'):
        export_onnx(graphs["chain"], tmp_path / "grey.onnx", preprocess=grey)


def test_an_unknown_cut_is_refused(wholes: dict[str, Whole], tmp_path: Path) -> None:
    with pytest.raises(CutError, match=r'"conv1#0" is none of the 17 cuts of residual.fp32.onnx in fp32'):
        cut_onnx(wholes["residual"], "conv1#0", head=tmp_path / "h", tail=tmp_path / "t")


def test_a_record_that_is_missing_or_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="no file .*none.onnx: give an ONNX file that coinfer exported"):
        load_whole(tmp_path / "none.onnx")
    (tmp_path / "x.onnx").write_bytes(b"")
    (tmp_path / "x.json").write_text('{"path": 3}')
    with pytest.raises(EngineError, match=r"x.json is not the record of an exported network"):
        load_whole(tmp_path / "x.onnx")


def test_a_file_that_is_gone_or_no_onnx_is_refused(wholes: dict[str, Whole], tmp_path: Path) -> None:
    whole = msgspec.structs.replace(wholes["residual"], path=tmp_path / "gone.onnx")
    with pytest.raises(EngineError, match="cannot read .*gone.onnx: No such file"):
        cut_onnx(whole, "layer1.0#0", head=tmp_path / "h", tail=tmp_path / "t")
    (tmp_path / "gone.onnx").write_bytes(b"not a network")
    with pytest.raises(EngineError, match="gone.onnx is not an ONNX file"):
        cut_onnx(whole, "layer1.0#0", head=tmp_path / "h", tail=tmp_path / "t")
    assert not (tmp_path / "h").exists()


def test_a_folder_that_is_not_there_is_named(graphs: dict[str, Graph], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="cannot write .*x.onnx: there is no folder .*missing"):
        export_onnx(graphs["chain"], tmp_path / "missing" / "x.onnx")


@pytest.mark.slow
def test_an_input_that_is_called_input_gives_way(tmp_path: Path) -> None:
    class Named(Chain):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input)

    graph = capture(make(Named), pictures(1))
    whole = export_onnx(graph, tmp_path / "named.onnx", preprocess=PREPROCESS)
    assert whole.input.name == "input" and Session(whole.path).inputs == (whole.input,)
