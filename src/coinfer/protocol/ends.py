"""The two ends of one connection as state machines: messages in, events out."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from contextlib import suppress

import msgspec

from ..errors import ProtocolError, RefusedError
from ..plan import Plan
from .greeting import PROTOCOL_VERSION, Hello, Limits, Refusal, Terms, Welcome, parse_answer, parse_hello
from .messages import (
    FAILURE_BYTES,
    PADDING_BYTES,
    Array,
    Busy,
    Durations,
    Failure,
    MessageType,
    Ping,
    Pong,
    Reply,
    Request,
    decode_result,
    encode_result,
    one_line,
    pack,
    parse_header,
)
from .wire import DURATIONS_BYTES, HEADER_BYTES

_DURATIONS = struct.Struct("<III")
_RETRY_MS = struct.Struct("<I")


class DeviceConnection:
    """The device's end of one connection.  `request` and `receive` may be called from two threads."""

    def __init__(self, terms: Terms) -> None:
        self.terms = terms
        self.in_flight: dict[int, Plan] = {}
        self._pings: set[int] = set()
        self._is_open = False
        self._max_bytes = terms.max_reply_bytes()

    def hello(self) -> str:
        """The first message to send."""
        return self.terms.hello().decode()

    def request(self, request: int, plan: int, payload: bytes) -> bytes:
        """The message that asks for the answer to `payload`; numbers rise modulo 2**32.

        Raises:
            ProtocolError: no welcome yet, an unknown plan, or a request of that number is in flight.
        """
        if not self._is_open or request in self.in_flight:
            raise ProtocolError(f"request {request} cannot be sent: no welcome yet, or it is in flight")
        self.in_flight[request] = self.terms.plan(plan)
        return pack(MessageType.REQUEST, plan, request, payload)

    def forget(self, request: int) -> None:
        """A request that `request` made a message of is not sent."""
        self.in_flight.pop(request, None)

    def ping(self, token: int, *, padding: int = 0) -> bytes:
        """A heartbeat; with `padding` bytes (up to `PADDING_BYTES`) it takes as long as a request of that size."""
        self._pings.add(token)
        return pack(MessageType.PING, 0, token, bytes(min(padding, PADDING_BYTES)))

    def pong(self, token: int) -> bytes:
        """The answer to a heartbeat."""
        return pack(MessageType.PONG, 0, token)

    def receive(self, message: str | bytes) -> Welcome | Reply | Failure | Busy | Ping | Pong:
        """What a message of the edge means.

        Raises:
            RefusedError: it refuses; the message gives its reason.
            ProtocolError: it is not a message of this protocol, or does not fit what was asked.
        """
        if not self._is_open:
            return self._greeting(message)
        if isinstance(message, str):
            raise ProtocolError("a text message after the greeting (from the edge)")
        kind, number, request, exit = parse_header(message, self._max_bytes, "the edge")
        if kind == MessageType.PING:
            return Ping(request, len(message))
        if kind == MessageType.PONG:
            return self._pong(request)
        if kind == MessageType.REQUEST:
            raise ProtocolError("an edge does not send requests (from the edge)")
        plan = self.in_flight.get(request)
        if plan is None or plan.number != number:
            raise ProtocolError(
                f"an answer to request {request} for plan {number}, which is not in flight (from the edge)"
            )
        event: Reply | Failure | Busy
        if kind == MessageType.FAILURE:
            event = self._failure(plan, request, message)
        elif kind == MessageType.BUSY:
            event = self._busy(plan, request, message)
        else:
            event = self._reply(plan, request, message, exit)
        del self.in_flight[request]
        return event

    def rehearse(self, message: str | bytes) -> None:
        """Read an answer as `receive` does, and change nothing."""
        if self._is_open and isinstance(message, bytes):
            with suppress(ProtocolError):
                kind, _, request, exit = parse_header(message, self._max_bytes, "the edge")
                plan = self.in_flight.get(request)
                if kind == MessageType.REPLY and plan is not None:
                    self._reply(plan, request, message, exit)

    def _pong(self, token: int) -> Pong:
        if token not in self._pings:
            raise ProtocolError(f"heartbeat {token} was never sent, but answered (from the edge)")
        self._pings.remove(token)
        return Pong(token)

    def _greeting(self, message: str | bytes) -> Welcome:
        if not isinstance(message, str):
            raise ProtocolError("a binary message before the greeting (from the edge)")
        greeting = parse_answer(message)
        if isinstance(greeting, Refusal):
            raise RefusedError(f"the edge refused: {one_line(greeting.reason)}")
        if greeting.bundle != self.terms.bundle:
            raise ProtocolError(f"welcomed to bundle {one_line(greeting.bundle[:12])}, not {self.terms.bundle:.12}")
        self._is_open = True
        return greeting

    def _failure(self, plan: Plan, request: int, message: bytes) -> Failure:
        if len(message) > HEADER_BYTES + FAILURE_BYTES:
            raise ProtocolError(f"a failure's text has at most {FAILURE_BYTES} B, got {len(message)} B")
        try:
            text = one_line(message[HEADER_BYTES:].decode())
            return Failure(request, plan, text, len(message))
        except UnicodeDecodeError as error:
            raise ProtocolError(f"a failure's text is not UTF-8: {error} (from the edge)") from error

    @staticmethod
    def _busy(plan: Plan, request: int, message: bytes) -> Busy:
        if len(message) != HEADER_BYTES + _RETRY_MS.size:
            allowed = f"a busy edge's message has {HEADER_BYTES + _RETRY_MS.size} B"
            raise ProtocolError(f"{allowed}, got {len(message)} B (from the edge)")
        (retry_ms,) = _RETRY_MS.unpack_from(message, HEADER_BYTES)
        return Busy(request, plan, retry_ms / 1e3, len(message))

    def _reply(self, plan: Plan, request: int, message: bytes, exit: int | None) -> Reply:
        if exit is not None and not (exit < len(plan.exits) and plan.exits[exit].side == "edge"):
            raise ProtocolError(f"exit {exit} of plan {plan.number} is none on the edge (from the edge)")
        start = HEADER_BYTES + DURATIONS_BYTES
        if len(message) < start:
            raise ProtocolError(f"a reply has at least {start} B, got {len(message)} B (from the edge)")
        durations = Durations(*_DURATIONS.unpack_from(message, HEADER_BYTES))
        result = decode_result(plan, memoryview(message)[start:], self.terms.outputs)
        return Reply(request, plan, durations, result, len(message), exit)


class EdgeConnection:
    """The edge's end of one connection."""

    def __init__(self, terms: Terms, limits: Limits) -> None:
        self.terms = terms
        self.limits = limits
        self.in_flight: dict[int, Plan] = {}
        self._is_open = False
        self._last: int | None = None

    def receive(self, message: str | bytes) -> Hello | Request | Ping | Pong:
        """What a message of the device means.

        After Hello, send `welcome()`, or where `objection` has a reason `refusal(reason)`.

        Raises:
            ProtocolError: it is not a message of this protocol.
        """
        if not self._is_open:
            return self._hello(message)
        if isinstance(message, str):
            raise ProtocolError("a text message after the greeting (from the device)")
        kind, number, request, _ = parse_header(message, self.limits.max_message_bytes, "the device")
        if kind == MessageType.PING:
            return Ping(request, len(message))
        if kind == MessageType.PONG:
            return Pong(request)
        if kind != MessageType.REQUEST:
            raise ProtocolError(f"a device does not send {kind.name} (from the device)")
        if self._last is not None and not 0 < (request - self._last) % 2**32 < 2**31:
            raise ProtocolError(f"request numbers rise, got {request} after {self._last} (from the device)")
        self._last = request
        plan = self.in_flight[request] = self.terms.plan(number)
        return Request(request, plan, message[HEADER_BYTES:])

    def _hello(self, message: str | bytes) -> Hello:
        if not isinstance(message, str):
            raise ProtocolError("a binary message before the greeting (from the device)")
        return parse_hello(message)

    def objection(self, hello: Hello) -> str | None:
        """Why this edge cannot serve that device; None where it can."""
        mine = self.terms
        if hello.bundle != mine.bundle:
            return f"this edge holds bundle {mine.bundle:.12}, the device has {one_line(hello.bundle[:12])}"
        if hello.crossings != mine.crossings():
            return f"device and edge read the plans of bundle {mine.bundle:.12} differently"
        return None

    def welcome(self) -> str:
        """Agree; requests may come from here on."""
        self._is_open = True
        message = Welcome(protocol=PROTOCOL_VERSION, bundle=self.terms.bundle, limits=self.limits)
        return msgspec.json.encode(message).decode()

    def refusal(self, reason: str) -> str:
        """Refuse; close the connection behind it."""
        return msgspec.json.encode(Refusal(protocol=PROTOCOL_VERSION, reason=one_line(reason))).decode()

    def reply(
        self, request: int, durations: Durations, outputs: Sequence[Array], *, exit: int | None = None
    ) -> bytes:
        """Answer a request with the network's `outputs`, each (1, *shape), or those of an exit of its plan.

        Raises:
            ProtocolError: the request is not in flight, or `outputs` are not what the manifest states.
        """
        plan = self._asked(request)
        body = encode_result(plan, outputs, self.terms.outputs)
        del self.in_flight[request]
        clipped = (min(max(0, us), 2**32 - 1) for us in durations)
        return pack(MessageType.REPLY, plan.number, request, _DURATIONS.pack(*clipped) + body, exit=exit)

    def failure(self, request: int, text: str) -> bytes:
        """Say in one line why a request has no answer.

        Raises:
            ProtocolError: the request is not in flight.
        """
        plan = self._asked(request)
        del self.in_flight[request]
        return pack(MessageType.FAILURE, plan.number, request, one_line(text).encode())

    def busy(self, request: int, retry_after_s: float) -> bytes:
        """Say that a request will not be computed, since there is no time for it now.

        Raises:
            ProtocolError: the request is not in flight.
        """
        plan = self._asked(request)
        del self.in_flight[request]
        retry_ms = min(max(1, round(1e3 * retry_after_s)), 2**32 - 1)
        return pack(MessageType.BUSY, plan.number, request, _RETRY_MS.pack(retry_ms))

    def ping(self, token: int) -> bytes:
        """A heartbeat."""
        return pack(MessageType.PING, 0, token)

    def pong(self, token: int) -> bytes:
        """The answer to a heartbeat."""
        return pack(MessageType.PONG, 0, token)

    def _asked(self, request: int) -> Plan:
        if request not in self.in_flight:
            raise ProtocolError(f"request {request} is not in flight, so it has no answer (edge)")
        return self.in_flight[request]
