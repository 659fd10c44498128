"""Inputs for the fuzz of the parsers, built by hypothesis: right in form, wrong in what they say, or the other way."""

from __future__ import annotations

import struct
from typing import Any

import msgspec
from hypothesis import strategies as st

from .fuzz_inputs import INTEGERS, MOST_BYTES
from .fuzz_targets import ManifestTarget, PayloadTarget, ProtocolTarget, joined, parted

WHOLE = st.one_of(st.sampled_from(INTEGERS), st.integers(-(2**70), 2**70), st.integers(0, 40))
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.one_of(st.none(), st.booleans(), WHOLE, FINITE, st.text(max_size=30))
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=12), inner, max_size=4),
    max_leaves=12,
)


def inputs_of(target: Any) -> st.SearchStrategy[bytes]:
    """Inputs for one target."""
    if isinstance(target, ProtocolTarget):
        return _messages(target)
    return _payloads(target) if isinstance(target, PayloadTarget) else _manifests(target)


def _encoded(value: object) -> bytes:
    return msgspec.json.encode(value)


@st.composite
def _messages(draw: st.DrawFn, target: ProtocolTarget) -> bytes:
    """A state and messages with headers of every kind, near the requests that are in flight, and greetings."""
    numbers = st.one_of(st.integers(2**32 - 4, 2**32 - 1), st.integers(0, 12), st.integers(0, 2**32 - 1))
    header = st.builds(
        struct.Struct("<BBHI").pack, st.integers(0, 8) | st.just(255), st.just(0) | st.integers(0, 255),
        st.integers(0, 16) | st.integers(0, 2**16 - 1), numbers,
    )  # fmt: skip
    body = st.one_of(st.just(b""), st.binary(max_size=60), st.sampled_from((bytes(4), bytes(12), bytes(24), bytes(32))))
    kind = st.sampled_from(("hello", "welcome", "refusal"))
    greeting = st.fixed_dictionaries(
        {"type": kind | st.text(max_size=8), "protocol": st.just(2) | WHOLE},
        optional={
            "bundle": st.just(target.bundle) | st.text(max_size=70),
            "crossings": st.dictionaries(WHOLE.map(str), st.text(max_size=16), max_size=4) | JSON,
            "limits": st.fixed_dictionaries({"max_message_bytes": WHOLE, "in_flight": WHOLE}) | JSON,
            "reason": st.text(max_size=40) | JSON,
            "more": JSON,
        },
    )  # fmt: skip
    text = st.one_of(greeting, JSON).map(_encoded).map(bytes.decode)
    binary = st.builds(bytes.__add__, header, body)
    # Right ones as well, in any order: what was answered already, what was not asked yet.
    right = st.sampled_from([message for seed in target.seeds for message in parted(seed[1:])])
    return joined(draw(st.integers(0, 3)), draw(st.lists(st.one_of(binary, text, right), min_size=1, max_size=6)))


@st.composite
def _payloads(draw: st.DrawFn, target: PayloadTarget) -> bytes:
    """A codec, a mode, and a code: random, or one that was encoded with some of its bytes changed."""
    place = draw(st.integers(0, len(target.codecs) - 1))
    if draw(st.booleans()):
        return bytes([place, draw(st.integers(0, 15))]) + draw(st.binary(max_size=400))
    made = bytearray(draw(st.sampled_from([seed for seed in target.seeds if seed[0] == place])))
    for _ in range(draw(st.integers(1, 5))):
        made[draw(st.integers(1, len(made) - 1))] = draw(st.integers(0, 255))
    return bytes(made)


@st.composite
def _manifests(draw: st.DrawFn, target: ManifestTarget) -> bytes:
    """A manifest with one to three of its values exchanged, or with names of files of all sorts."""
    tree = msgspec.json.decode(draw(st.sampled_from([seed for seed in target.seeds if seed[:2] == b"\0{"]))[1:])
    for _ in range(draw(st.integers(1, 3))):
        holder = tree
        while True:
            keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
            key = draw(st.sampled_from(keys))
            inner = holder[key]
            if not (isinstance(inner, dict | list) and inner) or draw(st.integers(0, 3)) == 0:
                break
            holder = inner
        holder[key] = draw(JSON)
    if draw(st.booleans()):
        entry = st.fixed_dictionaries({"num_bytes": WHOLE, "sha256": st.text(max_size=64)})
        parts = st.sampled_from(("..", ".", "a", "segments", "", "\0"))
        name = st.text(max_size=300) | st.lists(parts, max_size=6).map("/".join)
        tree["files"] = draw(st.dictionaries(name, entry, max_size=3))
    return (b"\0" + _encoded(tree))[:MOST_BYTES]
