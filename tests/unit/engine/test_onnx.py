"""Sessions: what they compute, what they refuse, and that they keep to the file they were given."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from coinfer.engine import Session
from coinfer.errors import EngineError
from coinfer.plan import TensorSpec

onnx = pytest.importorskip("onnx", reason="making a segment needs the build extra")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def write(path: Path, nodes: list, inputs: list, outputs: list, weights: dict[str, np.ndarray] | None = None) -> Path:
    graph = helper.make_graph(
        nodes, "g", inputs, outputs, [numpy_helper.from_array(a, name=n) for n, a in (weights or {}).items()]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, path)
    return path


def value(name: str, *shape: int | str, kind: int = TensorProto.FLOAT) -> object:
    return helper.make_tensor_value_info(name, kind, list(shape))


@pytest.fixture
def affine(tmp_path: Path) -> Path:
    """y = x @ w, z = y + 1, for x (N, 3)."""
    weights = {"w": np.arange(6, dtype=np.float32).reshape(3, 2), "one": np.ones(1, np.float32)}
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"]), helper.make_node("Add", ["y", "one"], ["z"])]
    return write(
        tmp_path / "affine.onnx", nodes, [value("x", "N", 3)], [value("y", "N", 2), value("z", "N", 2)], weights
    )


def test_outputs_come_in_order_for_any_batch(affine: Path) -> None:
    session = Session(affine)
    assert session.inputs == (TensorSpec(name="x", shape=(3,)),)
    assert session.outputs == (TensorSpec(name="y", shape=(2,)), TensorSpec(name="z", shape=(2,)))
    for count in (1, 2, 7):
        x = np.arange(3 * count, dtype=np.float32).reshape(count, 3)
        y, z = session.run([x])
        np.testing.assert_array_equal(y, x @ np.arange(6, dtype=np.float32).reshape(3, 2))
        np.testing.assert_array_equal(z, y + 1)


def test_other_types_and_several_inputs(tmp_path: Path) -> None:
    nodes = [helper.make_node("Cast", ["a"], ["c"], to=TensorProto.INT64), helper.make_node("Add", ["c", "b"], ["s"])]
    inputs = [value("a", 1, 2, 2, kind=TensorProto.UINT8), value("b", 1, 2, 2, kind=TensorProto.INT64)]
    session = Session(write(tmp_path / "m.onnx", nodes, inputs, [value("s", 1, 2, 2, kind=TensorProto.INT64)]))
    assert [spec.dtype for spec in (*session.inputs, *session.outputs)] == ["uint8", "int64", "int64"]
    (total,) = session.run([np.full((1, 2, 2), 200, np.uint8), np.full((1, 2, 2), 100)])
    assert (total == 300).all()


def test_a_sum_of_convolutions_of_which_one_is_an_output(tmp_path: Path) -> None:
    """ONNX Runtime alone fuses the biased one away and fails: of 18 channels, which are not whole blocks of its own."""
    bias = np.linspace(-2000, 300, 8).astype(np.int64).astype(np.float32)
    weights = {"w": np.full((8, 18, 1, 1), 2, np.float32), "bias": bias, "v": np.ones((8, 18, 1, 1), np.float32)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "bias"], ["y"]),
        helper.make_node("Conv", ["x", "v"], ["u"]),
        helper.make_node("Add", ["y", "u"], ["sum"]),
        helper.make_node("Relu", ["sum"], ["z"]),
    ]
    inputs, outputs = [value("x", "N", 18, 4, 4)], [value("y", "N", 8, 4, 4), value("z", "N", 8, 4, 4)]
    x = (np.arange(2 * 18 * 16) % 19).astype(np.float32).reshape(2, 18, 4, 4)
    y, z = Session(write(tmp_path / "m.onnx", nodes, inputs, outputs, weights)).run([x])
    total = x.sum(1, keepdims=True)
    np.testing.assert_array_equal(y, 2 * total + bias.reshape(8, 1, 1))
    np.testing.assert_array_equal(z, np.maximum(y + total, 0))


def test_an_output_of_unknown_shape_is_measured(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "to"], ["y"])]
    path = write(tmp_path / "m.onnx", nodes, [value("x", "N", 4), value("to", "K", kind=TensorProto.INT64)], [])
    graph = onnx.load(path)
    graph.graph.input.pop()
    graph.graph.initializer.append(numpy_helper.from_array(np.array([-1, 2, 2]), name="to"))
    graph.graph.output.append(value("y", "N", "p", "q"))
    onnx.save(graph, path)
    assert Session(path).outputs == (TensorSpec(name="y", shape=(2, 2)),)


def test_several_threads_may_run_one_session(affine: Path) -> None:
    session = Session(affine, threads=2)
    x = np.random.default_rng(0).random((5, 3), dtype=np.float32)
    expected = session.run([x])[1]
    seen: list[np.ndarray] = []
    threads = [threading.Thread(target=lambda: seen.append(session.run([x])[1])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 8
    for one in seen:
        np.testing.assert_array_equal(one, expected)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ([], r"1 arrays are needed, got 0 \(segment affine.onnx\)"),
        ([np.zeros((1, 3), np.float32)] * 2, "1 arrays are needed, got 2"),
        ([np.zeros((1, 4), np.float32)], r'"x" must be float32 \(N, 3\), got float32 \(1, 4\) \(segment affine.onnx\)'),
        ([np.zeros(3, np.float32)], r"got float32 \(3\)"),
        ([np.float32(3)[()] * np.ones((), np.float32)], r"got float32 \(\)"),
        ([np.zeros((1, 3))], r"got float64 \(1, 3\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(affine: Path, arrays: list[np.ndarray], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        Session(affine).run(arrays)


def test_a_failure_within_the_segment_is_one_line_with_the_file(tmp_path: Path) -> None:
    nodes = [helper.make_node("Gather", ["table", "i"], ["y"])]
    path = write(
        tmp_path / "gather.onnx",
        nodes,
        [value("i", "N", kind=TensorProto.INT64)],
        [value("y", "N")],
        {"table": np.ones(4, np.float32)},
    )
    session = Session(path)
    with pytest.raises(EngineError, match=r"indices element out of data bounds.*\(segment gather.onnx\)") as caught:
        session.run([np.array([9])])
    assert "\n" not in str(caught.value)


def test_weights_outside_the_file_are_refused(affine: Path) -> None:
    path = affine.with_name("external.onnx")
    model = onnx.load(affine)
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=0)
    assert (affine.parent / "w.bin").exists()
    with pytest.raises(EngineError, match=r"weights outside itself.*external.onnx"):
        Session(path)


@pytest.mark.parametrize(
    ("domain", "operator", "message"), [("", "Nope", "does not load"), ("some.where", "Own", "uses custom operators")]
)
def test_unknown_operators_are_refused(tmp_path: Path, domain: str, operator: str, message: str) -> None:
    graph = helper.make_graph(
        [helper.make_node(operator, ["x"], ["y"], domain=domain)], "g", [value("x", 1, 2)], [value("y", 1, 2)]
    )
    imports = [helper.make_opsetid(name, 1 if name else 17) for name in {"", domain}]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), tmp_path / "odd.onnx")
    with pytest.raises(EngineError, match=f"{message}.*odd.onnx") as caught:
        Session(tmp_path / "odd.onnx")
    assert "\n" not in str(caught.value)


def test_files_that_are_no_segments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"cannot be read.*gone.onnx"):
        Session(tmp_path / "gone.onnx")
    for raw in (b"", b"\xff" * 200, bytes(200)):
        (tmp_path / "noise.onnx").write_bytes(raw)
        with pytest.raises(EngineError, match=r"noise.onnx"):
            Session(tmp_path / "noise.onnx")


def test_inputs_without_a_fixed_shape_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Relu", ["x"], ["y"])]
    path = write(tmp_path / "free.onnx", nodes, [value("x", "N", "H")], [value("y", "N", "H")])
    with pytest.raises(EngineError, match=r'"x" must have a batch dimension and a fixed shape.*free.onnx'):
        Session(path)


def test_types_that_cannot_cross_are_refused(tmp_path: Path) -> None:
    nodes = [helper.make_node("Identity", ["x"], ["y"])]
    shapes = ([value("x", 1, 2, kind=TensorProto.STRING)], [value("y", 1, 2, kind=TensorProto.STRING)])
    with pytest.raises(EngineError, match=r"tensor\(string\), allowed: tensor\(float\)"):
        Session(write(tmp_path / "text.onnx", nodes, *shapes))


def test_threads_must_be_at_least_1(affine: Path) -> None:
    with pytest.raises(EngineError, match="threads must be at least 1, got 0"):
        Session(affine, threads=0)
