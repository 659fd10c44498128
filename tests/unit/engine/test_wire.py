"""What an ONNX file may not hold, found wherever it may be, and in any bytes."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.engine.wire import DOMAINS, MAX_DEPTH, objection

onnx = pytest.importorskip("onnx", reason="making a segment needs the build extra")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

OUTSIDE, CUSTOM, MALFORMED = "refers to weights outside itself", "uses custom operators", "is no well-formed ONNX"


def external(tensor: TensorProto) -> TensorProto:
    outside = TensorProto()
    outside.CopyFrom(tensor)
    outside.ClearField("raw_data")
    entry = outside.external_data.add()
    entry.key, entry.value = "location", "/etc/passwd"
    outside.data_location = TensorProto.EXTERNAL
    return outside


INSIDE = numpy_helper.from_array(np.arange(500, dtype=np.float32), name="w")
PLACES = [
    "initializer", "sparse", "sparse attribute", "constant", "list", "subgraph", "function", "default", "training",
]  # fmt: skip


def model_with(place: str, tensor: TensorProto) -> bytes:
    graph = helper.make_graph([], "g", [], [])
    functions = []
    if place == "initializer":
        graph.initializer.append(tensor)
    elif place == "sparse":
        graph.sparse_initializer.append(helper.make_sparse_tensor(tensor, INSIDE, [500]))
    elif place == "sparse attribute":
        sparse = helper.make_sparse_tensor(INSIDE, tensor, [500])
        graph.node.append(helper.make_node("Constant", [], ["c"], sparse_value=sparse))
    elif place == "constant":
        graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif place == "list":
        graph.node.append(helper.make_node("Own", [], ["c"], values=[INSIDE, tensor]))
    elif place == "subgraph":
        inner = helper.make_graph([], "inner", [], [], [tensor])
        graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    elif place in ("function", "default"):
        node = helper.make_node("Constant", [], ["c"], value=tensor if place == "function" else INSIDE)
        functions.append(helper.make_function("", "f", [], ["c"], [node], [helper.make_opsetid("", 17)]))
        if place == "default":
            functions[0].attribute_proto.append(helper.make_attribute("a", tensor))
    model = helper.make_model(graph, functions=functions)
    if place == "training":
        model.training_info.add().algorithm.initializer.append(tensor)
    return model.SerializeToString()


def refused(raw: bytes, why: str) -> bool:
    return (objection(raw) or "").startswith(why)


@pytest.mark.parametrize("place", PLACES)
def test_a_tensor_outside_is_found_wherever_it_may_be(place: str) -> None:
    assert refused(model_with(place, external(INSIDE)), OUTSIDE)
    assert objection(model_with(place, INSIDE)) is None


def test_either_sign_of_an_outside_tensor_is_enough() -> None:
    for field in ("external_data", "data_location"):
        tensor = external(INSIDE)
        tensor.ClearField(field)
        assert refused(model_with("initializer", tensor), OUTSIDE)


def field(number: int, value: bytes) -> bytes:
    """A field of wire type 2 with a value of up to 127 bytes."""
    assert len(value) < 128
    return bytes([number << 3 | 2, len(value)]) + value


def test_a_location_in_a_longer_varint_than_needed_is_found() -> None:
    """Protocol Buffers allow 1 as 81 00; 14 << 3 is the key of data_location."""
    tensor = bytes([14 << 3, 0x81, 0x00])
    assert refused(field(7, field(5, tensor)), OUTSIDE)


def test_the_words_alone_are_no_sign() -> None:
    tensor = numpy_helper.from_array(np.frombuffer(b"location external_data  ", np.uint8), name="location")
    assert objection(model_with("initializer", tensor)) is None


def model_of(domain: str, place: str) -> bytes:
    """A model with an operator of a domain in one place, which only there is named."""
    node = helper.make_node("Own", [], ["c"], domain=domain)
    plain = helper.make_node("Constant", [], ["c"], value=INSIDE)
    graph, functions, imports = helper.make_graph([], "g", [], []), [], [helper.make_opsetid("", 17)]
    if place == "node":
        graph.node.append(node)
    elif place == "import":
        imports.append(helper.make_opsetid(domain, 1))
    elif place == "subgraph":
        inner = helper.make_graph([node], "inner", [], [])
        graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=inner, else_branch=inner))
    elif place == "function":
        functions.append(helper.make_function(domain, "f", [], ["c"], [plain], []))
    elif place == "in a function":
        functions.append(helper.make_function("", "f", [], ["c"], [node], []))
    elif place == "import of a function":
        opset = helper.make_opsetid(domain, 1)
        functions.append(helper.make_function("", "f", [], ["c"], [plain], [opset]))
    return helper.make_model(graph, functions=functions, opset_imports=imports).SerializeToString()


@pytest.mark.parametrize(
    "place", ["node", "import", "subgraph", "function", "in a function", "import of a function"]
)
def test_custom_operators_are_found_wherever_they_may_be(place: str) -> None:
    for domain in ("some.where", "ai.onnx ", "AI.ONNX", "com.microsoft.more", "x" * 5000):
        assert refused(model_of(domain, place), f'{CUSTOM} (domain "{domain[:80]}")')
    for domain in sorted(DOMAINS):
        assert objection(model_of(domain, place)) is None


# A parser that skips, truncates or merges where another does not could be shown another model than the one that was
# checked. Each of these hides an outside tensor from a reader that is not strict.
HIDDEN = field(7, field(5, bytes([14 << 3, 1])))
GROUP = bytes([30 << 3 & 0x7F | 0x80 | 3, 1, 30 << 3 & 0x7F | 0x80 | 4, 1])


@pytest.mark.parametrize(
    "raw",
    [
        GROUP + HIDDEN,
        field(7, GROUP + HIDDEN[2:]),
        # Field 7, to a reader that drops what is beyond 32 bits.
        bytes([0xBA, 0x80, 0x80, 0x80, 0x10]) + HIDDEN[1:],
        bytes([7 << 3 | 0x82, 0x80, 0x80, 0x80, 0x80, 0]) + HIDDEN[1:],
        b"\x02\x00" + HIDDEN,
        HIDDEN[:-1],
        b"\x08" + b"\xff" * 11 + HIDDEN,
    ],
)
def test_what_two_parsers_may_read_differently_is_refused(raw: bytes) -> None:
    assert refused(HIDDEN, OUTSIDE)
    assert refused(raw, MALFORMED)


def test_a_graph_in_two_parts_is_read_as_one() -> None:
    """Protocol Buffers merge a field that comes twice."""
    assert refused(field(7, b"") + HIDDEN, OUTSIDE)


def test_the_runtimes_own_format_is_refused() -> None:
    raw = field(7, field(5, b"")).ljust(4, b"\0") + b"ORTM" + bytes(50)
    assert objection(raw) == "is in ONNX Runtime's own format, which is not allowed"


def test_a_model_that_is_too_deep_is_refused() -> None:
    raw = b""
    for _ in range(MAX_DEPTH):
        # A graph in an attribute of a node, so often.
        inner = raw
        for number in (6, 5, 1):
            size, length = len(inner), b""
            while size > 127:
                length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
            inner = bytes([number << 3 | 2]) + length + bytes([size]) + inner
        raw = inner
    size, length = len(raw), b""
    while size > 127:
        length, size = length + bytes([size & 0x7F | 0x80]), size >> 7
    assert refused(bytes([7 << 3 | 2]) + length + bytes([size]) + raw, f"{MALFORMED}: messages lie within")


def test_memory_does_not_grow_with_the_number_of_messages() -> None:
    """A file of empty nodes, two bytes each."""
    nodes = bytes([1 << 3 | 2, 0]) * 32_768
    raw = bytes([7 << 3 | 2, 0x80, 0x80, 4]) + nodes
    tracemalloc.start()
    try:
        assert objection(raw) is None
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@given(st.binary(max_size=200))
def test_any_bytes_are_answered(raw: bytes) -> None:
    why = objection(raw)
    assert why is None or why.isprintable()


@given(st.data())
def test_a_broken_model_is_answered(data: st.DataObject) -> None:
    raw = model_with("subgraph", external(INSIDE))
    start = data.draw(st.integers(0, len(raw)))
    broken = raw[:start] + data.draw(st.binary(max_size=6)) + raw[start + data.draw(st.integers(0, 6)) :]
    why = objection(broken)
    if why is None:
        # It was let through: then the reference parser finds no outside tensor in it either, or does not take it.
        try:
            model = onnx.ModelProto.FromString(broken)
        except Exception:
            return
        inner = [graph for node in model.graph.node for attribute in node.attribute for graph in (attribute.g,)]
        tensors = [*model.graph.initializer, *(tensor for graph in inner for tensor in graph.initializer)]
        assert not any(tensor.external_data or tensor.data_location for tensor in tensors)
