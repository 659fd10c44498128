"""The link's messages, without I/O and without a clock.

A connection begins with one JSON text message each way, then carries binary messages only:

    device -> edge   hello    {"type": "hello", "protocol": 2, "bundle": sha256, "crossings": {plan: digest}}
    edge -> device   welcome  {"type": "welcome", "protocol": 2, "bundle": sha256, "limits": {...}}
                     or       {"type": "refusal", "protocol": 2, "reason": "..."}
    device -> edge   REQUEST  8-byte header + a codec's payload
    edge -> device   REPLY    8-byte header + the edge's durations + the answer
                     FAILURE  8-byte header + one line of UTF-8 text
                     BUSY     8-byte header + milliseconds (u32) after which to ask again: not begun, never will be
    either           PING     8-byte header + up to 16 KiB of padding (a heartbeat; padded, a probe of the link)
                     PONG     8-byte header alone

Header, little endian: type u8, exit u8, plan u16, request u32; a PING's request is a token that the
PONG repeats; `exit` of a REPLY is 1 + the place in the plan of the exit that answered, else 0.  Durations:
wait, decode, tail in microseconds, u32 each, of the edge's own clock.  The answer is every output tensor as it
lies in memory, little endian; with `plan.top` = k instead k classes u16 and behind them their k scores float16.

`DeviceConnection` and `EdgeConnection` are the two ends.  Both are built from the same `Terms`: messages
in, events out (`receive`), and the other methods give the messages to send:

    device = DeviceConnection(terms)               edge = EdgeConnection(terms, limits)
    device.hello()                  --- str -->    edge.receive(...) -> Hello
    device.receive(...) -> Welcome  <-- str ---    edge.welcome()             or edge.refusal(reason)
    device.request(3, plan, payload)  - bytes ->   edge.receive(...) -> Request
    device.receive(...) -> Reply    <- bytes --    edge.reply(3, durations, outputs)

Request numbers of a connection rise (modulo 2**32), so a replayed request is refused; a reply to
what is not in flight is refused as well.  A `ProtocolError` ends the connection.
"""

from __future__ import annotations

from .ends import DeviceConnection, EdgeConnection
from .greeting import GREETING_BYTES, PROTOCOL_VERSION, Hello, Limits, Refusal, Terms, Welcome
from .messages import (
    FAILURE_BYTES,
    PADDING_BYTES,
    Busy,
    Durations,
    Failure,
    MessageType,
    Ping,
    Pong,
    Reply,
    Request,
    Result,
    decode_result,
    encode_result,
    reply_bytes,
)
from .wire import (
    DURATIONS_BYTES,
    HEADER_BYTES,
    SEGMENT_BYTES,
    TCP_IP_BYTES,
    message_wire_bytes,
    wire_bytes,
)

__all__ = [
    "DURATIONS_BYTES",
    "FAILURE_BYTES",
    "GREETING_BYTES",
    "HEADER_BYTES",
    "PADDING_BYTES",
    "PROTOCOL_VERSION",
    "SEGMENT_BYTES",
    "TCP_IP_BYTES",
    "Busy",
    "DeviceConnection",
    "Durations",
    "EdgeConnection",
    "Failure",
    "Hello",
    "Limits",
    "MessageType",
    "Ping",
    "Pong",
    "Refusal",
    "Reply",
    "Request",
    "Result",
    "Terms",
    "Welcome",
    "decode_result",
    "encode_result",
    "message_wire_bytes",
    "reply_bytes",
    "wire_bytes",
]
