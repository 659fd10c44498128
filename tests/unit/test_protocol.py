"""The link's two ends, joined in memory."""

from __future__ import annotations

import struct
from collections.abc import Callable

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.bundle import Bundle
from coinfer.errors import ProtocolError, RefusedError
from coinfer.plan import Plan, TensorSpec
from coinfer.protocol import (
    DURATIONS_BYTES,
    FAILURE_BYTES,
    GREETING_BYTES,
    HEADER_BYTES,
    PADDING_BYTES,
    PROTOCOL_VERSION,
    Busy,
    DeviceConnection,
    Durations,
    EdgeConnection,
    Failure,
    Hello,
    Limits,
    Ping,
    Pong,
    Reply,
    Request,
    Terms,
    Welcome,
    decode_result,
    encode_result,
    message_wire_bytes,
    reply_bytes,
    wire_bytes,
)
from tiny_bundle import CLASSES, INPUT, MENU, OUTPUTS, SPLIT32, UPLOAD, UPLOAD_TOP

LIMITS = Limits(max_message_bytes=4096, in_flight=4)
LOGITS = np.array([[0.5, -1.0, 3.0, 0.25, -0.125]], dtype=np.float32)
PLANS = {plan.number: plan for plan in MENU if plan.kind != "device"}


def terms(bundle: str = "ab" * 32, plans: dict[int, Plan] = PLANS) -> Terms:
    return Terms(bundle, plans, OUTPUTS)


def joined() -> tuple[DeviceConnection, EdgeConnection]:
    device, edge = DeviceConnection(terms()), EdgeConnection(terms(), LIMITS)
    hello = edge.receive(device.hello())
    assert isinstance(hello, Hello) and edge.objection(hello) is None
    assert isinstance(device.receive(edge.welcome()), Welcome)
    return device, edge


def header(kind: int, *, flags: int = 0, plan: int = 0, request: int = 0) -> bytes:
    return struct.pack("<BBHI", kind, flags, plan, request)


# --- a session -------------------------------------------------------------------------------------


def test_terms_are_the_plans_that_cross_the_link(tiny_bundle: Bundle) -> None:
    made = Terms.of(tiny_bundle)
    assert made.bundle == tiny_bundle.digest
    assert set(made.plans) == set(PLANS)
    assert made.outputs == OUTPUTS
    assert len(set(made.crossings().values())) == len(PLANS)


def test_the_welcome_brings_the_edges_limits() -> None:
    device, edge = DeviceConnection(terms()), EdgeConnection(terms(), LIMITS)
    edge.receive(device.hello())
    welcome = device.receive(edge.welcome())
    assert isinstance(welcome, Welcome) and welcome.limits == LIMITS


def test_a_request_arrives_and_its_reply_returns_bit_for_bit() -> None:
    device, edge = joined()
    asked = edge.receive(device.request(7, SPLIT32, b"payload"))
    assert asked == Request(7, PLANS[SPLIT32], b"payload")
    message = edge.reply(7, Durations(1, 2, 3), [LOGITS])
    reply = device.receive(message)
    assert isinstance(reply, Reply)
    assert reply[:3] == (7, PLANS[SPLIT32], Durations(1, 2, 3))
    assert reply.num_bytes == len(message) == HEADER_BYTES + DURATIONS_BYTES + 4 * CLASSES
    np.testing.assert_array_equal(reply.result.outputs[0], LOGITS, strict=True)
    assert device.in_flight == edge.in_flight == {}


def test_a_rehearsal_changes_nothing_whatever_it_reads() -> None:
    device, edge = joined()
    edge.receive(device.request(7, SPLIT32, b"abc"))
    message = edge.reply(7, Durations(1, 2, 3), [LOGITS])
    for rehearsed in (message, message[:-1], b"", "text", header(2, plan=SPLIT32, request=9)):
        device.rehearse(rehearsed)
    assert set(device.in_flight) == {7}
    assert isinstance(device.receive(message), Reply) and not device.in_flight
    device.rehearse(message)


def test_replies_may_come_in_another_order() -> None:
    device, edge = joined()
    for number in (1, 2, 3):
        edge.receive(device.request(number, UPLOAD, b""))
    for number in (3, 1, 2):
        reply = device.receive(edge.reply(number, Durations(0, 0, 0), [LOGITS + number]))
        assert isinstance(reply, Reply) and reply.request == number
        np.testing.assert_array_equal(reply.result.outputs[0], LOGITS + number)


def test_top_replies_hold_classes_and_scores_best_first() -> None:
    device, edge = joined()
    edge.receive(device.request(0, UPLOAD_TOP, b""))
    reply = device.receive(edge.reply(0, Durations(0, 0, 0), [LOGITS]))
    assert isinstance(reply, Reply) and reply.result.outputs == ()
    powers = np.exp(LOGITS[0].astype(np.float64))
    assert reply.result.classes is not None and reply.result.scores is not None
    assert reply.result.classes.tolist() == [2, 0, 3]
    expected = (powers / powers.sum())[[2, 0, 3]].astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(reply.result.scores, expected, strict=True)


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    result = decode_result(
        PLANS[UPLOAD_TOP], encode_result(PLANS[UPLOAD_TOP], [np.zeros((1, 5), np.float32)], OUTPUTS), OUTPUTS
    )
    assert result.classes is not None and result.classes.tolist() == [0, 1, 2]


def test_a_failure_names_its_request_in_one_line_and_the_link_lives_on() -> None:
    device, edge = joined()
    edge.receive(device.request(4, UPLOAD, b""))
    failure = device.receive(edge.failure(4, "no\npayload \x1b[31m" + "é" * 1000))
    assert isinstance(failure, Failure)
    assert failure.request == 4 and failure.text.startswith("no payload [31mé")
    assert len(failure.text.encode()) <= FAILURE_BYTES
    edge.receive(device.request(5, UPLOAD, b""))
    assert isinstance(device.receive(edge.reply(5, Durations(0, 0, 0), [LOGITS])), Reply)


def test_heartbeats_go_both_ways() -> None:
    device, edge = joined()
    assert edge.receive(device.ping(9)) == Ping(9)
    assert edge.receive(device.ping(7, padding=500)) == Ping(7, HEADER_BYTES + 500)
    assert device.receive(edge.pong(7)) == Pong(7)
    assert device.receive(edge.pong(9)) == Pong(9)
    assert device.receive(edge.ping(8)) == Ping(8)
    assert edge.receive(device.pong(8)) == Pong(8)


def test_a_heartbeat_has_a_longest_padding() -> None:
    roomy = Limits(max_message_bytes=10**6, in_flight=4)
    device, edge = DeviceConnection(terms()), EdgeConnection(terms(), roomy)
    edge.receive(device.hello())
    device.receive(edge.welcome())
    assert edge.receive(device.ping(1, padding=10**9)) == Ping(1, HEADER_BYTES + PADDING_BYTES)
    with pytest.raises(ProtocolError, match="a heartbeat has at most 16392 B and no plan, got 16393 B"):
        edge.receive(header(4) + bytes(PADDING_BYTES + 1))


def test_a_busy_edge_says_when_to_ask_again() -> None:
    device, edge = joined()
    edge.receive(device.request(3, UPLOAD, b"x"))
    message = edge.busy(3, 0.25)
    assert device.receive(message) == Busy(3, PLANS[UPLOAD], 0.25, len(message))
    # It is over for both ends.
    with pytest.raises(ProtocolError, match="not in flight"):
        edge.busy(3, 0.25)
    with pytest.raises(ProtocolError, match="not in flight"):
        device.receive(message)
    edge.receive(device.request(4, UPLOAD, b"x"))
    with pytest.raises(ProtocolError, match="a busy edge's message has 12 B, got 13 B"):
        device.receive(edge.busy(4, 1e12) + b"x")


def test_durations_beyond_32_bits_are_clipped() -> None:
    device, edge = joined()
    edge.receive(device.request(0, UPLOAD, b""))
    reply = device.receive(edge.reply(0, Durations(2**40, -5, 6), [LOGITS]))
    assert isinstance(reply, Reply) and reply.durations == (2**32 - 1, 0, 6)


def test_request_numbers_wrap_around() -> None:
    device, edge = joined()
    for number in (2**32 - 2, 2**32 - 1, 0, 1):
        assert isinstance(edge.receive(device.request(number, UPLOAD, b"")), Request)


# --- disagreement ----------------------------------------------------------------------------------


def objection_of(hello: Hello) -> str | None:
    edge = EdgeConnection(terms(), LIMITS)
    received = edge.receive(msgspec.json.encode(hello).decode())
    assert isinstance(received, Hello)
    return edge.objection(received)


def test_another_bundle_is_refused_with_both_names() -> None:
    hello = Hello(protocol=PROTOCOL_VERSION, bundle="def" * 10, crossings=terms().crossings())
    reason = objection_of(hello)
    assert reason == "this edge holds bundle abababababab, the device has defdefdefdef"
    device = DeviceConnection(terms())
    with pytest.raises(RefusedError, match="the edge refused: this edge holds bundle abababababab"):
        device.receive(EdgeConnection(terms(), LIMITS).refusal(reason))


def test_plans_read_differently_are_refused() -> None:
    changed = msgspec.structs.replace(PLANS[SPLIT32], crossing=(TensorSpec(name="r", shape=(4, 8, 9)),))
    crossings = terms(plans={**PLANS, SPLIT32: changed}).crossings()
    hello = Hello(protocol=PROTOCOL_VERSION, bundle="ab" * 32, crossings=crossings)
    assert "differently" in (objection_of(hello) or "")


@pytest.mark.parametrize("side", ["edge", "device"])
def test_another_version_is_told_before_anything_else_is_read(side: str) -> None:
    greeting = '{"type": "hello", "protocol": 1, "colour": "blue"}'
    end = EdgeConnection(terms(), LIMITS) if side == "edge" else DeviceConnection(terms())
    with pytest.raises(ProtocolError, match="this side speaks protocol 2, the .* speaks 1"):
        end.receive(greeting)


def test_a_welcome_to_another_bundle_is_an_error() -> None:
    with pytest.raises(ProtocolError, match="welcomed to bundle cdcd"):
        DeviceConnection(terms()).receive(EdgeConnection(terms("cd" * 32), LIMITS).welcome())


GREETINGS = [
    ("", "does not begin with a greeting"),
    ("[]", "does not begin with a greeting"),
    ('{"protocol": "1"}', "does not begin with a greeting"),
    ('{"protocol": ' + "9" * 400 + "}", "does not begin with a greeting"),
    ('{"a": ' + "[" * 60000, "does not begin with a greeting"),
    ("\ud800", "does not begin with a greeting"),
    ('{"protocol": 2}', "no hello|neither welcome nor refusal"),
    ('{"protocol": 2, "type": "hello", "bundle": "x", "crossings": {}, "more": 1}', "no hello|neither"),
    (" " * (GREETING_BYTES + 1), f"at most {GREETING_BYTES} characters, got {GREETING_BYTES + 1}"),
    (b"\x01", "a binary message before the greeting"),
]


@pytest.mark.parametrize(("message", "line"), GREETINGS)
def test_what_is_no_greeting_is_named(message: str | bytes, line: str) -> None:
    for end in (EdgeConnection(terms(), LIMITS), DeviceConnection(terms())):
        with pytest.raises(ProtocolError, match=line):
            end.receive(message)


# --- violations ------------------------------------------------------------------------------------

TO_BOTH = [
    (b"", "8 to .* B, got 0 B"),
    (b"1234567", "8 to .* B, got 7 B"),
    (header(0), "unknown message type 0"),
    (header(7), "unknown message type 7"),
    (header(4, flags=1), "only a reply comes from an exit, got 1 with message type 4"),
    (header(5) + b"x", "a heartbeat has at most 8 B and no plan, got 9 B"),
    (header(5, plan=3), "a heartbeat has at most 8 B and no plan, got 8 B for plan 3"),
    ("text", "a text message after the greeting"),
]


@pytest.mark.parametrize(("message", "line"), TO_BOTH)
def test_malformed_messages_are_violations(message: bytes | str, line: str) -> None:
    for end in joined():
        with pytest.raises(ProtocolError, match=line):
            end.receive(message)


def test_messages_over_the_limit_are_violations() -> None:
    device, edge = joined()
    with pytest.raises(ProtocolError, match="8 to 4096 B, got 4097 B"):
        edge.receive(header(1, plan=UPLOAD) + bytes(4096 - 7))
    most = terms().max_reply_bytes()
    with pytest.raises(ProtocolError, match=f"8 to {most} B, got {most + 1} B"):
        device.receive(bytes(most + 1))


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (header(2, plan=UPLOAD), "a device does not send REPLY"),
        (header(3, plan=UPLOAD), "a device does not send FAILURE"),
        (header(1, plan=0), "plan 0 does not cross the link"),
        (header(1, plan=99), "plan 99 does not cross the link"),
    ],
)
def test_the_edge_takes_requests_alone(message: bytes, line: str) -> None:
    _, edge = joined()
    with pytest.raises(ProtocolError, match=line):
        edge.receive(message)


@pytest.mark.parametrize("number", [5, 4, 0, 2**31 + 5])
def test_replayed_or_reordered_requests_are_violations(number: int) -> None:
    device, edge = joined()
    edge.receive(device.request(5, UPLOAD, b""))
    with pytest.raises(ProtocolError, match=f"request numbers rise, got {number} after 5"):
        edge.receive(header(1, plan=UPLOAD, request=number))


def answered(edge: EdgeConnection, device: DeviceConnection) -> bytes:
    edge.receive(device.request(1, UPLOAD, b""))
    message = edge.reply(1, Durations(0, 0, 0), [LOGITS])
    device.receive(message)
    return message


def test_a_reply_to_an_answered_request_is_a_violation() -> None:
    device, edge = joined()
    message = answered(edge, device)
    with pytest.raises(ProtocolError, match="an answer to request 1 for plan 1, which is not in flight"):
        device.receive(message)


@pytest.mark.parametrize("kind", [2, 3])
def test_a_reply_to_what_was_never_asked_is_a_violation(kind: int) -> None:
    device, _ = joined()
    with pytest.raises(ProtocolError, match="request 6 for plan 1, which is not in flight"):
        device.receive(header(kind, plan=UPLOAD, request=6))


def test_a_reply_for_another_plan_is_a_violation() -> None:
    device, _ = joined()
    device.request(1, UPLOAD, b"")
    with pytest.raises(ProtocolError, match=f"request 1 for plan {SPLIT32}, which is not in flight"):
        device.receive(header(2, plan=SPLIT32, request=1) + bytes(32))


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (header(1, plan=UPLOAD, request=1), "an edge does not send requests"),
        (header(2, plan=UPLOAD, request=1) + bytes(11), "a reply has at least 20 B, got 19 B"),
        (header(2, plan=UPLOAD, request=1) + bytes(31), "an answer has 20 B, got 19 B"),
        (header(2, plan=UPLOAD, request=1) + bytes(33), "an answer has 20 B, got 21 B"),
        (header(3, plan=UPLOAD, request=1) + b"\xff", "a failure's text is not UTF-8"),
        (header(3, plan=UPLOAD, request=1) + bytes(501), "a failure's text has at most 500 B, got 509 B"),
        (header(5, request=3), "heartbeat 3 was never sent, but answered"),
    ],
)
def test_the_device_takes_fitting_answers_alone(message: bytes, line: str) -> None:
    device, _ = joined()
    device.request(1, UPLOAD, b"")
    with pytest.raises(ProtocolError, match=line):
        device.receive(message)


def test_each_end_refuses_to_send_what_makes_no_sense() -> None:
    device, edge = joined()
    with pytest.raises(ProtocolError, match="plan 0 does not cross"):
        device.request(1, 0, b"")
    device.request(1, UPLOAD, b"")
    with pytest.raises(ProtocolError, match="request 1 cannot be sent"):
        device.request(1, UPLOAD, b"")
    with pytest.raises(ProtocolError, match="request 1 cannot be sent: no welcome yet"):
        DeviceConnection(terms()).request(1, UPLOAD, b"")
    calls: list[Callable[[], bytes]] = [
        lambda: edge.reply(1, Durations(0, 0, 0), [LOGITS]),
        lambda: edge.failure(1, ""),
    ]
    for call in calls:
        with pytest.raises(ProtocolError, match="request 1 is not in flight"):
            call()


@pytest.mark.parametrize(
    "outputs", [[], [LOGITS, LOGITS], [LOGITS[:, :4]], [LOGITS.astype(np.float64)], [LOGITS.repeat(2, axis=0)]]
)
def test_outputs_other_than_the_manifests_are_not_sent(outputs: list[np.ndarray]) -> None:
    with pytest.raises(ProtocolError, match="outputs must be one sample each of"):
        encode_result(PLANS[UPLOAD], outputs, OUTPUTS)


# --- bytes -----------------------------------------------------------------------------------------


@given(st.integers(min_value=HEADER_BYTES, max_value=200_000))
def test_both_counts_of_wire_bytes_agree(message_bytes: int) -> None:
    for masked in (True, False):
        expected = wire_bytes(message_bytes, masked=masked, overhead=0)
        assert message_wire_bytes(message_bytes, masked=masked) == expected


@pytest.mark.parametrize(
    ("payload", "wire"), [(117, 8 + 117 + 2 + 4 + 40), (118, 8 + 118 + 4 + 4 + 40), (65528, 65536 + 14 + 46 * 40)]
)
def test_wire_bytes_of_a_request_follow_rfc_6455(payload: int, wire: int) -> None:
    assert wire_bytes(float(payload), masked=True) == wire


def test_wire_bytes_of_a_reply_add_the_durations() -> None:
    body = reply_bytes(PLANS[UPLOAD], OUTPUTS)
    assert body == 20 and wire_bytes(float(body), masked=False) == 8 + 12 + 20 + 2 + 40
    assert reply_bytes(PLANS[UPLOAD_TOP], OUTPUTS) == 12
    assert reply_bytes(msgspec.structs.replace(PLANS[UPLOAD], top=1000), OUTPUTS) == 4 * CLASSES


DTYPES = st.sampled_from(["float32", "float16", "uint8", "int64"])
SPECS = st.lists(
    st.builds(
        lambda shape, dtype: TensorSpec(name="y", shape=tuple(shape), dtype=dtype),
        st.lists(st.integers(1, 4), max_size=3),
        DTYPES,
    ),
    min_size=1,
    max_size=3,
).map(tuple)


@given(SPECS, st.integers(0, 2**32 - 1))
def test_any_outputs_survive_the_link(specs: tuple[TensorSpec, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    arrays = [np.frombuffer(random.bytes(s.num_bytes), s.dtype).reshape(1, *s.shape) for s in specs]
    body = encode_result(PLANS[UPLOAD], arrays, specs)
    assert len(body) == reply_bytes(PLANS[UPLOAD], specs)
    for got, array in zip(decode_result(PLANS[UPLOAD], body, specs).outputs, arrays, strict=True):
        assert got.tobytes() == array.tobytes() and got.shape == array.shape and got.dtype == array.dtype


def gives_an_event_or_a_protocol_error(message: bytes | str) -> None:
    device, edge = joined()
    device.request(0, UPLOAD, b"")
    for end in (device, edge, DeviceConnection(terms()), EdgeConnection(terms(), LIMITS)):
        try:
            event = end.receive(message)
        except ProtocolError as error:
            assert len(str(error)) > 10
        else:
            assert isinstance(event, Request | Reply | Failure | Ping | Pong)


@given(st.one_of(st.binary(max_size=64), st.text(max_size=64)))
def test_parsers_give_an_event_or_a_protocol_error(message: bytes | str) -> None:
    gives_an_event_or_a_protocol_error(message)


@given(st.integers(0, 7), st.booleans(), st.integers(0, 7), st.integers(0, 3), st.binary(max_size=40))
def test_near_misses_give_an_event_or_a_protocol_error(
    kind: int, is_flagged: bool, plan: int, request: int, body: bytes
) -> None:
    gives_an_event_or_a_protocol_error(header(kind, flags=is_flagged, plan=plan, request=request) + body)


def test_the_largest_request_has_room_for_an_image_coder_at_its_worst() -> None:
    assert terms().max_request_bytes() > 2 * INPUT.num_bytes
