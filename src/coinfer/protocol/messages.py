"""The binary messages: their header, what they mean, and the bytes of an answer."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import ProtocolError
from ..plan import Plan, TensorSpec
from .wire import HEADER_BYTES

FAILURE_BYTES = 500
# Most that a heartbeat may carry to probe the link.
PADDING_BYTES = 16384

Array = NDArray[Any]
_HEADER = struct.Struct("<BBHI")
_WIRE_DTYPES = {
    name: np.dtype(name).newbyteorder("<")
    for name in ("bool", "uint8", "int8", "float16", "int32", "float32", "int64", "float64")
}
_CLASS = np.dtype("<u2")
_SCORE = np.dtype("<f2")


class MessageType(IntEnum):
    """First byte of a binary message."""

    REQUEST = 1
    REPLY = 2
    FAILURE = 3
    PING = 4
    PONG = 5
    BUSY = 6


class Durations(NamedTuple):
    """Microseconds at the edge, of its own clock: from arrival to decoding, decoding, tail."""

    wait_us: int
    decode_us: int
    tail_us: int


class Result(NamedTuple):
    """An answer: the output tensors (1, *shape), or (plan.top) the best classes and their scores, (k,) each."""

    outputs: tuple[Array, ...] = ()
    classes: NDArray[np.int64] | None = None
    scores: NDArray[np.float32] | None = None


class Request(NamedTuple):
    """The device asks: `payload` is the codec's."""

    request: int
    plan: Plan
    payload: bytes


class Reply(NamedTuple):
    """The edge answers; `num_bytes` is the whole message's, `exit` the place in the plan of the exit that answered."""

    request: int
    plan: Plan
    durations: Durations
    result: Result
    num_bytes: int
    exit: int | None = None


class Failure(NamedTuple):
    """The edge could not answer this request; the connection lives on."""

    request: int
    plan: Plan
    text: str
    num_bytes: int


class Busy(NamedTuple):
    """The edge takes no more now: it has not begun this request and will not; ask again after `retry_after_s`."""

    request: int
    plan: Plan
    retry_after_s: float
    num_bytes: int


class Ping(NamedTuple):
    """A heartbeat of `num_bytes`, to be answered with a PONG of the same token."""

    token: int
    num_bytes: int = HEADER_BYTES


class Pong(NamedTuple):
    """The answer to a heartbeat."""

    token: int


def encode_result(plan: Plan, outputs: Sequence[Array], specs: tuple[TensorSpec, ...]) -> bytes:
    """The answer's bytes: `outputs` (1, *shape) as they are, or the best `plan.top` classes of the first.

    With `plan.top` the first alone is enough: an exit gives no more.  Scores are its softmax, largest first; of equals
    the lower class first.

    Raises:
        ProtocolError: `outputs` are not what the bundle's manifest states.
    """
    needed = specs if plan.top is None else specs[:1]
    if len(outputs) < len(needed) or len(outputs) > len(specs) or any(map(_differs, outputs, specs)):
        want = [(spec.shape, spec.dtype) for spec in specs]
        got = [(array.shape, array.dtype.name) for array in outputs]
        raise ProtocolError(f"outputs must be one sample each of {want}, got {got} ({plan.label})")
    if plan.top is None:
        return b"".join(
            array.astype(_WIRE_DTYPES[spec.dtype], copy=False).tobytes()
            for array, spec in zip(outputs, specs, strict=True)
        )
    logits = outputs[0].reshape(-1).astype(np.float64)
    order: NDArray[np.int64] = np.argsort(-logits, kind="stable")[: plan.top]
    powers = np.exp(logits - logits[order[0]])
    scores: NDArray[np.float64] = powers[order] / powers.sum()
    return order.astype(_CLASS).tobytes() + scores.astype(_SCORE).tobytes()


def _differs(array: Array, spec: TensorSpec) -> bool:
    return array.shape != (1, *spec.shape) or array.dtype != spec.dtype


def decode_result(plan: Plan, body: bytes | memoryview, specs: tuple[TensorSpec, ...]) -> Result:
    """The inverse of `encode_result`, as read-only arrays.

    Raises:
        ProtocolError: `body` has another length than `reply_bytes`.
    """
    if len(body) != reply_bytes(plan, specs):
        raise ProtocolError(f"an answer has {reply_bytes(plan, specs)} B, got {len(body)} B ({plan.label})")
    if plan.top is not None:
        count = len(body) // (_CLASS.itemsize + _SCORE.itemsize)
        classes = np.frombuffer(body, _CLASS, count).astype(np.int64)
        scores = np.frombuffer(body, _SCORE, count, count * _CLASS.itemsize).astype(np.float32)
        return Result((), classes, scores)
    arrays, offset = [], 0
    for spec in specs:
        flat = np.frombuffer(body, _WIRE_DTYPES[spec.dtype], spec.num_elements, offset)
        arrays.append(flat.astype(spec.dtype, copy=False).reshape(1, *spec.shape))
        offset += spec.num_bytes
    return Result(tuple(arrays))


def reply_bytes(plan: Plan, outputs: tuple[TensorSpec, ...]) -> int:
    """Bytes of one answer's body, without header and durations (which `wire_bytes` adds)."""
    if plan.top is not None:
        return (_CLASS.itemsize + _SCORE.itemsize) * min(plan.top, outputs[0].num_elements)
    return sum(spec.num_elements * _WIRE_DTYPES[spec.dtype].itemsize for spec in outputs)


def one_line(text: str) -> str:
    """The text in one line of at most `FAILURE_BYTES` bytes of UTF-8, without control characters."""
    shown = "".join(c if c.isprintable() else " " for c in text)
    return " ".join(shown.split()).encode(errors="replace")[:FAILURE_BYTES].decode(errors="ignore")


class Header(NamedTuple):
    """What a binary message begins with; `exit` is of a REPLY, see `Reply`."""

    kind: MessageType
    plan: int
    request: int
    exit: int | None = None


def pack(kind: MessageType, plan: int, request: int, body: bytes = b"", *, exit: int | None = None) -> bytes:
    """A binary message."""
    return _HEADER.pack(kind, 0 if exit is None else exit + 1, plan, request) + body


def parse_header(message: bytes, max_bytes: int, side: str) -> Header:
    """A binary message's header.

    Raises:
        ProtocolError: too short or too long, an unknown type, an exit of no reply, or a heartbeat that is too long.
    """
    size = len(message)
    if not HEADER_BYTES <= size <= max_bytes:
        raise ProtocolError(f"a message has {HEADER_BYTES} to {max_bytes} B, got {size} B (from {side})")
    kind, exit, plan, request = _HEADER.unpack_from(message)
    if not MessageType.REQUEST <= kind <= MessageType.BUSY:
        raise ProtocolError(f"unknown message type {kind} (from {side})")
    if exit and kind != MessageType.REPLY:
        raise ProtocolError(f"only a reply comes from an exit, got {exit} with message type {kind} (from {side})")
    most = {MessageType.PING: HEADER_BYTES + PADDING_BYTES, MessageType.PONG: HEADER_BYTES}.get(MessageType(kind))
    if most is not None and (size > most or plan != 0):
        raise ProtocolError(f"a heartbeat has at most {most} B and no plan, got {size} B for plan {plan} (from {side})")
    return Header(MessageType(kind), plan, request, exit - 1 if exit else None)
