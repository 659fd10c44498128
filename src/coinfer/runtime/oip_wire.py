"""Requests and answers of the Open Inference Protocol (KServe v2, REST) as bytes, without I/O.

    {"inputs": [{"name": "input", "shape": [1, 2], "datatype": "UINT8", "data": [7, 9]}]}          tensors in JSON
    {"inputs": [{..., "parameters": {"binary_data_size": 2}}]} 07 09                                ... or behind it

The second is the binary tensor extension: a header Inference-Header-Content-Length says where the JSON ends; tensors
lie behind it in their order, little endian, each element of a BYTES tensor behind its length (u32).  With a length of
0 there is no JSON: the body is the one input itself, as many samples as its bytes make, one element of BYTES.
Members and parameters that the protocol does not name are ignored.

Nothing is trusted in its sizes: a tensor's numbers are counted before they are read, and compared with its shape.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple, TypeVar

import msgspec
import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from ..errors import ProtocolError
from ..plan import Value

Array = NDArray[Any]
# Numbers in JSON take many times their bytes of memory, and time that nobody else has.
MAX_JSON_BYTES = 4 << 20
MAX_ID_CHARS = 1024
BYTES = "BYTES"
DATATYPES = {
    "bool": "BOOL", "uint8": "UINT8", "int8": "INT8", "int32": "INT32", "int64": "INT64",
    "float16": "FP16", "float32": "FP32", "float64": "FP64",
}  # fmt: skip
_NUMPY = {datatype: np.dtype(name).newbyteorder("<") for name, datatype in DATATYPES.items()}
_LENGTH = struct.Struct("<I")
_Whole = Annotated[int, Meta(ge=0, le=2**31 - 1)]
T = TypeVar("T")


class Port(Value, frozen=True, kw_only=True):
    """One input or output of a model: `shape` is one sample's, `datatype` the protocol's name ("FP32", "BYTES")."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample; BYTES have none."""
        return 0 if self.datatype == BYTES else math.prod(self.shape) * _NUMPY[self.datatype].itemsize

    @property
    def full_shape(self) -> list[int]:
        """As metadata state it: any number of samples first."""
        return [-1, *self.shape]


class Wanted(NamedTuple):
    """An output that is to be answered: its place among the model's; as binary data; as its `classes` best classes."""

    output: int
    is_binary: bool
    classes: int = 0


class Asked(NamedTuple):
    """A request: `samples` are the input, each (1, *shape), or the bytes of each element of a BYTES tensor."""

    id: str | None
    samples: Sequence[Array] | Sequence[bytes]
    wanted: tuple[Wanted, ...]


class _InputParameters(msgspec.Struct):
    binary_data_size: _Whole | None = None


class _Input(msgspec.Struct):
    name: str
    shape: list[_Whole]
    datatype: str
    parameters: _InputParameters | None = None
    data: msgspec.Raw = msgspec.Raw(b"null")


class _OutputParameters(msgspec.Struct):
    binary_data: bool | None = None
    classification: _Whole = 0


class _Output(msgspec.Struct):
    name: str
    parameters: _OutputParameters | None = None


class _Parameters(msgspec.Struct):
    binary_data_output: bool = False


class _Request(msgspec.Struct):
    inputs: list[_Input]
    id: Annotated[str, Meta(max_length=MAX_ID_CHARS)] | None = None
    outputs: list[_Output] | None = None
    parameters: _Parameters | None = None


class Tensor(NamedTuple):
    """One tensor of an answer: `values` (N, *shape), or for BYTES the elements."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    values: Array | Sequence[bytes]
    is_binary: bool


def parse_json(raw: bytes | memoryview, wanted: type[T]) -> T:
    """The value of a JSON text.

    Raises:
        ProtocolError: it is no JSON, or holds something else.
    """
    try:
        return msgspec.json.decode(raw, type=wanted)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"the JSON cannot be read: {error}") from error


def read_request(
    body: bytes, json_bytes: int | None, given: Port, outputs: Sequence[Port], *, max_samples: int
) -> Asked:
    """What a body asks of a model with one input `given`.

    Args:
        body: whole.
        json_bytes: length of the JSON at its beginning; None: all of it; 0: the body is the input's data.
        given: the model's input.
        outputs: the model's outputs.
        max_samples: that one request may have.

    Raises:
        ProtocolError: it is no request of the protocol, or does not fit the model.
    """
    if json_bytes == 0:
        count = 1 if given.datatype == BYTES else len(body) // given.num_bytes
        _check_count(given, count, max_samples)
        raw = [bytes(body)] if given.datatype == BYTES else _from_binary(memoryview(body), given, count)
        return Asked(None, raw, tuple(Wanted(place, False) for place in range(len(outputs))))
    end = len(body) if json_bytes is None else json_bytes
    if not 0 < end <= len(body):
        raise ProtocolError(f"the JSON must be 1 to {len(body)} B of the body, got {end} B")
    view = memoryview(body)
    request = parse_json(view[:end], _Request)
    if len(request.inputs) != 1 or request.inputs[0].name != given.name:
        names = ", ".join(f'"{tensor.name[:64]}"' for tensor in request.inputs[:8])
        raise ProtocolError(f'the model has one input, "{given.name}", got {names or "none"}')
    samples = _samples(request.inputs[0], view[end:], given, max_samples)
    return Asked(request.id, samples, tuple(_wanted(request, outputs)))


def _wanted(request: _Request, outputs: Sequence[Port]) -> list[Wanted]:
    """The outputs to answer; without a choice, or with an empty one, all."""
    is_binary = request.parameters is not None and request.parameters.binary_data_output
    if not request.outputs:
        return [Wanted(place, is_binary) for place in range(len(outputs))]
    places = {port.name: place for place, port in enumerate(outputs)}
    found: dict[int, Wanted] = {}
    for output in request.outputs:
        if output.name not in places:
            have = ", ".join(f'"{name}"' for name in places)
            raise ProtocolError(f'outputs must be of {have}, got "{output.name[:64]}"')
        place, asked = places[output.name], output.parameters or _OutputParameters()
        if place in found:
            raise ProtocolError(f'output "{output.name}" is asked for twice')
        most = math.prod(outputs[place].shape)
        if asked.classification > most:
            raise ProtocolError(f'classification must be up to {most}, got {asked.classification} ("{output.name}")')
        binary = is_binary if asked.binary_data is None else asked.binary_data
        found[place] = Wanted(place, binary, asked.classification)
    return list(found.values())


def _samples(tensor: _Input, behind: memoryview, given: Port, max_samples: int) -> Sequence[Array] | Sequence[bytes]:
    what = f'(input "{given.name}")'
    if tensor.datatype != given.datatype:
        raise ProtocolError(f'datatype must be {given.datatype}, got "{tensor.datatype[:16]}" {what}')
    if len(tensor.shape) != 1 + len(given.shape) or tuple(tensor.shape[1:]) != given.shape:
        raise ProtocolError(f"shape must be {given.full_shape}, got {_shown(tensor.shape)} {what}")
    count = tensor.shape[0]
    _check_count(given, count, max_samples)
    size = None if tensor.parameters is None else tensor.parameters.binary_data_size
    data = bytes(tensor.data)
    has_data = data != b"null"
    if has_data == (size is not None):
        raise ProtocolError(f"a tensor has either data or a binary_data_size {what}")
    if len(behind) != (size or 0):
        raise ProtocolError(f"{size or 0} B must follow the JSON as binary data, got {len(behind)} B {what}")
    if given.datatype == BYTES:
        return _texts(data, count, what) if has_data else _elements(behind, count, what)
    return _from_json(data, given, count) if has_data else _from_binary(behind, given, count)


def _check_count(given: Port, count: int, most: int) -> None:
    if not 1 <= count <= most:
        raise ProtocolError(f'a request has 1 to {most} samples, got {count} (input "{given.name}")')


def _shown(shape: Sequence[int]) -> str:
    return str(list(shape)) if len(shape) <= 8 else f"{len(shape)} sizes"


def _from_binary(data: memoryview, given: Port, count: int) -> list[Array]:
    if len(data) != count * given.num_bytes:
        wanted = f"{count} samples have {count * given.num_bytes} B"
        raise ProtocolError(f'{wanted} of binary data, got {len(data)} B (input "{given.name}")')
    if given.datatype == "BOOL" and data.nbytes and int(np.frombuffer(data, np.uint8).max()) > 1:
        raise ProtocolError(f'a BOOL is 0 or 1 (input "{given.name}")')
    wire = _NUMPY[given.datatype]
    array = np.frombuffer(data, wire).reshape(count, *given.shape)
    # The JSON in front may have any length, so that numbers may lie anywhere.
    return _rows(np.require(array, dtype=wire.newbyteorder("="), requirements="A"))


def _from_json(data: bytes, given: Port, count: int) -> list[Array]:
    """Numbers, flat or nested as the shape says."""
    shape = (count, *given.shape)
    # So many there must be: nothing is built of a text that has others.
    brackets = [1, sum(math.prod(shape[:depth]) for depth in range(len(shape)))]
    commas = max(0, math.prod(shape) - 1)
    if data.count(b",") != commas or data.count(b"[") not in brackets:
        raise ProtocolError(f'the data are not of shape {_shown(shape)} (input "{given.name}")')
    depth = 1 if data.count(b"[") == 1 else len(shape)
    wire = _NUMPY[given.datatype]
    element: Any = float
    if wire.kind in "iu":
        info = np.iinfo(wire)
        element = Annotated[int, Meta(ge=int(info.min), le=int(info.max))]
    elif wire.kind == "b":
        element = bool
    for _ in range(depth):
        element = list[element]
    values: Any = parse_json(data, element)
    try:
        with np.errstate(over="ignore"):
            array = np.array(values, dtype=wire.newbyteorder("=")).reshape(shape)
    except ValueError as error:
        raise ProtocolError(f'the data are not of shape {_shown(shape)} (input "{given.name}")') from error
    if wire.kind == "f" and not np.isfinite(array).all():
        raise ProtocolError(f'a number is beyond the range of {given.datatype} (input "{given.name}")')
    return _rows(array)


def _rows(array: Array) -> list[Array]:
    return [array[row : row + 1] for row in range(len(array))]


def _texts(data: bytes, count: int, what: str) -> list[bytes]:
    texts = parse_json(data, list[str])
    if len(texts) != count:
        raise ProtocolError(f"{count} elements are needed, got {len(texts)} {what}")
    return [text.encode("utf-8", "surrogatepass") for text in texts]


def _elements(data: memoryview, count: int, what: str) -> list[bytes]:
    """The elements of a BYTES tensor, each behind its length."""
    found: list[bytes] = []
    place = 0
    while place < len(data):
        if len(found) == count or place + _LENGTH.size > len(data):
            raise ProtocolError(f"{len(data) - place} B too many behind {len(found)} of {count} elements {what}")
        (size,) = _LENGTH.unpack_from(data, place)
        place += _LENGTH.size
        if size > len(data) - place:
            raise ProtocolError(f"element {len(found)} has {size} B, but {len(data) - place} B are left {what}")
        found.append(bytes(data[place : place + size]))
        place += size
    if len(found) != count:
        raise ProtocolError(f"{count} elements are needed, got {len(found)} {what}")
    return found


def best_classes(values: Array, count: int, labels: Sequence[str]) -> list[bytes]:
    """The `count` greatest elements of each of N samples as "value:index" or "value:index:label", greatest first.

    After the protocol's classification extension; of equals the first.
    """
    found = []
    for row in values.reshape(len(values), -1):
        for index in np.argsort(-row.astype(np.float64), kind="stable")[:count].tolist():
            label = f":{labels[index]}" if labels else ""
            found.append(f"{row[index]}:{index}{label}".encode())
    return found


def write_answer(model: str, version: str, id: str | None, tensors: Sequence[Tensor]) -> tuple[bytes, int | None]:
    """The body of an answer, and the length of its JSON where binary data follow.

    Raises:
        ProtocolError: a tensor in JSON holds NaN or infinity, for which JSON has no numbers.
    """
    described: list[dict[str, Any]] = []
    behind: list[bytes] = []
    for tensor in tensors:
        one: dict[str, Any] = {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}
        if tensor.is_binary:
            behind.append(_binary(tensor))
            one["parameters"] = {"binary_data_size": len(behind[-1])}
        else:
            one["data"] = _numbers(tensor)
        described.append(one)
    answer = {"model_name": model, "model_version": version, "outputs": described}
    text = msgspec.json.encode(answer if id is None else {"id": id, **answer})
    return (b"".join([text, *behind]), len(text)) if behind else (text, None)


def _binary(tensor: Tensor) -> bytes:
    if isinstance(tensor.values, np.ndarray):
        return tensor.values.astype(_NUMPY[tensor.datatype], copy=False).tobytes()
    return b"".join(_LENGTH.pack(len(element)) + element for element in tensor.values)


def _numbers(tensor: Tensor) -> list[Any]:
    values = tensor.values
    if not isinstance(values, np.ndarray):
        return [element.decode() for element in values]
    if values.dtype.kind == "f" and not np.isfinite(values).all():
        raise ProtocolError(f'output "{tensor.name}" holds NaN or infinity: ask for it as binary_data')
    numbers: list[Any] = values.ravel().tolist()
    return numbers
