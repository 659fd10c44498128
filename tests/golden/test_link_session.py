"""One session of the link, byte by byte: what these bytes mean must never change under protocol 2."""

from __future__ import annotations

import numpy as np

from coinfer.plan import CodecSpec, Plan, TensorSpec
from coinfer.protocol import DeviceConnection, Durations, EdgeConnection, Limits, Reply, Terms

CROSSING = (TensorSpec(name="r", shape=(2, 2)),)
OUTPUTS = (TensorSpec(name="logits", shape=(3,)),)
WHOLE = Plan(
    number=3,
    kind="split",
    variant="net",
    cut="layer1#0",
    codec=CodecSpec(transform="uniform", bits=4, per_channel=True, coder="range"),
    crossing=CROSSING,
    head="segments/a.onnx",
    tail="segments/b.onnx",
    tables="tables/a.safetensors",
)
TOP = Plan(
    number=258,
    kind="upload",
    variant="net",
    codec=CodecSpec(transform="image", coder="webp", quality=95),
    crossing=(TensorSpec(name="input", shape=(2, 2, 3), dtype="uint8"),),
    tail="segments/whole.onnx",
    top=2,
)
TERMS = Terms("c0ffee" * 10 + "abcd", {3: WHOLE, 258: TOP}, OUTPUTS)
LOGITS = np.array([[1.0, -2.0, 0.5]], dtype=np.float32)

HELLO = (
    '{"type":"hello","protocol":2,"bundle":"c0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeeabcd",'
    '"crossings":{"3":"ad4d38638a25b168","258":"2c80f3420edf14d3"}}'
)
WELCOME = (
    '{"type":"welcome","protocol":2,"bundle":"c0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeec0ffeeabcd",'
    '"limits":{"max_message_bytes":4096,"in_flight":8,"idle_s":null}}'
)
REFUSAL = '{"type":"refusal","protocol":2,"reason":"no room"}'
REQUEST = "0100 0300 07000000 cafe"
REPLY = "0200 0300 07000000 0a000000 14000000 01000100 0000803f 000000c0 0000003f"
REQUEST_TOP = "0100 0201 08000000 ff"
REPLY_TOP = "0200 0201 08000000 00000000 00000000 00000000 0000 0200 d438 dc35"
FAILURE = "0300 0300 09000000 6e6f"
PING = "0400 0000 2a000000"
PONG = "0500 0000 2a000000"
BUSY = "0600 0300 0a000000 fa000000"


def test_a_session_has_these_bytes() -> None:
    device, edge = DeviceConnection(TERMS), EdgeConnection(TERMS, Limits(max_message_bytes=4096, in_flight=8))
    assert device.hello() == HELLO
    edge.receive(HELLO)
    assert edge.refusal("no room") == REFUSAL
    assert edge.welcome() == WELCOME
    device.receive(WELCOME)
    assert device.request(7, 3, b"\xca\xfe") == bytes.fromhex(REQUEST)
    assert device.request(8, 258, b"\xff") == bytes.fromhex(REQUEST_TOP)
    assert device.request(9, 3, b"") == bytes.fromhex("0100 0300 09000000")
    for request in (REQUEST, REQUEST_TOP, "0100 0300 09000000"):
        edge.receive(bytes.fromhex(request))
    assert edge.reply(7, Durations(10, 20, 65537), [LOGITS]) == bytes.fromhex(REPLY)
    assert edge.reply(8, Durations(0, 0, 0), [LOGITS]) == bytes.fromhex(REPLY_TOP)
    assert edge.failure(9, "no") == bytes.fromhex(FAILURE)
    device.request(10, 3, b"")
    edge.receive(bytes.fromhex("0100 0300 0a000000"))
    assert edge.busy(10, 0.25) == bytes.fromhex(BUSY)
    assert device.ping(42) == edge.ping(42) == bytes.fromhex(PING)
    assert device.pong(42) == edge.pong(42) == bytes.fromhex(PONG)


def test_these_bytes_have_their_meaning() -> None:
    device = DeviceConnection(TERMS)
    device.receive(WELCOME)
    device.request(7, 3, b"")
    device.request(8, 258, b"")
    whole, top = device.receive(bytes.fromhex(REPLY)), device.receive(bytes.fromhex(REPLY_TOP))
    assert isinstance(whole, Reply) and isinstance(top, Reply)
    assert whole.durations == (10, 20, 65537)
    np.testing.assert_array_equal(whole.result.outputs[0], LOGITS)
    assert top.result.classes is not None and top.result.classes.tolist() == [0, 2]
