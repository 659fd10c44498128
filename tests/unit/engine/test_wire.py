"""Finding data outside an ONNX file, wherever a tensor may be, and in any bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.engine.wire import holds_external_data

onnx = pytest.importorskip("onnx", reason="making a segment needs the build extra")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402


def external(tensor: TensorProto) -> TensorProto:
    outside = TensorProto()
    outside.CopyFrom(tensor)
    outside.ClearField("raw_data")
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    outside.data_location = TensorProto.EXTERNAL
    return outside


INSIDE = numpy_helper.from_array(np.arange(500, dtype=np.float32), name="w")


def model_with(place: str, tensor: TensorProto) -> bytes:
    graph = helper.make_graph([], "g", [], [])
    functions = []
    if place == "initializer":
        graph.initializer.append(tensor)
    elif place == "sparse":
        graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, INSIDE, [500]))
    elif place == "constant":
        graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif place == "list":
        graph.node.append(helper.make_node("Own", [], ["c"], values=[INSIDE, tensor]))
    elif place == "subgraph":
        inner = helper.make_graph([], "inner", [], [], [tensor])
        graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    elif place == "function":
        node = helper.make_node("Constant", [], ["c"], value=tensor)
        functions.append(helper.make_function("d", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))
    return helper.make_model(graph, functions=functions).SerializeToString()


@pytest.mark.parametrize("place", ["initializer", "sparse", "constant", "list", "subgraph", "function"])
def test_a_tensor_outside_is_found_wherever_it_may_be(place: str) -> None:
    assert holds_external_data(model_with(place, external(INSIDE)))
    assert not holds_external_data(model_with(place, INSIDE))


def test_either_sign_of_an_outside_tensor_is_enough() -> None:
    for field in ("external_data", "data_location"):
        tensor = external(INSIDE)
        tensor.ClearField(field)
        assert holds_external_data(model_with("initializer", tensor))


def test_a_location_in_a_longer_varint_than_needed_is_found() -> None:
    """Protocol Buffers allow 1 as 81 00; 14 << 3 is the key of data_location."""
    tensor = bytes([14 << 3, 0x81, 0x00])
    graph = bytes([5 << 3 | 2, len(tensor)]) + tensor
    assert holds_external_data(bytes([7 << 3 | 2, len(graph)]) + graph)


def test_the_words_alone_are_no_sign() -> None:
    tensor = numpy_helper.from_array(np.frombuffer(b"location external_data  ", np.uint8), name="location")
    assert not holds_external_data(model_with("initializer", tensor))


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(raw: bytes) -> None:
    assert holds_external_data(raw) in (True, False)


@given(st.data())
def test_a_broken_model_is_answered(data: st.DataObject) -> None:
    raw = model_with("subgraph", INSIDE)
    start = data.draw(st.integers(0, len(raw)))
    broken = raw[:start] + data.draw(st.binary(max_size=6)) + raw[start + data.draw(st.integers(0, 6)) :]
    assert holds_external_data(broken) in (True, False)
