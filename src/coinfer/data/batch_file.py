"""The official CIFAR batch files "for Python": read without running anything that they say.

They are pickles, and a pickle is a program: it may name any function and have it called.  This reader
knows the two dozen instructions that the official files consist of, and three names, which it
answers itself instead of importing them; anything else is refused.

    {batch_label: bytes, labels: [int], data: numpy (10000, 3072) uint8, filenames: [bytes]}
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError

_NAMES = {
    b"numpy.core.multiarray _reconstruct": "reconstruct",
    b"numpy ndarray": "ndarray",
    b"numpy dtype": "dtype",
}
_CONSTANTS: dict[int, object] = {ord("N"): None, 0x88: True, 0x89: False}
_INTEGERS = {ord("K"): "<B", ord("M"): "<H", ord("J"): "<i"}
_STRINGS = {ord("U"): "<B", ord("T"): "<i", ord("C"): "<B", ord("B"): "<I", ord("X"): "<I"}
_STORES = {ord("q"): "<B", ord("r"): "<I"}
_FETCHES = {ord("h"): "<B", ord("j"): "<I"}
_TUPLES = {0x85: 1, 0x86: 2, 0x87: 3}


class _Name(str):
    """One of the three names of `_NAMES`."""


class _Made:
    """What a call of one of the names stands for, until its state is known."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.array: np.ndarray[Any, np.dtype[np.uint8]] | None = None


def read_batch(path: Path) -> dict[str, Any]:
    """The dictionary that an official batch file holds, its keys as text.

    Raises:
        DataError: the file cannot be read, is cut short, or holds any other instruction or name.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        result = _Reader(raw).run()
    except (struct.error, IndexError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not an official CIFAR batch file, or is cut short: {error}") from error
    if not isinstance(result, dict):
        raise DataError(f"{path} is not an official CIFAR batch file: it holds a {type(result).__name__}")
    return {
        key.decode("latin-1") if isinstance(key, bytes) else str(key): value.array
        if isinstance(value, _Made)
        else value
        for key, value in result.items()
    }


class _Reader:
    """A stack, a memory, and one method for each kind of instruction."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        self.position = 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memory: dict[int, Any] = {}

    def run(self) -> Any:
        """Follow the instructions up to the stop."""
        while True:
            code = self.raw[self.position]
            self.position += 1
            if code == ord("."):
                return self.stack.pop()
            if not (self._value(code) or self._container(code) or self._call(code)):
                raise ValueError(f"instruction {bytes([code])!r} at byte {self.position - 1} is not allowed")

    def _number(self, form: str) -> int:
        (value,) = struct.unpack_from(form, self.raw, self.position)
        self.position += struct.calcsize(form)
        return int(value)

    def _bytes(self, count: int) -> bytes:
        if not 0 <= count <= len(self.raw) - self.position:
            raise ValueError(f"{count} bytes wanted, {len(self.raw) - self.position} left")
        self.position += count
        return self.raw[self.position - count : self.position]

    def _line(self) -> bytes:
        end = self.raw.index(b"\n", self.position)
        line = self.raw[self.position : end]
        self.position = end + 1
        return line

    def _value(self, code: int) -> bool:
        if code == 0x80:
            self.position += 1
        elif code in _CONSTANTS:
            self.stack.append(_CONSTANTS[code])
        elif code in _INTEGERS:
            self.stack.append(self._number(_INTEGERS[code]))
        elif code in _STRINGS:
            self.stack.append(self._bytes(self._number(_STRINGS[code])))
        elif code in _STORES:
            self.memory[self._number(_STORES[code])] = self.stack[-1]
        elif code in _FETCHES:
            self.stack.append(self.memory[self._number(_FETCHES[code])])
        else:
            return False
        return True

    def _since_mark(self) -> list[Any]:
        mark = self.marks.pop()
        items = self.stack[mark:]
        del self.stack[mark:]
        return items

    def _container(self, code: int) -> bool:
        letter = chr(code)
        if letter in "}])":
            self.stack.append({"}": dict, "]": list, ")": tuple}[letter]())
        elif letter == "(":
            self.marks.append(len(self.stack))
        elif letter == "t":
            self.stack.append(tuple(self._since_mark()))
        elif code in _TUPLES:
            items = tuple(self.stack[-_TUPLES[code] :])
            del self.stack[-_TUPLES[code] :]
            self.stack.append(items)
        elif letter in "ea":
            items = tuple(self._since_mark()) if letter == "e" else (self.stack.pop(),)
            self.stack[-1].extend(items)
        elif letter in "us":
            pairs = self._since_mark() if letter == "u" else [self.stack.pop(-2), self.stack.pop()]
            self.stack[-1].update(zip(pairs[::2], pairs[1::2], strict=True))
        else:
            return False
        return True

    def _call(self, code: int) -> bool:
        letter = chr(code)
        if letter == "c":
            name = self._line() + b" " + self._line()
            if name not in _NAMES:
                raise ValueError(f"name {name.decode('latin-1')!r} is not allowed")
            self.stack.append(_Name(_NAMES[name]))
        elif letter == "R":
            arguments, name = self.stack.pop(), self.stack.pop()
            if not isinstance(name, _Name) or not isinstance(arguments, tuple):
                raise ValueError("a call of something that is not a name")
            if name == "dtype" and arguments[0] != b"u1":
                raise ValueError(f"numbers must be u1, got {arguments[0]!r}")
            self.stack.append(_Made(name))
        elif letter == "b":
            state = self.stack.pop()
            self._fill(self.stack[-1], state)
        else:
            return False
        return True

    @staticmethod
    def _fill(made: Any, state: Any) -> None:
        if not isinstance(made, _Made) or made.kind not in ("reconstruct", "dtype"):
            raise ValueError("a state for something that has none")
        if made.kind == "reconstruct":
            _, shape, dtype, is_fortran, raw = state
            if not isinstance(dtype, _Made) or dtype.kind != "dtype" or not isinstance(raw, bytes):
                raise ValueError("an array that is not of bytes")
            made.array = np.frombuffer(raw, np.uint8).reshape(shape, order="F" if is_fortran else "C")
