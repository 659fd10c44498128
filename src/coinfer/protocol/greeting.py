"""What both ends must agree on before the first request, and the JSON messages in which they do."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Annotated

import msgspec

from ..bundle import Bundle
from ..errors import PlanError, ProtocolError
from ..plan import Plan, TensorSpec, Value
from .messages import one_line
from .wire import DURATIONS_BYTES, HEADER_BYTES

PROTOCOL_VERSION = 2
GREETING_BYTES = 65536


@dataclass(frozen=True)
class Terms:
    """What both ends must agree on: the bundle, and the plans of its menu that cross the link."""

    bundle: str
    plans: dict[int, Plan]
    outputs: tuple[TensorSpec, ...]

    @classmethod
    def of(cls, bundle: Bundle) -> Terms:
        """The terms of a loaded bundle."""
        plans = {plan.number: plan for plan in bundle.manifest.menu if plan.kind != "device"}
        return cls(bundle.digest, plans, bundle.manifest.outputs)

    def crossings(self) -> dict[int, str]:
        """Per plan, 16 hex digits that stand for what crosses: kind, codec, tensor specs, reply and exits."""
        return {number: _crossing_digest(plan, self.outputs) for number, plan in self.plans.items()}

    def hello(self) -> bytes:
        """A device's greeting."""
        hello = Hello(protocol=PROTOCOL_VERSION, bundle=self.bundle, crossings=self.crossings())
        return msgspec.json.encode(hello)

    def plan(self, number: int) -> Plan:
        """The plan of that number.

        Raises:
            ProtocolError: no plan that crosses the link has it.
        """
        if number not in self.plans:
            raise ProtocolError(f"plan {number} does not cross the link; these do: {sorted(self.plans)}")
        return self.plans[number]

    def max_request_bytes(self) -> int:
        """No REQUEST of these plans is longer, image codecs at their worst included."""
        sizes = (sum(spec.num_bytes for spec in plan.crossing) for plan in self.plans.values())
        return GREETING_BYTES + 2 * max(sizes, default=0)

    def most_bytes(self, wanted: int | None) -> int:
        """Of one message, as an edge takes them: so many, or what the longest request may need.

        Raises:
            PlanError: a greeting is longer.
        """
        if wanted is not None and wanted < (least := len(self.hello())):
            raise PlanError(f"messages of up to {wanted} B leave a device no room for its greeting of {least} B")
        return self.max_request_bytes() if wanted is None else wanted

    def max_reply_bytes(self) -> int:
        """No message of the edge is longer."""
        return GREETING_BYTES + HEADER_BYTES + DURATIONS_BYTES + sum(spec.num_bytes for spec in self.outputs)


def _crossing_digest(plan: Plan, outputs: tuple[TensorSpec, ...]) -> str:
    given: tuple[object, ...] = (plan.kind, plan.codec, plan.crossing, plan.top, outputs)
    if plan.exits:
        given = (*given, plan.exits)
    return hashlib.sha256(msgspec.json.encode(given)).hexdigest()[:16]


class Limits(Value, frozen=True, kw_only=True):
    """What an edge takes: bytes of one message, and requests in flight before it stops reading.

    `idle_s` is how long a device may say nothing; None: for ever.
    """

    max_message_bytes: int
    in_flight: int
    idle_s: float | None = None


class Hello(Value, frozen=True, kw_only=True, tag_field="type", tag="hello"):
    """The device's first message."""

    protocol: int
    bundle: str
    crossings: dict[int, str]


class Welcome(Value, frozen=True, kw_only=True, tag_field="type", tag="welcome"):
    """The edge agrees."""

    protocol: int
    bundle: str
    limits: Limits


class Refusal(Value, frozen=True, kw_only=True, tag_field="type", tag="refusal"):
    """The edge does not agree, and says why."""

    protocol: int
    reason: str


class _Version(msgspec.Struct):
    """The part of a greeting that every version has."""

    protocol: Annotated[int, msgspec.Meta(ge=0, le=65535)]


_VERSION = msgspec.json.Decoder(_Version)
_HELLO = msgspec.json.Decoder(Hello)
_ANSWER: msgspec.json.Decoder[Welcome | Refusal] = msgspec.json.Decoder(Welcome | Refusal)


def parse_hello(text: str) -> Hello:
    """The device's greeting.

    Raises:
        ProtocolError: too long, another version, or no hello.
    """
    _check_version(text, "the device")
    try:
        return _HELLO.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(f"no hello: {one_line(str(error))} (from the device)") from error


def parse_answer(text: str) -> Welcome | Refusal:
    """The edge's greeting.

    Raises:
        ProtocolError: too long, another version, or neither welcome nor refusal.
    """
    _check_version(text, "the edge")
    try:
        return _ANSWER.decode(text)
    except (msgspec.MsgspecError, RecursionError) as error:
        raise ProtocolError(f"neither welcome nor refusal: {one_line(str(error))} (from the edge)") from error


def _check_version(text: str, side: str) -> None:
    """Raise where a greeting is too long, no greeting at all, or of another version."""
    if len(text) > GREETING_BYTES:
        allowed = f"a greeting has at most {GREETING_BYTES} characters"
        raise ProtocolError(f"{allowed}, got {len(text)} (from {side})")
    try:
        version = _VERSION.decode(text).protocol
    except (msgspec.MsgspecError, UnicodeEncodeError, RecursionError) as error:
        raise ProtocolError(f"{side} does not begin with a greeting of coinfer: {one_line(str(error))}") from error
    if version != PROTOCOL_VERSION:
        raise ProtocolError(f"this side speaks protocol {PROTOCOL_VERSION}, {side} speaks {version}")
