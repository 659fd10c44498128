"""Reading just enough of an ONNX file's bytes to see whether it refers to data outside itself.

ONNX is Protocol Buffers: a message is a row of fields, each a key (field number x 8 + wire type) and a
value.  A tensor that lies elsewhere has `data_location` (field 14) = EXTERNAL (1) or `external_data`
(field 13).  Tensors are reached by these paths only (onnx.proto3):

    ModelProto.graph (7), .functions (25)
    GraphProto.node (1), .initializer (5), .sparse_initializer (15: values 1, indices 2)
    FunctionProto.node (7);  NodeProto.attribute (5)
    AttributeProto.t (5), .g (6), .tensors (10), .graphs (11), .sparse_tensor (22), .sparse_tensors (23)

Weights are skipped by their length, so that a file of 100 MB takes as long as one of 1 MB.  The onnx
package is not needed on the device and therefore not used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

Message = Literal["model", "graph", "function", "node", "attribute", "sparse", "tensor"]

_CHILDREN: dict[Message, dict[int, Message]] = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def holds_external_data(raw: bytes) -> bool:
    """Whether any tensor of the ONNX model `raw` lies outside of it; False too where `raw` is no such model.

    (ONNX Runtime, which parses all of it, then says what is wrong.)
    """
    todo: list[tuple[Message, int, int]] = [("model", 0, len(raw))]
    while todo:
        message, start, stop = todo.pop()
        children = _CHILDREN[message]
        for number, begin, end in _fields(raw, start, stop):
            if message == "tensor" and number == _EXTERNAL_DATA:
                return True
            if message == "tensor" and number == _DATA_LOCATION and _varint(raw, begin, end)[0] != 0:
                return True
            if number in children:
                todo.append((children[number], begin, end))
    return False


def _fields(raw: bytes, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
    """Field number and the half-open range of its value, for each field of raw[start:stop]."""
    while start < stop:
        key, start = _varint(raw, start, stop)
        kind = key & 7
        if kind == _VARINT:
            begin, (_, start) = start, _varint(raw, start, stop)
        elif kind == _LENGTH:
            size, begin = _varint(raw, start, stop)
            start = begin + size
        else:
            begin, start = start, start + {_FIXED64: 8, _FIXED32: 4}.get(kind, stop)
        if start > stop:
            return
        yield key >> 3, begin, start


def _varint(raw: bytes, start: int, stop: int) -> tuple[int, int]:
    """The value of the varint at `start` and where the next byte lies; past `stop` where it is cut short."""
    value = 0
    for index in range(start, min(start + 10, stop)):
        value |= (raw[index] & 0x7F) << (7 * (index - start))
        if raw[index] < 0x80:
            return value, index + 1
    return value, stop + 1
