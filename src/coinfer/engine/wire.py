"""Reading just enough of an ONNX file's bytes to see whether it may be given to ONNX Runtime.

Two things are refused: data outside the file (it could be any file of this machine), and operators of a domain that
ONNX Runtime does not bring itself (they stand for code from elsewhere).

ONNX is Protocol Buffers: a message is a row of fields, each a key (field number x 8 + wire type) and a
value.  A tensor that lies elsewhere has `data_location` (field 14) = EXTERNAL (1) or `external_data`
(field 13).  Tensors and domains are reached by these paths only (onnx.proto3):

    ModelProto.opset_import (8), .graph (7), .training_info (20: graphs 1 and 2), .functions (25)
    GraphProto.node (1), .initializer (5), .sparse_initializer (15: values 1, indices 2)
    FunctionProto.node (7), .opset_import (9), .domain (10), .attribute_proto (11)
    NodeProto.attribute (5), .domain (7)
    AttributeProto.t (5), .g (6), .tensors (10), .graphs (11), .sparse_tensor (22), .sparse_tensors (23)

Weights are skipped by their length, so that a file of 100 MB takes as long as one of 1 MB, and messages are walked
depth first, so that memory grows with the depth alone.  Whatever this reader does not understand as ONNX Runtime's
own parser would (groups, keys beyond 32 bits, lengths beyond the file) makes the file one that is refused: two readers
that disagree are how such a check is got around.  The onnx package is not needed on the device and not used here.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple

Message = Literal["model", "graph", "training", "function", "node", "attribute", "sparse", "tensor", "opset"]

# What ONNX Runtime brings itself: ONNX's own domain by both of its names, and the runtime's.
DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft", "com.ms.internal.nhwc"})
MAX_DEPTH = 100

_CHILDREN: dict[Message, dict[int, Message]] = {
    "model": {7: "graph", 8: "opset", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 9: "opset", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
    "opset": {},
}
_DOMAIN: dict[Message, int] = {"node": 7, "function": 10, "opset": 1}
_EXTERNAL_DATA, _DATA_LOCATION = 13, 14
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5
_ALLOWED = {domain.encode() for domain in DOMAINS}
# ONNX Runtime's other file format names itself here; it is not Protocol Buffers.
_ORT_FORMAT = b"ORTM"


class _Field(NamedTuple):
    """Number and wire type of a field, and the half-open range of its value."""

    number: int
    kind: int
    begin: int
    end: int


class _Malformed(ValueError):
    """Bytes that are no row of fields."""


def objection(raw: bytes) -> str | None:
    """Why the ONNX model `raw` is not given to ONNX Runtime, in words that follow "the file"; None where it may be.

    >>> objection(b"no model") is None
    False
    """
    if raw[4:8] == _ORT_FORMAT:
        return "is in ONNX Runtime's own format, which is not allowed"
    try:
        return _objection(raw)
    except _Malformed as error:
        return f"is no well-formed ONNX: {error}"


def _objection(raw: bytes) -> str | None:
    for message, field in _walk(raw):
        if _is_outside(raw, message, field):
            return "refers to weights outside itself, which is not allowed"
        if field.number == _DOMAIN.get(message) and field.kind == _LENGTH:
            domain = raw[field.begin : min(field.end, field.begin + 80)]
            if domain not in _ALLOWED:
                shown = domain.decode(errors="replace")
                named = ", ".join(f'"{name}"' for name in sorted(DOMAINS))
                return f'uses custom operators (domain "{shown}"), which is not allowed; these domains are: {named}'
    return None


def _is_outside(raw: bytes, message: Message, field: _Field) -> bool:
    """Whether a field says that its tensor lies elsewhere."""
    if message != "tensor":
        return False
    if field.number == _DATA_LOCATION and field.kind == _VARINT:
        return _varint(raw, field.begin, field.end)[0] != 0
    return field.number == _EXTERNAL_DATA and field.kind == _LENGTH


def _walk(raw: bytes) -> Iterator[tuple[Message, _Field]]:
    """Every field of every message that may hold a tensor or a domain, depth first.

    Raises:
        _Malformed: the bytes are no such messages, or lie too deep.
    """
    stack: list[tuple[Message, Iterator[_Field]]] = [("model", _fields(raw, 0, len(raw)))]
    while stack:
        message, fields = stack[-1]
        field = next(fields, None)
        if field is None:
            stack.pop()
            continue
        yield message, field
        child = _CHILDREN[message].get(field.number) if field.kind == _LENGTH else None
        if child is not None:
            if len(stack) == MAX_DEPTH:
                raise _Malformed(f"messages lie within more than {MAX_DEPTH} others")
            stack.append((child, _fields(raw, field.begin, field.end)))


def _fields(raw: bytes, start: int, stop: int) -> Iterator[_Field]:
    """The fields of raw[start:stop].

    Raises:
        _Malformed: it does not end where a field ends, or holds what a parser may read in two ways.
    """
    while start < stop:
        at = start
        key, start = _varint(raw, start, stop)
        kind = key & 7
        # A key of five bytes or less may still have bits that a reader of 32 bits drops.
        if not 8 <= key < 2**32 or start - at > 5:
            raise _Malformed(f"a field's key is not allowed (byte {at})")
        if kind == _VARINT:
            begin, (_, start) = start, _varint(raw, start, stop)
        elif kind == _LENGTH:
            size, begin = _varint(raw, start, stop)
            start = begin + size
        elif kind in (_FIXED64, _FIXED32):
            begin, start = start, start + (8 if kind == _FIXED64 else 4)
        else:
            raise _Malformed(f"a field is of wire type {kind} (byte {at})")
        if start > stop:
            raise _Malformed(f"a field is cut short (byte {at})")
        yield _Field(key >> 3, kind, begin, start)


def _varint(raw: bytes, start: int, stop: int) -> tuple[int, int]:
    """The value of the varint at `start` and where the next byte lies.

    Raises:
        _Malformed: it is cut short, or has more than ten bytes.
    """
    value = 0
    for index in range(start, min(start + 10, stop)):
        value |= (raw[index] & 0x7F) << (7 * (index - start))
        if raw[index] < 0x80:
            return value, index + 1
    raise _Malformed(f"a number is cut short (byte {start})")
