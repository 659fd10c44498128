"""Shape arithmetic is replaced by what it gives."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coinfer.engine.onnx import Session
from coinfer.model.onnx_graph import save_atomically
from coinfer.model.onnx_shapes import pool_means, remove_unused, simplify_shapes


def model(nodes: list[onnx.NodeProto], constants: dict[str, list[int]], output: list[int | str]) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(np.array(value, np.int64), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def kinds(given: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in given.graph.node]


def run(given: onnx.ModelProto, folder: Path) -> np.ndarray:
    save_atomically(given, folder / "m.onnx")
    x = np.arange(3 * 6 * 16, dtype=np.float32).reshape(3, 6, 4, 4)
    answer: np.ndarray = Session(folder / "m.onnx").run((x,))[0]
    return answer


def simplified(given: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    """The model after both passes, which must not change what it gives."""
    before = run(given, folder)
    simplify_shapes(given)
    remove_unused(given)
    np.testing.assert_array_equal(run(given, folder), before)
    return given


RESHAPE = [
    helper.make_node("Shape", ["x"], ["s"]),
    helper.make_node("Gather", ["s", "zero"], ["n0"]),
    helper.make_node("Unsqueeze", ["n0", "axis"], ["n"]),
    helper.make_node("Gather", ["s", "one"], ["c0"]),
    helper.make_node("Mul", ["c0", "half_of_four"], ["c1"]),
    helper.make_node("Unsqueeze", ["c1", "axis"], ["c"]),
    helper.make_node("Slice", ["s", "two", "three"], ["h"]),
    helper.make_node("Concat", ["n", "c", "h", "two"], ["shape"], axis=0),
    helper.make_node("Reshape", ["x", "shape"], ["y"]),
]
NUMBERS = {"axis": [0], "two": [2], "three": [3]}


def test_a_computed_reshape_becomes_a_constant_one(tmp_path: Path) -> None:
    given = model(RESHAPE, NUMBERS, ["n", 12, 4, 2])
    for name, value in (("zero", 0), ("one", 1), ("half_of_four", 2)):
        given.graph.initializer.append(numpy_helper.from_array(np.array(value, np.int64), name))
    done = simplified(given, tmp_path)
    assert kinds(done) == ["Reshape"]
    assert numpy_helper.to_array(done.graph.initializer[0]).tolist() == [-1, 12, 4, 2]


def test_the_batch_beside_an_open_dimension_is_kept_as_it_is(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=0, end=1),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["x", "shape"], ["y"]),
    ]
    done = simplified(model(nodes, {"rest": [-1]}, ["n", 96]), tmp_path)
    assert kinds(done) == ["Reshape"]
    assert numpy_helper.to_array(done.graph.initializer[0]).tolist() == [0, -1]


def test_what_needs_the_batch_size_asks_the_one_node(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("Shape", ["r"], ["s"]),
        helper.make_node("Slice", ["s", "zero", "one"], ["n"]),
        helper.make_node("Concat", ["n", "rest"], ["shape"], axis=0),
        helper.make_node("Expand", ["token", "shape"], ["t"]),
        helper.make_node("Add", ["r", "t"], ["y"]),
    ]
    given = model(nodes, {"zero": [0], "one": [1], "rest": [6, 1, 1]}, ["n", 6, 4, 4])
    given.graph.initializer.append(numpy_helper.from_array(np.ones((1, 6, 1, 1), np.float32), "token"))
    done = simplified(given, tmp_path)
    assert kinds(done) == ["Shape", "Concat", "Relu", "Expand", "Add"]
    assert (list(done.graph.node[0].input), list(done.graph.node[0].output)) == (["x"], ["batch_size"])


def test_arithmetic_on_data_stays(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["i"], to=TensorProto.INT64),
        helper.make_node("ReduceMax", ["i"], ["m"], keepdims=0),
        helper.make_node("Cast", ["m"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["x", "f"], ["y"]),
    ]
    assert kinds(simplified(model(nodes, {}, ["n", 6, 4, 4]), tmp_path)) == ["Cast", "ReduceMax", "Cast", "Mul"]


@pytest.mark.parametrize(("keepdims", "left"), [(1, ["GlobalAveragePool"]), (0, ["GlobalAveragePool", "Squeeze"])])
def test_means_over_the_picture_are_pooling(keepdims: int, left: list[str], tmp_path: Path) -> None:
    nodes = [helper.make_node("ReduceMean", ["x", "axes"], ["y"], keepdims=keepdims, name="mean")]
    given = model(nodes, {"axes": [-1, 2]}, ["n", 6, 1, 1] if keepdims else ["n", 6])
    before = run(given, tmp_path)
    pool_means(given)
    remove_unused(given)
    assert kinds(given) == left
    np.testing.assert_allclose(run(given, tmp_path), before, rtol=1e-6)


def test_means_over_channels_stay(tmp_path: Path) -> None:
    given = model([helper.make_node("ReduceMean", ["x", "axes"], ["y"])], {"axes": [1, 2]}, ["n", 1, 1, 4])
    pool_means(given)
    assert kinds(given) == ["ReduceMean"]
