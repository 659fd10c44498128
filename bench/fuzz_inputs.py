"""Inputs for the fuzz of the parsers: bytes made from valid ones by seeded damage.

    Mutator(seeds, words).make(random)    one input: a seed, or two joined, and one to six changes

Changes are of bits, of bytes, of lengths, of integers that parsers get wrong, and, where the format is text, of its
words: numbers, strings and brackets are exchanged for others that JSON allows or just does not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random

_EDGES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 16, 31, 32, 64, 127, 128, 255, 256, 511, 512, 1023, 1024, 4095, 4096)
INTEGERS = (
    *_EDGES, 16383, 16384, 32767, 32768, 65535, 65536, 2**24 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1,
)  # fmt: skip
MOST_BYTES = 1 << 17
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?\d+(?:\.\d+)?(?:[eE][-+]?\d+)?|true|false|null|[\[\]{}:,]')
# What a field of JSON may be exchanged for.
WORDS = (
    b"0", b"-1", b"1", b"2", b"255", b"65535", b"65536", b"4294967295", b"4294967296", b"9223372036854775807",
    b"-9223372036854775808", b"18446744073709551616", b"1" * 400, b"9" * 5000, b"1e308", b"1e309", b"-1e400", b"0.5",
    b"1e-400", b"-0", b"-0.0", b"00", b"+1", b".5", b"NaN", b"Infinity", b"true", b"false", b"null", b'""', b'"a"',
    b'"../../etc/passwd"', b'"/etc/passwd"', b'"a/../../b"', b'"\\u0000"', b'"a\\u0000b"', b'"\\ud800"',
    b'"\\udfff\\ud800"', b'"\xff"', b'"\xed\xa0\x80"', '"é漢🦊"'.encode(), b'"' + b"a" * 300 + b'"',
    b'"' + b"b/" * 3000 + b'"', b'"."', b'".."', b'"bundle.json"', b'"segments"', b'"hello"', b'"welcome"',
    b'"refusal"', b'"device"', b'"upload"', b'"split"', b'"edge"', b'"uint8"', b'"float32"', b'"int64"', b'"object"',
    b"[]", b"{}", b"[1]", b"[null]", b'{"a":1}', b"[" * 50, b"[" * 2000, b'{"a":' * 2000, b"[" * 200 + b"]" * 200,
    b"", b",", b":", b"]", b"}", b"\x00", b"\xef\xbb\xbf", b"/**/", b"\\",
)  # fmt: skip

Change = Callable[[bytearray, Random], None]


class Mutator:
    """Makes inputs out of `seeds`; those that begin with `{` behind `skip` bytes are changed as text as well."""

    def __init__(self, seeds: Sequence[bytes], *, skip: int = 0) -> None:
        self._seeds = seeds
        texts = [seed for seed in seeds if seed[skip : skip + 1] == b"{"]
        self._tokens = {seed: [match.span() for match in _TOKEN.finditer(seed, skip)] for seed in texts}

    def make(self, random: Random) -> bytes:
        """The next input: at most `MOST_BYTES` B."""
        seed = self._seeds[int(random.random() * len(self._seeds))]
        if seed in self._tokens and random.random() < 0.7:
            made = bytearray(self._exchanged(seed, random))
            if random.random() < 0.7:
                return bytes(made[:MOST_BYTES])
        else:
            made = bytearray(seed)
        if random.random() < 0.1:
            _splice(made, self._seeds[int(random.random() * len(self._seeds))], random)
        while True:
            _CHANGES[int(random.random() * len(_CHANGES))](made, random)
            if random.random() < 0.4:
                return bytes(made[:MOST_BYTES])

    def _exchanged(self, seed: bytes, random: Random) -> bytes:
        """A text with one to three of its words exchanged, left out, doubled or moved."""
        spans = self._tokens[seed]
        parts: list[tuple[int, int, bytes]] = []
        for _ in range(1 + int(random.random() * 3)):
            start, stop = spans[int(random.random() * len(spans))]
            draw = random.random()
            if draw < 0.6:
                new = WORDS[int(random.random() * len(WORDS))]
            elif draw < 0.8:
                first, last = spans[int(random.random() * len(spans))]
                new = seed[first:last]
            elif draw < 0.9:
                new = seed[start:stop] * 2
            else:
                new = b""
            parts.append((start, stop, new))
        made, position = [], 0
        for start, stop, new in sorted(parts):
            if start >= position:
                made += [seed[position:start], new]
                position = stop
        return b"".join([*made, seed[position:]])


def _place(made: bytearray, random: Random) -> int:
    # Headers are where parsers branch: every other change is within the first 32 bytes.
    most = len(made) if random.random() < 0.5 else min(len(made), 32)
    return int(random.random() * most)


def _flip_bit(made: bytearray, random: Random) -> None:
    if made:
        made[_place(made, random)] ^= 1 << int(random.random() * 8)


def _set_byte(made: bytearray, random: Random) -> None:
    if made:
        made[_place(made, random)] = int(random.random() * 256)


def _set_integer(made: bytearray, random: Random) -> None:
    size = (1, 2, 4, 8)[int(random.random() * 4)]
    value = INTEGERS[int(random.random() * len(INTEGERS))] & ((1 << 8 * size) - 1)
    place = _place(made, random)
    made[place : place + size] = value.to_bytes(size, "little" if random.random() < 0.7 else "big")


def _add_to_integer(made: bytearray, random: Random) -> None:
    size = (1, 2, 4)[int(random.random() * 3)]
    place = _place(made, random)
    value = int.from_bytes(made[place : place + size], "little") + int(random.random() * 17) - 8
    made[place : place + size] = (value & ((1 << 8 * size) - 1)).to_bytes(size, "little")


def _cut(made: bytearray, random: Random) -> None:
    del made[_place(made, random) :]


def _remove(made: bytearray, random: Random) -> None:
    place = _place(made, random)
    del made[place : place + 1 + int(random.random() * 16)]


def _repeat(made: bytearray, random: Random) -> None:
    place = _place(made, random)
    part = made[place : place + 1 + int(random.random() * 64)]
    made[place:place] = part * (1 + int(random.random() * 4))


def _insert(made: bytearray, random: Random) -> None:
    place = _place(made, random)
    made[place:place] = random.randbytes(1 + int(random.random() * 32))


def _append(made: bytearray, random: Random) -> None:
    few = random.random() < 0.5
    made += random.randbytes(1 + int(random.random() * 8)) if few else bytes(1 << int(random.random() * 16))


def _overwrite(made: bytearray, random: Random) -> None:
    place = _place(made, random)
    made[place : place + 16] = random.randbytes(1 + int(random.random() * 16))


def _replace_all(made: bytearray, random: Random) -> None:
    made[:] = random.randbytes(int(random.random() * 64))


def _splice(made: bytearray, other: bytes, random: Random) -> None:
    made[_place(made, random) :] = other[int(random.random() * (len(other) + 1)) :]


_CHANGES: tuple[Change, ...] = (
    _flip_bit, _flip_bit, _set_byte, _set_byte, _set_integer, _set_integer, _add_to_integer, _cut, _remove, _repeat,
    _insert, _append, _overwrite, _replace_all,
)  # fmt: skip
