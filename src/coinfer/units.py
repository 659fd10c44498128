"""Parsing and printing of quantities: the only place where units change.

Inside coinfer a duration is in seconds, a size in bytes (1 kB = 1,000 B), a rate in bits per
second, a power in watts, an energy in joules, all as float or int, with the unit in the name.

>>> parse_rate_bps("1 Mbit/s")
1000000.0
>>> parse_duration_s("20ms")
0.02
>>> format_bytes(1809)
'1.81 kB'
"""

from __future__ import annotations

import math
import re

from .errors import UsageError

_PREFIX = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9}
_NUMBER = r"\s*([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]+)?)\s*"
_RATE = re.compile(_NUMBER + r"([kKMG]?)(?:bit/s|bps|bit)\s*")
_BYTE_RATE = re.compile(_NUMBER + r"([kKMG]?)B/s\s*")
_DURATION = re.compile(_NUMBER + r"(us|ms|s|min)\s*")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0}


def parse_rate_bps(text: str) -> float:
    """Bits per second from text such as `100kbit/s`, `1 Mbit/s`, `731 kB/s`.

    Raises:
        UsageError: the text is not a positive number with one of those units.
    """
    for pattern, bits in ((_RATE, 1.0), (_BYTE_RATE, 8.0)):
        match = pattern.fullmatch(text)
        if match and float(match[1]) > 0:
            return float(match[1]) * _PREFIX[match[2]] * bits
    raise UsageError(f'a rate must be a positive number with bit/s, kbit/s, Mbit/s, Gbit/s or kB/s, got "{text}"')


def parse_duration_s(text: str) -> float:
    """Seconds from text such as `20ms`, `1.5 s`, `2min`.

    Raises:
        UsageError: the text is not a number at least 0 with one of those units.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UsageError(f'a duration must be a number with us, ms, s or min, got "{text}"')
    return float(match[1]) * _SECONDS[match[2]]


def _scaled(value: float, unit: str) -> str:
    for prefix, scale in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= scale:
            return f"{value / scale:.3g} {prefix}{unit}"
    return f"{value:.3g} {unit}"


def format_rate(rate_bps: float) -> str:
    """A rate with a decimal prefix, three significant digits.

    >>> format_rate(3e5)
    '300 kbit/s'
    """
    return _scaled(rate_bps, "bit/s")


def format_bytes(num_bytes: float) -> str:
    """A size in B, kB, MB, GB (powers of 1,000), three significant digits."""
    return _scaled(num_bytes, "B")


def format_duration(duration_s: float) -> str:
    """A duration in us, ms or s, three significant digits.

    >>> format_duration(0.01234)
    '12.3 ms'
    """
    if not math.isfinite(duration_s):
        return "-"
    if abs(duration_s) >= 1:
        return f"{duration_s:.3g} s"
    if abs(duration_s) >= 1e-3:
        return f"{duration_s * 1e3:.3g} ms"
    return f"{duration_s * 1e6:.3g} us"
