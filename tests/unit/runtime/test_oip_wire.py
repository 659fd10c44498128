"""Requests and answers of the Open Inference Protocol, byte for byte."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.http import InferResult

from coinfer.errors import ProtocolError
from coinfer.runtime.oip_wire import (
    BYTES,
    DATATYPES,
    Asked,
    Port,
    Tensor,
    Wanted,
    best_classes,
    read_request,
    write_answer,
)

X = Port(name="x", datatype="FP32", shape=(2, 3))
PIXELS = Port(name="x", datatype="UINT8", shape=(4,))
FILES = Port(name="x", datatype=BYTES, shape=())
OUT = (Port(name="y", datatype="FP32", shape=(5,)), Port(name="z", datatype="INT64", shape=()))


def read(body: bytes, port: Port = X, *, json_bytes: int | None = None, most: int = 8) -> Asked:
    return read_request(body, json_bytes, port, OUT, max_samples=most)


def body_of(port: Port, shape: list[int], *, data: Any = None, size: Any = None, **others: Any) -> bytes:
    tensor: dict[str, Any] = {"name": "x", "shape": shape, "datatype": port.datatype}
    tensor |= {} if data is None else {"data": data}
    tensor |= {} if size is None else {"parameters": {"binary_data_size": size}}
    return json.dumps({"inputs": [tensor], **others}).encode()


# --- requests ----------------------------------------------------------------------------------------


def test_numbers_in_json_flat_and_nested() -> None:
    nested = body_of(X, [2, 2, 3], data=[[[0, 1, 2], [3, 4, 5]], [[6, 7, 8], [9, 10, 11.5]]])
    flat = body_of(X, [2, 2, 3], data=[*range(11), 11.5])
    expected = np.array([*range(11), 11.5], np.float32).reshape(2, 1, 2, 3)
    for body in (nested, flat, nested.replace(b",", b" ,\n")):
        np.testing.assert_array_equal(np.stack(read(body).samples), expected, strict=True)


def test_binary_data_behind_the_json_byte_for_byte() -> None:
    text = b'{"inputs":[{"name":"x","shape":[1,2,3],"datatype":"FP32","parameters":{"binary_data_size":24}}]}'
    values = b"\0\0\x80\x3f" b"\0\0\0\xc0" b"\0\0\xc0\x7f" b"\0\0\x80\x7f" b"\1\0\0\0" b"\0\0\0\x80"
    (found,) = read(text + values, json_bytes=len(text)).samples
    assert isinstance(found, np.ndarray) and found.shape == (1, 2, 3) and found.dtype == np.float32
    assert found.flags.aligned and found.tobytes() == values


def test_bytes_behind_their_lengths() -> None:
    text = body_of(FILES, [3], size=17)
    behind = b"\2\0\0\0ab" + b"\0\0\0\0" + b"\3\0\0\0\xff\0c"
    assert read(text + behind, FILES, json_bytes=len(text)).samples == [b"ab", b"", b"\xff\0c"]
    assert read(body_of(FILES, [2], data=["ab", "ü"]), FILES).samples == [b"ab", "ü".encode()]


def test_a_body_that_is_all_data() -> None:
    samples = read(bytes(range(8)), PIXELS, json_bytes=0).samples
    assert [sample.tolist() for sample in samples if isinstance(sample, np.ndarray)] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]
    assert read(b"\xff\xd8", FILES, json_bytes=0).samples == [b"\xff\xd8"]


def test_what_is_asked_for() -> None:
    data = body_of(PIXELS, [1, 4], data=[1, 2, 3, 4])
    assert read(data, PIXELS).wanted == (Wanted(0, False), Wanted(1, False))
    assert read(data, PIXELS).id is None

    def wanted(**others: Any) -> Asked:
        return read(body_of(PIXELS, [1, 4], data=[1, 2, 3, 4], **others), PIXELS)

    assert wanted(id="7", outputs=[]).wanted == (Wanted(0, False), Wanted(1, False))
    assert wanted(id="7").id == "7"
    assert wanted(parameters={"binary_data_output": True}).wanted == (Wanted(0, True), Wanted(1, True))
    outputs = [{"name": "z", "parameters": {"binary_data": False}}, {"name": "y", "parameters": {"classification": 2}}]
    found = wanted(outputs=outputs, parameters={"binary_data_output": True})
    assert found.wanted == (Wanted(1, False), Wanted(0, True, 2))


def test_members_that_the_protocol_does_not_name_are_ignored() -> None:
    body = json.loads(body_of(PIXELS, [1, 4], data=[1, 2, 3, 4], new=[{}], parameters={"sequence_id": 7}))
    body["inputs"][0] |= {"new": None, "parameters": {"content_type": "np"}}
    body["outputs"] = [{"name": "y", "new": 1, "parameters": {"new": [1]}}]
    assert read(json.dumps(body).encode(), PIXELS).wanted == (Wanted(0, False),)


NUMBERS = [1, 2, 3, 4]
WRONG = [
    (body_of(PIXELS, [1, 4]), "either data or a binary_data_size"),
    (body_of(PIXELS, [1, 4], data=NUMBERS, size=0), "either data or a binary_data_size"),
    (body_of(PIXELS, [1, 4], data=NUMBERS) + b"x", "JSON is malformed"),
    (body_of(PIXELS, [1, 4], size=4), "4 B must follow the JSON as binary data, got 0 B"),
    (body_of(PIXELS, [1, 4], size=-4), "Expected `int` >= 0"),
    (body_of(PIXELS, [1, 4], size="4"), "Expected `int | null`, got `str`"),
    (body_of(PIXELS, [1, 4], size=2**62), "Expected `int` <= 2147483647"),
    (body_of(PIXELS, [4], data=NUMBERS), "shape must be [-1, 4], got [4]"),
    (body_of(PIXELS, [1] * 1000, data=NUMBERS), "shape must be [-1, 4], got 1000 sizes"),
    (body_of(PIXELS, [1, 2, 2], data=NUMBERS), "shape must be [-1, 4], got [1, 2, 2]"),
    (body_of(PIXELS, [-1, 4], data=NUMBERS), "Expected `int` >= 0"),
    (body_of(PIXELS, [2**31, 4], data=NUMBERS), "Expected `int` <= 2147483647"),
    (body_of(PIXELS, [0, 4], data=[]), "a request has 1 to 8 samples, got 0"),
    (body_of(PIXELS, [9, 4], data=[0] * 36), "a request has 1 to 8 samples, got 9"),
    (body_of(X, [1, 4], data=NUMBERS), 'datatype must be UINT8, got "FP32"'),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3]), "the data are not of shape [1, 4]"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, 4, 5]), "the data are not of shape [1, 4]"),
    (body_of(PIXELS, [2, 4], data=[[1, 2, 3], [4, 5, 6, 7, 8]]), "the data are not of shape [2, 4]"),
    (body_of(PIXELS, [2, 4], data=[[[1, 2, 3, 4], 5, 6, 7, 8]]), "Expected `int`, got `array` - at `$[0][0]`"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, 256]), "Expected `int` <= 255"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, -1]), "Expected `int` >= 0"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, 0.5]), "Expected `int`, got `float`"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, True]), "Expected `int`, got `bool`"),
    (body_of(PIXELS, [1, 4], data=[1, 2, 3, None]), "Expected `int`, got `null`"),
    (body_of(PIXELS, [1, 4], data="1,2,3,"), "the data are not of shape [1, 4]"),
    (body_of(PIXELS, [1, 4], data={"a": [1], "b": 2, "c": 3, "d": 4}), "Expected `array`, got `object`"),
    (b'{"inputs":[]}', 'the model has one input, "x", got none'),
    (b'{"inputs":7}', "Expected `array`, got `int`"),
    (b"{}", "missing required field `inputs`"),
    (b"", "the JSON must be 1 to 0 B of the body, got 0 B"),
    (b"[" * 50_000, "the JSON cannot be read"),
    (b'{"new":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "the JSON cannot be read: maximum recursion depth"),
    (b'{"inputs":[{"name":"\xff"}]}', "the JSON cannot be read: 'utf-8' codec"),
    (body_of(PIXELS, [1, 4], data=NUMBERS, id=7), "Expected `str | null`, got `int`"),
    (body_of(PIXELS, [1, 4], data=NUMBERS, id="x" * 1025), "Expected `str` of length <= 1024"),
    (body_of(PIXELS, [1, 4], data=NUMBERS, outputs=[{"name": "w"}]), 'outputs must be of "y", "z", got "w"'),
    (body_of(PIXELS, [1, 4], data=NUMBERS, outputs=[{"name": "y"}, {"name": "y"}]), '"y" is asked for twice'),
    (
        body_of(PIXELS, [1, 4], data=NUMBERS, outputs=[{"name": "y", "parameters": {"classification": 6}}]),
        'classification must be up to 5, got 6 ("y")',
    ),
]


@pytest.mark.parametrize(("body", "line"), WRONG, ids=[line[:30] for _, line in WRONG])
def test_what_fits_neither_protocol_nor_model_is_one_line(body: bytes, line: str) -> None:
    with pytest.raises(ProtocolError) as raised:
        read(body, PIXELS)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_two_inputs_or_another_one_are_refused() -> None:
    body = json.loads(body_of(PIXELS, [1, 4], data=NUMBERS))
    (tensor,) = body["inputs"]
    for inputs, shown in (([tensor, tensor], '"x", "x"'), ([{**tensor, "name": "w"}], '"w"')):
        with pytest.raises(ProtocolError, match=f'the model has one input, "x", got {shown}'):
            read(json.dumps({"inputs": inputs}).encode(), PIXELS)


@pytest.mark.parametrize("number", ["1e39", "-1e39", "1e308", "1e999", "NaN", "Infinity"])
def test_no_number_is_beyond_its_type(number: str) -> None:
    body = body_of(X, [1, 2, 3], data=[1, 2, 3, 4, 5, 6]).replace(b"6]", number.encode() + b"]")
    with pytest.raises(ProtocolError, match="beyond the range of FP32|cannot be read"):
        read(body)


@pytest.mark.parametrize(
    ("behind", "line"),
    [
        (b"", "3 elements are needed, got 0"),
        (b"\1\0\0", "3 B too many behind 0 of 3 elements"),
        (b"\1\0\0\0", "element 0 has 1 B, but 0 B are left"),
        (b"\xff\xff\xff\xff" + bytes(9), "element 0 has 4294967295 B, but 9 B are left"),
        (bytes(8), "3 elements are needed, got 2"),
        (bytes(16), "4 B too many behind 3 of 3 elements"),
        (bytes(13), "1 B too many behind 3 of 3 elements"),
    ],
)
def test_bytes_whose_lengths_do_not_add_up_are_refused(behind: bytes, line: str) -> None:
    text = body_of(FILES, [3], size=len(behind))
    with pytest.raises(ProtocolError, match=line):
        read(text + behind, FILES, json_bytes=len(text))


def test_binary_data_are_as_long_as_the_shape_says() -> None:
    for size in (0, 3, 5, 8):
        text = body_of(PIXELS, [1, 4], size=size)
        with pytest.raises(ProtocolError, match=f"1 samples have 4 B of binary data, got {size} B"):
            read(text + bytes(size), PIXELS, json_bytes=len(text))
    text = body_of(PIXELS, [1, 4], size=4)
    for behind in (3, 5):
        with pytest.raises(ProtocolError, match=f"4 B must follow the JSON as binary data, got {behind} B"):
            read(text + bytes(behind), PIXELS, json_bytes=len(text))
    flags = Port(name="x", datatype="BOOL", shape=(2,))
    text = body_of(flags, [1, 2], size=2)
    (found,) = read(text + b"\1\0", flags, json_bytes=len(text)).samples
    assert isinstance(found, np.ndarray) and found.tolist() == [[True, False]]
    with pytest.raises(ProtocolError, match="a BOOL is 0 or 1"):
        read(text + b"\2\0", flags, json_bytes=len(text))


# --- answers -----------------------------------------------------------------------------------------


def test_an_answer_byte_for_byte() -> None:
    y = np.array([[0.1, -2.0]], np.float32)
    z = np.array([-1], np.int64)
    plain, length = write_answer(
        "m", "1", "i", [Tensor("y", "FP32", (1, 2), y, False), Tensor("z", "INT64", (1,), z, False)]
    )
    assert length is None and plain == (
        b'{"id":"i","model_name":"m","model_version":"1","outputs":['
        b'{"name":"y","datatype":"FP32","shape":[1,2],"data":[0.10000000149011612,-2.0]},'
        b'{"name":"z","datatype":"INT64","shape":[1],"data":[-1]}]}'
    )
    mixed, length = write_answer(
        "m", "1", None, [Tensor("y", "FP32", (1, 2), y, True), Tensor("z", "INT64", (1,), z, False)]
    )
    text = (
        b'{"model_name":"m","model_version":"1","outputs":['
        b'{"name":"y","datatype":"FP32","shape":[1,2],"parameters":{"binary_data_size":8}},'
        b'{"name":"z","datatype":"INT64","shape":[1],"data":[-1]}]}'
    )
    assert length == len(text) and mixed == text + b"\xcd\xcc\xcc\x3d" + b"\0\0\0\xc0"


def test_bytes_of_an_answer() -> None:
    elements = [b"0.5:2:cat", b"-1.0:0"]
    body, length = write_answer("m", "1", None, [Tensor("y", BYTES, (1, 2), elements, True)])
    assert length is not None and body[length:] == b"\x09\0\0\x000.5:2:cat" + b"\x06\0\0\0-1.0:0"
    body, length = write_answer("m", "1", None, [Tensor("y", BYTES, (1, 2), elements, False)])
    assert length is None and json.loads(body)["outputs"][0]["data"] == ["0.5:2:cat", "-1.0:0"]


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_json_has_no_number_for_nan_and_infinity(value: float) -> None:
    tensor = Tensor("y", "FP32", (1, 1), np.array([[value]], np.float32), False)
    with pytest.raises(ProtocolError, match='output "y" holds NaN or infinity: ask for it as binary_data'):
        write_answer("m", "1", None, [tensor])
    body, length = write_answer("m", "1", None, [tensor._replace(is_binary=True)])
    assert length is not None and np.frombuffer(body[length:], "<f4").tobytes() == np.float32(value).tobytes()


def test_best_classes_come_greatest_first_and_of_equals_the_first() -> None:
    values = np.array([[0.5, 2.0, 2.0, -1.0], [3.0, 1.0, 0.0, 7.5]], np.float32)
    assert best_classes(values, 3, ()) == [b"2.0:1", b"2.0:2", b"0.5:0", b"7.5:3", b"3.0:0", b"1.0:1"]
    assert best_classes(values, 1, "abcd") == [b"2.0:1:b", b"7.5:3:d"]
    assert best_classes(np.array([[1, 250]], np.uint8), 1, ()) == [b"250:1"]


# --- round trips -------------------------------------------------------------------------------------

ARRAYS = st.sampled_from(sorted(DATATYPES)).flatmap(
    lambda name: hnp.arrays(np.dtype(name), hnp.array_shapes(min_dims=1, max_dims=4, max_side=4))
)


@settings(max_examples=300, deadline=None)
@given(array=ARRAYS, is_binary=st.booleans(), padding=st.integers(0, 7))
def test_what_is_sent_is_what_is_read(array: np.ndarray, is_binary: bool, padding: int) -> None:
    port = Port(name="x", datatype=DATATYPES[array.dtype.name], shape=array.shape[1:])
    if is_binary:
        text = body_of(port, list(array.shape), size=array.nbytes) + b" " * padding
        found = read(text + array.tobytes(), port, json_bytes=len(text)).samples
    else:
        array = np.nan_to_num(array, posinf=0, neginf=0)
        found = read(body_of(port, list(array.shape), data=array.tolist()), port).samples
    assert np.concatenate(found).tobytes() == array.tobytes()
    assert np.concatenate(found).dtype == array.dtype


@settings(max_examples=300, deadline=None)
@given(arrays=st.lists(st.tuples(ARRAYS, st.booleans()), min_size=1, max_size=3))
def test_tritonclient_reads_what_is_written(arrays: list[tuple[np.ndarray, bool]]) -> None:
    tensors = [
        Tensor(f"y{place}", DATATYPES[array.dtype.name], array.shape, array, is_binary or not np.isfinite(array).all())
        for place, (array, is_binary) in enumerate(arrays)
    ]
    body, length = write_answer("m", "1", None, tensors)
    result = InferResult.from_response_body(body, header_length=length)
    for tensor in tensors:
        found = result.as_numpy(tensor.name)
        assert found.dtype.name == np.asarray(tensor.values).dtype.name and found.shape == tensor.shape
        assert found.tobytes() == np.asarray(tensor.values).tobytes()


@settings(max_examples=500, deadline=None)
@given(body=st.binary(max_size=300), json_bytes=st.none() | st.integers(0, 400), is_file=st.booleans())
def test_any_bytes_are_read_or_refused(body: bytes, json_bytes: int | None, is_file: bool) -> None:
    try:
        asked = read(body, FILES if is_file else PIXELS, json_bytes=json_bytes)
    except ProtocolError as error:
        assert "\n" not in str(error)
        return
    assert 1 <= len(asked.samples) <= 8


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
TREES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner))


@settings(max_examples=500, deadline=None)
@given(
    shape=TREES | st.just([1, 4]), data=TREES | st.just(NUMBERS), parameters=TREES | st.just({}),
    outputs=TREES | st.just([]), behind=st.binary(max_size=9),
)  # fmt: skip
def test_any_members_are_read_or_refused(shape: Any, data: Any, parameters: Any, outputs: Any, behind: bytes) -> None:
    tensor = {"name": "x", "datatype": "UINT8", "shape": shape, "data": data, "parameters": parameters}
    text = json.dumps({"inputs": [tensor], "outputs": outputs, "parameters": parameters}).encode()
    try:
        asked = read(text + behind, PIXELS, json_bytes=len(text))
    except ProtocolError:
        return
    (sample,) = asked.samples
    assert isinstance(sample, np.ndarray) and sample.shape == (1, 4)


def test_lengths_are_little_endian() -> None:
    assert struct.pack("<I", 258) == b"\2\1\0\0"
    text = body_of(FILES, [1], size=262)
    assert read(text + b"\2\1\0\0" + bytes(258), FILES, json_bytes=len(text)).samples == [bytes(258)]
