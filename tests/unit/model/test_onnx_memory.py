"""Memory of segments, counted by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from coinfer.model.onnx_memory import memory_of, memory_of_all


def write(path: Path) -> Path:
    """x (4) -> a = relu x (4) -> b = a + a (4); c = mean of b (1); d = b * c (4): at most x, a or a, b or b, c, d."""
    nodes = [
        helper.make_node("Relu", ["x"], ["a"]),
        helper.make_node("Add", ["a", "w"], ["b"]),
        helper.make_node("ReduceMean", ["b"], ["c"], axes=[1], keepdims=1),
        helper.make_node("Mul", ["b", "c"], ["d"]),
    ]
    weights = [numpy_helper.from_array(np.zeros((1, 4), np.float32), "w")]
    x, d = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 4]) for name in ("x", "d"))
    graph = helper.make_graph(nodes, "tiny", [x], [d], weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


def test_weights_and_the_most_that_lives_at_once(tmp_path: Path) -> None:
    found = memory_of(write(tmp_path / "tiny.onnx"))
    # Four floats of weights; b, c and d together are nine floats.
    assert found == (16, 36)


def test_segments_that_take_turns_share_the_room_of_their_values(tmp_path: Path) -> None:
    path = write(tmp_path / "tiny.onnx")
    assert memory_of_all([path, path]) == 2 * 16 + 36
    assert memory_of_all([]) == 0


def test_codes_count_and_what_is_taken_back_from_them_does_not(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
        helper.make_node("Relu", ["y"], ["d"]),
    ]
    numbers = [numpy_helper.from_array(np.float32(0.1), "s"), numpy_helper.from_array(np.uint8(3), "z")]
    x, d = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 100]) for name in ("x", "d"))
    graph = helper.make_graph(nodes, "codes", [x], [d], numbers)
    path = tmp_path / "codes.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    # x and its codes, then the codes and the output: 500 B each way; a scale and a zero point.
    assert memory_of(path) == (5, 500)
