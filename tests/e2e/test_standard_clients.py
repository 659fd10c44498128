"""Other people's clients against an edge: tritonclient as it is installed, curl's and plain HTTP.

Every answer is compared with ONNX Runtime's own on the same input and the same file of the bundle, bit for bit.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import io
import json
import re
import shlex
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tritonclient.http as triton
from onnx import TensorProto, helper, numpy_helper
from PIL import Image, PngImagePlugin
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from tritonclient.utils import InferenceServerException

import coinfer
from coinfer.bundle import Bundle, write_manifest
from coinfer.plan import CodecSpec, Plan
from coinfer.runtime.app import EdgeLimits, make_app
from coinfer.runtime.device import Device
from coinfer.runtime.spawn import EdgeProcess
from http_edge import PATIENCE_S, served, serving
from http_edge import ask as request
from tiny_bundle import CLASSES, INPUT, MENU, UPLOAD, make_tiny_bundle, pictures

PNG, WEBP, WEBP_LOSSLESS, JPEG, JPEG_BARE = range(20, 25)
CODECS = {
    PNG: CodecSpec(transform="image", coder="png"),
    WEBP: CodecSpec(transform="image", coder="webp", quality=90),
    WEBP_LOSSLESS: CodecSpec(transform="image", coder="webp-lossless"),
    JPEG: CodecSpec(transform="image", coder="jpeg", quality=90),
    JPEG_BARE: CodecSpec(transform="image", coder="jpeg-bare", quality=90),
}
UPLOADS = tuple(
    Plan(number=number, kind="upload", variant="tiny", tail="segments/whole.onnx", codec=codec, crossing=(INPUT,))
    for number, codec in CODECS.items()
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The tiny bundle, with an upload plan for each format of picture files."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "uploads", menu=(*MENU, *UPLOADS))


@pytest.fixture(scope="module")
def edge(bundle: Bundle) -> Iterator[EdgeProcess]:
    with EdgeProcess(bundle.folder, workers=2, max_batch=4) as process:
        yield process


def address(edge: EdgeProcess) -> str:
    return edge.url.removeprefix("ws://")


@pytest.fixture
def client(edge: EdgeProcess) -> Iterator[triton.InferenceServerClient]:
    with triton.InferenceServerClient(address(edge), concurrency=4, network_timeout=PATIENCE_S) as client:
        yield client


def reference(bundle: Bundle, xs: np.ndarray) -> np.ndarray:
    """The logits of each picture, from ONNX Runtime alone, one at a time."""
    session = ort.InferenceSession(bundle.path("segments/whole.onnx"), providers=["CPUExecutionProvider"])
    return np.concatenate([session.run(["logits"], {"input": x[None]})[0] for x in xs])


def asked(xs: np.ndarray, *, binary: bool = True, name: str = "input", datatype: str = "UINT8") -> list[Any]:
    tensor = triton.InferInput(name, list(xs.shape), datatype)
    tensor.set_data_from_numpy(xs, binary_data=binary)
    return [tensor]


def files_of(*contents: bytes) -> list[Any]:
    tensor = triton.InferInput("input", [len(contents)], "BYTES")
    tensor.set_data_from_numpy(np.array(contents, dtype=np.object_), binary_data=True)
    return [tensor]


def refused(call: Callable[[], object]) -> tuple[str, str]:
    """Status and line of what tritonclient raises."""
    with pytest.raises(InferenceServerException) as raised:
        call()
    return raised.value.status(), raised.value.message()


def json_request(xs: np.ndarray, **others: Any) -> bytes:
    tensor = {"name": "input", "shape": list(xs.shape), "datatype": "UINT8", "data": xs.tolist()}
    return json.dumps({"inputs": [tensor], **others}).encode()


# --- tritonclient: health and metadata ---------------------------------------------------------------


def test_tritonclient_sees_a_server_that_lives(client: triton.InferenceServerClient) -> None:
    assert client.is_server_live() is True
    assert client.is_server_ready() is True
    assert client.is_model_ready("tiny") is True
    assert client.is_model_ready("tiny", "1") is True
    assert client.is_model_ready("tiny", "2") is False
    assert client.is_model_ready("other") is False


def test_tritonclient_reads_the_servers_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_server_metadata()
    assert (metadata["name"], metadata["version"]) == ("coinfer", coinfer.__version__)
    assert "binary_tensor_data" in metadata["extensions"]


def test_tritonclient_reads_a_models_metadata(client: triton.InferenceServerClient) -> None:
    metadata = client.get_model_metadata("tiny")
    assert metadata["name"] == "tiny" and metadata["versions"] == ["1"]
    assert metadata["inputs"] == [{"name": "input", "datatype": "UINT8", "shape": [-1, 8, 8, 3]}]
    assert metadata["outputs"] == [{"name": "logits", "datatype": "FP32", "shape": [-1, CLASSES]}]
    assert metadata["parameters"]["plan"] == UPLOAD
    assert client.get_model_metadata("tiny", "1") == metadata
    assert client.get_model_metadata("tiny.plan23.jpeg")["inputs"] == [
        {"name": "input", "datatype": "BYTES", "shape": [-1]}
    ]


def test_tritonclient_reads_a_models_configuration(client: triton.InferenceServerClient) -> None:
    config = client.get_model_config("tiny")
    assert config["max_batch_size"] == 256
    assert config["input"] == [{"name": "input", "data_type": "TYPE_UINT8", "dims": [8, 8, 3]}]
    assert config["output"] == [{"name": "logits", "data_type": "TYPE_FP32", "dims": [CLASSES]}]


def test_tritonclient_lists_the_models(client: triton.InferenceServerClient) -> None:
    names = [model["name"] for model in client.get_model_repository_index()]
    assert names == [
        "tiny", "tiny.plan20.png", "tiny.plan21.webp", "tiny.plan22.webp", "tiny.plan23.jpeg", "tiny.plan24.jpeg",
    ]  # fmt: skip


def test_what_is_not_offered_is_not_there(client: triton.InferenceServerClient) -> None:
    status, line = refused(lambda: client.get_model_metadata("other"))
    assert status == "404" and line.startswith("models are tiny, ") and 'got "other"' in line
    status, line = refused(lambda: client.get_model_metadata("tiny", "7"))
    assert (status, line) == ("404", 'model "tiny" has version 1, got "7"')
    status, line = refused(client.get_log_settings)
    assert (status, line) == ("404", "there is nothing at /v2/logging")


# --- tritonclient: inference -------------------------------------------------------------------------


@pytest.mark.parametrize("is_binary_in", [True, False])
@pytest.mark.parametrize("is_binary_out", [True, False, None])
@pytest.mark.parametrize("count", [1, 7])
def test_tritonclient_infers_the_references_bits(
    bundle: Bundle, client: triton.InferenceServerClient, is_binary_in: bool, is_binary_out: bool | None, count: int
) -> None:
    xs = pictures(count, seed=count)
    outputs = None
    if is_binary_out is not None:
        outputs = [triton.InferRequestedOutput("logits", binary_data=is_binary_out)]
    result = client.infer("tiny", asked(xs, binary=is_binary_in), outputs=outputs, request_id="a-7")
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(bundle, xs), strict=True)
    response = result.get_response()
    assert (response["id"], response["model_name"], response["model_version"]) == ("a-7", "tiny", "1")
    has_size = "binary_data_size" in response["outputs"][0].get("parameters", {})
    assert has_size is (is_binary_out is not False)


def test_tritonclient_infers_in_the_background(bundle: Bundle, client: triton.InferenceServerClient) -> None:
    xs = pictures(40, seed=3)
    asking = [client.async_infer("tiny", asked(xs[k : k + 2], binary=k % 4 == 0)) for k in range(0, 40, 2)]
    found = [one.get_result(timeout=PATIENCE_S).as_numpy("logits") for one in asking]
    np.testing.assert_array_equal(np.concatenate(found), reference(bundle, xs), strict=True)


def test_tritonclient_takes_other_parameters_along(bundle: Bundle, client: triton.InferenceServerClient) -> None:
    xs = pictures(2)
    result = client.infer("tiny", asked(xs), priority=2, timeout=10_000_000, parameters={"mine": "x"})
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(bundle, xs), strict=True)


@pytest.mark.parametrize("is_binary", [True, False])
def test_tritonclient_asks_for_the_best_classes(
    bundle: Bundle, client: triton.InferenceServerClient, is_binary: bool
) -> None:
    xs = pictures(3)
    wanted = [triton.InferRequestedOutput("logits", binary_data=is_binary, class_count=2)]
    found = client.infer("tiny", asked(xs), outputs=wanted).as_numpy("logits")
    logits = reference(bundle, xs)
    expected = [
        [f"{row[k]}:{k}:{'abcde'[k]}" for k in np.argsort(-row, kind="stable")[:2]] for row in logits
    ]
    assert [[item.decode() if is_binary else item for item in row] for row in found] == expected


def encoded(x: np.ndarray, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(x).save(file, **options)
    return file.getvalue()


TEXT = PngImagePlugin.PngInfo()
TEXT.add_text("Software", "a camera's")
FILES = {
    PNG: {"format": "PNG", "dpi": (72, 72), "pnginfo": TEXT},
    WEBP: {"format": "WEBP", "quality": 60},
    WEBP_LOSSLESS: {"format": "WEBP", "lossless": True},
    JPEG: {"format": "JPEG", "quality": 70},
    # Another quality, subsampling and tables than the plan's own codec has.
    JPEG_BARE: {"format": "JPEG", "quality": 75, "subsampling": 0, "optimize": True, "comment": b"a camera's"},
}


@pytest.mark.parametrize("number", FILES)
def test_picture_files_are_what_a_decoder_makes_of_them(
    bundle: Bundle, client: triton.InferenceServerClient, number: int
) -> None:
    contents = [encoded(x, **FILES[number]) for x in pictures(5)]
    xs = np.stack([np.array(Image.open(io.BytesIO(content)).convert("RGB")) for content in contents])
    suffix = {PNG: "png", WEBP: "webp", WEBP_LOSSLESS: "webp"}.get(number, "jpeg")
    result = client.infer(f"tiny.plan{number}.{suffix}", files_of(*contents))
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(bundle, xs), strict=True)


def test_the_plans_own_bare_jpeg_is_a_file_like_any_other(bundle: Bundle, client: triton.InferenceServerClient) -> None:
    content = encoded(pictures(1)[0], format="JPEG", quality=90)
    xs = np.array(Image.open(io.BytesIO(content)))[None]
    result = client.infer("tiny.plan24.jpeg", files_of(content))
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(bundle, xs), strict=True)


# --- tritonclient: what does not fit -----------------------------------------------------------------


def test_a_wrong_shape_is_one_line(client: triton.InferenceServerClient) -> None:
    for tensors in (asked(pictures(1)[0], binary=True), asked(pictures(1)[0], binary=False)):
        status, line = refused(partial(client.infer, "tiny", tensors))
        assert (status, line) == ("400", 'shape must be [-1, 8, 8, 3], got [8, 8, 3] (input "input")')
    status, line = refused(lambda: client.infer("tiny", asked(np.zeros((1, 8, 3, 8), np.uint8))))
    assert (status, line) == ("400", 'shape must be [-1, 8, 8, 3], got [1, 8, 3, 8] (input "input")')
    status, line = refused(lambda: client.infer("tiny", asked(np.zeros((257, 8, 8, 3), np.uint8))))
    assert (status, line) == ("400", 'a request has 1 to 256 samples, got 257 (input "input")')


def test_a_wrong_name_is_one_line(client: triton.InferenceServerClient) -> None:
    xs = pictures(1)
    status, line = refused(lambda: client.infer("other", asked(xs)))
    assert status == "404" and 'got "other"' in line
    status, line = refused(lambda: client.infer("tiny", asked(xs), model_version="2"))
    assert (status, line) == ("404", 'model "tiny" has version 1, got "2"')
    status, line = refused(lambda: client.infer("tiny", asked(xs, name="image")))
    assert (status, line) == ("400", 'the model has one input, "input", got "image"')
    outputs = [triton.InferRequestedOutput("scores")]
    status, line = refused(lambda: client.infer("tiny", asked(xs), outputs=outputs))
    assert (status, line) == ("400", 'outputs must be of "logits", got "scores"')


def test_a_wrong_datatype_is_one_line(client: triton.InferenceServerClient) -> None:
    xs = pictures(1).astype(np.float32)
    for tensors in (asked(xs, datatype="FP32"), asked(xs, binary=False, datatype="FP32")):
        status, line = refused(partial(client.infer, "tiny", tensors))
        assert (status, line) == ("400", 'datatype must be UINT8, got "FP32" (input "input")')
    status, line = refused(lambda: client.infer("tiny.plan20.png", asked(pictures(1))))
    assert (status, line) == ("400", 'datatype must be BYTES, got "UINT8" (input "input")')


def test_an_over_large_body_is_refused_and_the_connection_lives_on(
    bundle: Bundle, client: triton.InferenceServerClient
) -> None:
    large = np.zeros((100_000, 8, 8, 3), np.uint8)
    status, line = refused(lambda: client.infer("tiny", asked(large)))
    assert status == "413" and line.startswith("a body may have 16777216 B, got 19200")
    xs = pictures(1)
    np.testing.assert_array_equal(client.infer("tiny", asked(xs)).as_numpy("logits"), reference(bundle, xs))


def test_over_large_json_is_told_of_binary_data(client: triton.InferenceServerClient) -> None:
    large = np.full((30_000, 8, 8, 3), 200, np.uint8)[:10_000]
    status, line = refused(lambda: client.infer("tiny", asked(large, binary=False)))
    assert (status, line) == ("413", "JSON may have 4194304 B: send tensors as binary data")


@pytest.mark.parametrize("coding", ["gzip", "deflate"])
def test_a_compressed_body_is_refused(client: triton.InferenceServerClient, coding: str) -> None:
    status, line = refused(lambda: client.infer("tiny", asked(pictures(1)), request_compression_algorithm=coding))
    assert (status, line) == ("415", f'a body is sent as it is, got Content-Encoding "{coding}"')


def test_a_client_that_would_take_compressed_answers_gets_plain_ones(
    bundle: Bundle, client: triton.InferenceServerClient
) -> None:
    xs = pictures(1)
    result = client.infer("tiny", asked(xs), response_compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("logits"), reference(bundle, xs), strict=True)


def bomb() -> bytes:
    """A PNG of 20,000 x 20,000 pixels in a few hundred bytes, as far as it goes."""
    file = encoded(np.zeros((1, 1, 3), np.uint8), format="PNG")
    return file[:16] + struct.pack(">II", 20_000, 20_000) + file[24:]


@pytest.mark.parametrize(
    ("model", "content", "line"),
    [
        ("tiny.plan20.png", b"", "0 B that are no PNG picture"),
        ("tiny.plan20.png", bytes(100), "100 B that are no PNG picture"),
        ("tiny.plan20.png", bomb(), "PNG"),
        ("tiny.plan20.png", bytes(5000), "a picture file may have 4480 B, got 5000 B"),
        ("tiny.plan21.webp", bytes(100), "100 B that are no still WebP picture"),
        ("tiny.plan23.jpeg", bytes(100), "a JPEG picture is baseline"),
        ("tiny.plan23.jpeg", encoded(pictures(1)[0], format="JPEG", progressive=True), "a JPEG picture is baseline"),
        ("tiny.plan24.jpeg", encoded(np.zeros((9, 8, 3), np.uint8), format="JPEG"), "the picture must be RGB (8, 8)"),
        ("tiny.plan23.jpeg", encoded(np.zeros((8, 8), np.uint8), format="JPEG"), "the picture must be RGB (8, 8)"),
        ("tiny.plan21.webp", encoded(np.zeros((8, 8, 3), np.uint8), format="WEBP", lossless=True), "no still WebP"),
        ("tiny.plan22.webp", encoded(np.zeros((8, 9, 3), np.uint8), format="WEBP", lossless=True), "must be (8, 8)"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)}B",
)
def test_a_file_that_is_no_such_picture_is_one_line(
    client: triton.InferenceServerClient, model: str, content: bytes, line: str
) -> None:
    status, message = refused(lambda: client.infer(model, files_of(content)))
    assert status == "400" and line in message and message.endswith("(sample 0)")
    assert "0x" not in message


# --- plain HTTP --------------------------------------------------------------------------------------


def test_a_body_without_json_is_the_input_itself(bundle: Bundle, edge: EdgeProcess) -> None:
    xs = pictures(3)
    header = {"Inference-Header-Content-Length": "0"}
    status, _, body = request(address(edge), "POST", "/v2/models/tiny/infer", xs.tobytes(), header)
    found = np.array(json.loads(body)["outputs"][0]["data"], np.float32).reshape(3, CLASSES)
    assert status == 200
    np.testing.assert_array_equal(found, reference(bundle, xs))
    content = encoded(xs[0], format="PNG")
    status, _, body = request(address(edge), "POST", "/v2/models/tiny.plan20.png/infer", content, header)
    found = np.array(json.loads(body)["outputs"][0]["data"], np.float32)[None]
    np.testing.assert_array_equal(found, reference(bundle, xs[:1]))


def test_json_numbers_are_flat_or_nested_and_what_is_unknown_is_ignored(bundle: Bundle, edge: EdgeProcess) -> None:
    xs = pictures(2)
    tensor = {"name": "input", "shape": [2, 8, 8, 3], "datatype": "UINT8", "data": xs.ravel().tolist(), "new": [1]}
    flat = json.dumps({"inputs": [tensor], "model_name": "x", "new": {"deep": [{}]}, "parameters": {"new": 1}}).encode()
    for body in (flat, json_request(xs), json_request(xs, outputs=[])):
        status, _, answer = request(address(edge), "POST", "/v2/models/tiny/versions/1/infer", body)
        assert status == 200 and "id" not in json.loads(answer)
        found = np.array(json.loads(answer)["outputs"][0]["data"], np.float32).reshape(2, CLASSES)
        np.testing.assert_array_equal(found, reference(bundle, xs))


@pytest.mark.parametrize(
    ("body", "headers", "line"),
    [
        (b"", {}, "the JSON must be 1 to 0 B of the body, got 0 B"),
        (b"\x00", {}, "the JSON cannot be read: JSON is malformed"),
        (b"[" * 100_000, {}, "the JSON cannot be read: "),
        (b'{"inputs":[]}', {}, 'the model has one input, "input", got none'),
        (json_request(pictures(1)), {"Inference-Header-Content-Length": "1000000"}, "must be up to"),
        (json_request(pictures(1)), {"Inference-Header-Content-Length": "-1"}, "must be a number of bytes"),
        (json_request(pictures(1)), {"Inference-Header-Content-Length": "9" * 5000}, "must be a number of bytes"),
        (json_request(pictures(1)), {"Inference-Header-Content-Length": "5"}, "the JSON cannot be read"),
        (json_request(pictures(1)).replace(b"[[[[", b"[[[[NaN,"), {}, "the JSON cannot be read: JSON is malformed"),
        (json_request(pictures(1)).replace(b"[[[[", b"[[[[7,"), {}, "the data are not of shape [1, 8, 8, 3]"),
        (json_request(pictures(1)).replace(b"[[[[", b"[[[[256,", 1).replace(b"]]]]", b"]]],0]", 1), {}, "the data are"),
        (bytes(191), {"Inference-Header-Content-Length": "0"}, "a request has 1 to 256 samples, got 0"),
        (bytes(193), {"Inference-Header-Content-Length": "0"}, "1 samples have 192 B of binary data, got 193 B"),
    ],
)
def test_what_is_no_request_is_one_line(edge: EdgeProcess, body: bytes, headers: dict[str, str], line: str) -> None:
    status, kind, answer = request(address(edge), "POST", "/v2/models/tiny/infer", body, headers)
    assert status == 400 and kind["content-type"] == "application/json"
    found = json.loads(answer)
    assert list(found) == ["error"] and line in found["error"] and "\n" not in found["error"]


def test_other_methods_and_paths_are_one_line_of_json(edge: EdgeProcess) -> None:
    status, headers, body = request(address(edge), "GET", "/v2/models/tiny/infer")
    assert (status, headers["allow"], json.loads(body)) == (405, "POST", {"error": "Method Not Allowed"})
    status, _, body = request(address(edge), "GET", "/v2/nothing")
    assert (status, json.loads(body)) == (404, {"error": "there is nothing at /v2/nothing"})


def test_a_chunked_body_is_capped_while_it_is_read(bundle: Bundle, edge: EdgeProcess) -> None:
    def chunks(count: int) -> Iterator[bytes]:
        yield from (bytes(1 << 20) for _ in range(count))

    connection = http.client.HTTPConnection(address(edge), timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request("POST", "/v2/models/tiny/infer", chunks(20), {}, encode_chunked=True)
        answer = connection.getresponse()
        assert answer.status == 413 and "a body may have 16777216 B" in json.load(answer)["error"]
    xs = pictures(1)
    connection = http.client.HTTPConnection(address(edge), timeout=PATIENCE_S)
    with contextlib.closing(connection):
        body = json_request(xs)
        parts = iter([body[:7], body[7:]])
        connection.request("POST", "/v2/models/tiny/infer", parts, {}, encode_chunked=True)
        found = json.load(connection.getresponse())["outputs"][0]["data"]
    np.testing.assert_array_equal(np.array(found, np.float32)[None], reference(bundle, xs))


def test_a_huge_length_is_refused_before_anything_is_sent(edge: EdgeProcess) -> None:
    host, port = address(edge).split(":")
    with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
        raw.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999\r\n\r\n")
        answer = raw.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 413 " in head.splitlines()[0] and b"connection: close" in head.lower()
    assert json.loads(body)["error"] == "a body may have 16777216 B, got 99999999999999 B"


def test_requests_through_this_door_are_counted(bundle: Bundle, edge: EdgeProcess) -> None:
    def counted() -> dict[tuple[str, ...], float]:
        page = request(address(edge), "GET", "/metrics")[2].decode()
        return {
            (sample.labels["door"], sample.labels["plan"], sample.labels["outcome"]): sample.value
            for family in text_string_to_metric_families(page)
            for sample in family.samples
            if sample.name == "coinfer_requests_total"
        }

    before = counted()
    assert request(address(edge), "POST", "/v2/models/tiny/infer", json_request(pictures(3)))[0] == 200
    after = counted()
    answered = ("http", str(UPLOAD), "answered")
    assert after[answered] - before.get(answered, 0.0) == 3
    assert {key: value for key, value in after.items() if key != answered} == {
        key: value for key, value in before.items() if key != answered
    }


def test_links_and_http_share_one_edge(bundle: Bundle, edge: EdgeProcess) -> None:
    xs = pictures(60, seed=5)
    expected = reference(bundle, xs)
    found: dict[str, np.ndarray] = {}

    def by_http() -> None:
        with triton.InferenceServerClient(address(edge)) as mine:
            batches = [mine.infer("tiny", asked(xs[k : k + 4])) for k in range(0, 60, 4)]
            found["http"] = np.concatenate([batch.as_numpy("logits") for batch in batches])

    thread = threading.Thread(target=by_http)
    thread.start()
    with Device(bundle, edge=edge.url, plan=UPLOAD, timeout_s=PATIENCE_S) as device:
        found["link"] = np.concatenate([answer.outputs[0] for answer in device.stream(iter(xs))])
    thread.join()
    np.testing.assert_array_equal(found["http"], expected)
    np.testing.assert_array_equal(found["link"], expected)


# --- an edge in this process, to be drained, loaded and replaced -------------------------------------


class OneToken:
    """A door for one device."""

    def device_of(self, authorization: str | None) -> str | None:
        return "camera-7" if authorization == "Bearer secret" else None

    def is_known(self, device: str) -> bool:
        return device == "camera-7"


def test_every_route_but_health_needs_a_token(tiny_bundle: Bundle) -> None:
    app = make_app(tiny_bundle, door=OneToken())
    body = json_request(pictures(1))
    with served(app) as where:
        for path in ("/v2/health/live", "/v2/health/ready", "/healthz", "/readyz"):
            assert request(where, "GET", path)[0] == 200
        routes = [(sorted(r.methods)[0], r.path) for r in app.routes if getattr(r, "methods", None)]
        guarded = [(method, path) for method, path in routes if path.startswith("/v2") and "health" not in path]
        assert len(guarded) == 11
        for method, path in guarded:
            path = path.format(model="tiny", version="1")
            for headers in ({}, {"Authorization": "Bearer wrong"}):
                status, head, answer = request(where, method, path, body if method == "POST" else None, headers)
                assert status == 401 and head["www-authenticate"] == "Bearer" and "token" in json.loads(answer)["error"]
            headers = {"Authorization": "Bearer secret"}
            sent = (body if path.endswith("infer") else b"{}") if method == "POST" else None
            assert request(where, method, path, sent, headers)[0] == 200
        client = triton.InferenceServerClient(where)
        with contextlib.closing(client):
            xs = pictures(2)
            found = client.infer("tiny", asked(xs), headers={"Authorization": "Bearer secret"}).as_numpy("logits")
            np.testing.assert_array_equal(found, reference(tiny_bundle, xs))
            assert refused(lambda: client.infer("tiny", asked(xs)))[0] == "401"


def test_an_edge_that_drains_is_not_ready_and_refuses(tiny_bundle: Bundle) -> None:
    app = make_app(tiny_bundle)
    with served(app) as where:
        app.state.edge.is_ready = False
        assert request(where, "GET", "/v2/health/live")[0] == 200
        for path in ("/v2/health/ready", "/v2/models/tiny/ready"):
            assert request(where, "GET", path)[0] == 503
        status, headers, body = request(where, "POST", "/v2/models/tiny/infer", json_request(pictures(1)))
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body) == {"error": "this edge is going away"}


def test_a_body_that_does_not_come_is_given_up(tiny_bundle: Bundle) -> None:
    app = make_app(tiny_bundle, limits=EdgeLimits(hello_s=0.2))
    with served(app) as where:
        host, port = where.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
            raw.sendall(b"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            answer = raw.makefile("rb").read()
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b" 408 " in head.splitlines()[0] and b"connection: close" in head.lower()
    assert json.loads(body) == {"error": "the body did not arrive within 0.2 s"}


def eventually(is_so: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + PATIENCE_S
    while not is_so():
        assert time.monotonic() < deadline_s
        threading.Event().wait(0.01)


class Gate:
    """A pace that computes nothing before it is opened."""

    lag_s = 0.0

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.begun = threading.Semaphore(0)

    def run(self, work: str, call: Callable[[], Any], rehearsal: Any = None, *, is_urgent: bool = False) -> Any:
        self.begun.release()
        assert self.opened.wait(PATIENCE_S)
        return call()


@contextlib.contextmanager
def asking(where: str, xs: np.ndarray) -> Iterator[dict[str, Any]]:
    """A request in a thread of its own; its status and body are there once the block is left."""
    found: dict[str, Any] = {}

    def ask() -> None:
        found["status"], found["headers"], found["body"] = request(
            where, "POST", "/v2/models/tiny/infer", json_request(xs)
        )

    thread = threading.Thread(target=ask)
    thread.start()
    yield found
    thread.join()


def outputs_of(found: dict[str, Any]) -> np.ndarray:
    assert found["status"] == 200, found
    return np.array(json.loads(found["body"])["outputs"][0]["data"], np.float32).reshape(-1, CLASSES)


def test_a_request_has_so_many_samples_with_the_workers_at_once(tiny_bundle: Bundle) -> None:
    gate = Gate()
    app = make_app(tiny_bundle, pace=gate, limits=EdgeLimits(in_flight=3))
    xs = pictures(10)
    with served(app) as where:
        with asking(where, xs) as found:
            assert gate.begun.acquire(timeout=PATIENCE_S)
            eventually(lambda: app.state.edge.serving.workers.num_waiting == 2)
            gate.opened.set()
    np.testing.assert_array_equal(outputs_of(found), reference(tiny_bundle, xs))


def test_what_the_workers_have_no_room_for_is_refused_with_a_time(tiny_bundle: Bundle) -> None:
    gate = Gate()
    headers = {"Authorization": "Bearer secret"}
    # The bodies of two pictures of 192 B, and of no third.
    app = make_app(tiny_bundle, pace=gate, limits=EdgeLimits(device_bytes=400), door=OneToken())
    with served(app) as where:
        raw = {**headers, "Inference-Header-Content-Length": "0"}
        threads = [
            threading.Thread(target=request, args=(where, "POST", "/v2/models/tiny/infer", bytes(192), raw))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        assert gate.begun.acquire(timeout=PATIENCE_S)
        eventually(lambda: app.state.edge.serving.workers.num_waiting == 1)
        status, said, answer = request(where, "POST", "/v2/models/tiny/infer", bytes(192), raw)
        assert status == 503 and int(said["retry-after"]) >= 1 and "of this device" in json.loads(answer)["error"]
        assert b'coinfer_refused_total{reason="busy"} 1.0' in request(where, "GET", "/metrics", None, headers)[2]
        gate.opened.set()
        for thread in threads:
            thread.join()


def test_a_client_that_goes_away_takes_its_requests_along(tiny_bundle: Bundle) -> None:
    gate = Gate()
    app = make_app(tiny_bundle, pace=gate)
    workers = app.state.edge.serving.workers
    body = json_request(pictures(8))
    with served(app) as where:
        host, port = where.split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as raw:
            head = f"POST /v2/models/tiny/infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            raw.sendall(head.encode() + body)
            assert gate.begun.acquire(timeout=PATIENCE_S)
            eventually(lambda: workers.num_waiting == 7)
        eventually(lambda: not app.state.edge.serving.guests)
        gate.opened.set()
        eventually(lambda: workers.num_waiting == 0)
        xs = pictures(1)
        with asking(where, xs) as found:
            pass
        # Of the eight, the one that had begun and no other; the last is its successor's.
        assert sum(1 for _ in iter(lambda: gate.begun.acquire(blocking=False), False)) == 1
    np.testing.assert_array_equal(outputs_of(found), reference(tiny_bundle, xs))


def test_an_edge_that_ends_answers_what_it_has_taken(tiny_bundle: Bundle) -> None:
    gate = Gate()
    app = make_app(tiny_bundle, pace=gate)
    edge, xs = app.state.edge, pictures(3)
    with serving(app) as (where, server), asking(where, xs) as found:
        assert gate.begun.acquire(timeout=PATIENCE_S)
        eventually(lambda: edge.serving.workers.num_waiting == 2)
        server.should_exit = True
        eventually(lambda: not edge.is_ready)
        gate.opened.set()
    np.testing.assert_array_equal(outputs_of(found), reference(tiny_bundle, xs))


def test_what_was_begun_outlives_a_reload(tiny_bundle: Bundle, tmp_path: Path) -> None:
    fresh = make_tiny_bundle(tmp_path / "fresh", seed=7)
    gate = Gate()
    app = make_app(tiny_bundle, pace=gate)
    xs = pictures(3)
    loop: list[asyncio.AbstractEventLoop] = []

    async def see(request: Request) -> Response:
        loop.append(asyncio.get_running_loop())
        return Response()

    app.router.routes.append(Route("/loop", see))
    with served(app) as where:
        assert request(where, "GET", "/loop")[0] == 200
        with asking(where, xs) as found:
            assert gate.begun.acquire(timeout=PATIENCE_S)
            reloading = asyncio.run_coroutine_threadsafe(app.state.edge.reload(fresh), loop[0])
            eventually(lambda: app.state.edge.bundle is fresh)
            gate.opened.set()
        reloading.result(PATIENCE_S)
        with asking(where, xs) as after:
            pass
    np.testing.assert_array_equal(outputs_of(found), reference(tiny_bundle, xs))
    np.testing.assert_array_equal(outputs_of(after), reference(fresh, xs))


def test_a_request_that_took_long_does_not_shut_an_idle_edge(tiny_bundle: Bundle) -> None:
    # Everything takes longer than that.
    app = make_app(tiny_bundle, limits=EdgeLimits(max_wait_s=1e-9))
    xs = pictures(1)
    with served(app) as where:
        for _ in range(3):
            with asking(where, xs) as found:
                pass
            np.testing.assert_array_equal(outputs_of(found), reference(tiny_bundle, xs))


def failing_network(path: Path) -> None:
    """Logits are a row of a table of 200, by the first byte of the picture: from 200 on there is none."""
    table = np.arange(1000, dtype=np.float32).reshape(200, CLASSES)
    constants = {"table": table, "zero": np.zeros(1, np.int64), "one": np.ones(1, np.int64)}
    nodes = [
        helper.make_node("Flatten", ["input"], ["bytes"]),
        helper.make_node("Gather", ["bytes", "zero"], ["first"], axis=1),
        helper.make_node("Cast", ["first"], ["row"], to=TensorProto.INT64),
        helper.make_node("Gather", ["table", "row"], ["rows"]),
        helper.make_node("Squeeze", ["rows", "one"], ["logits"]),
    ]
    ins = [helper.make_tensor_value_info("input", TensorProto.UINT8, ["N", 8, 8, 3])]
    outs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", CLASSES])]
    weights = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "failing", ins, outs, weights)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)


def test_an_edge_at_fault_says_no_more_than_that(tmp_path: Path) -> None:
    made = make_tiny_bundle(tmp_path / "bundle")
    failing_network(made.folder / "segments/whole.onnx")
    write_manifest(made.folder, made.manifest)
    with EdgeProcess(made.folder) as edge:
        for first, status in ((199, 200), (200, 500), (3, 200)):
            xs = np.full((1, 8, 8, 3), first, np.uint8)
            got, _, body = request(address(edge), "POST", "/v2/models/tiny/infer", json_request(xs))
            assert got == status
            if status == 500:
                assert json.loads(body) == {"error": "this edge failed; its log says why"}
            else:
                expected = [5.0 * first + k for k in range(CLASSES)]
                assert json.loads(body)["outputs"][0]["data"] == expected
        eventually(lambda: any("whole.onnx" in line and "failed" in line for line in [*edge.log]))
        page = request(address(edge), "GET", "/metrics")[2].decode()
    assert f'coinfer_requests_total{{door="http",outcome="failed",plan="{UPLOAD}"}} 1.0' in page


# --- what docs/open-inference.md says ----------------------------------------------------------------

PAGE = Path(__file__).parents[2] / "docs" / "open-inference.md"


def blocks_of(language: str, where: str) -> str:
    """The page's examples, for the edge and the models of this suite."""
    text = "\n".join(re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S))
    text = text.replace("127.0.0.1:8300", where).replace("resnet20.plan7.jpeg", "tiny.plan23.jpeg")
    return text.replace("resnet20", "tiny")


@pytest.fixture
def pictures_folder(tmp_path: Path) -> Path:
    (tmp_path / "cat.jpg").write_bytes(encoded(pictures(1)[0], format="JPEG"))
    (tmp_path / "picture.raw").write_bytes(pictures(1).tobytes())
    return tmp_path


def test_the_pages_commands_run_as_they_stand(bundle: Bundle, edge: EdgeProcess, pictures_folder: Path) -> None:
    lines = blocks_of("sh", address(edge)).splitlines()
    lines = [line for line in lines if line]
    assert len(lines) == 5 and shutil.which("curl") is not None
    answers = []
    for line in lines:
        command = [*shlex.split(line), "--fail", "--silent", "--show-error", "--max-time", str(PATIENCE_S)]
        done = subprocess.run(command, cwd=pictures_folder, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)
        answers.append(json.loads(done.stdout))
    assert answers[0] == {"ready": True} and answers[1]["name"] == "tiny" and answers[2][0]["name"] == "tiny"
    seen = np.array(Image.open(pictures_folder / "cat.jpg"))[None]
    for answer, xs in zip(answers[3:], (pictures(1), seen), strict=True):
        found = np.array(answer["outputs"][0]["data"], np.float32)[None]
        np.testing.assert_array_equal(found, reference(bundle, xs), strict=True)


def test_the_pages_program_runs_as_it_stands(bundle: Bundle, edge: EdgeProcess, pictures_folder: Path) -> None:
    program = blocks_of("python", address(edge))
    program += "\nprint(logits.tolist(), classes.shape, logits_of_file.tolist(), sep='\\n')"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=pictures_folder, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == 0, done.stderr
    logits, shape, of_file = done.stdout.splitlines()
    zeros = np.zeros((4, 8, 8, 3), np.uint8)
    assert np.array(json.loads(logits), np.float32).tobytes() == reference(bundle, zeros).tobytes()
    assert shape == "(4, 3)"
    seen = np.array(Image.open(pictures_folder / "cat.jpg"))[None]
    assert np.array(json.loads(of_file), np.float32).tobytes() == reference(bundle, seen).tobytes()


def test_the_pages_limits_are_the_edges(edge: EdgeProcess) -> None:
    text, limits = PAGE.read_text(encoding="utf-8"), EdgeLimits()
    for name, shown in (
        ("body_bytes", f"{limits.body_bytes >> 20} MiB"),
        ("samples", str(limits.samples)),
        ("hello_s", f"{limits.hello_s:g} s"),
        ("in_flight", str(limits.in_flight)),
        ("device_bytes", f"{limits.device_bytes >> 20} MiB"),
        ("connections", str(limits.connections)),
    ):
        assert f"| `{name}` | {shown} |" in text
