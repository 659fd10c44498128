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
_DURATION = re.compile(_NUMBER + r"(us|ms|s|min|h)\s*")
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0}


def parse_rate_bps(text: str) -> float:
    """Bits per second from text such as `100kbit/s`, `1 Mbit/s`, `731 kB/s`.

    Raises:
        UsageError: the text is not a positive number with one of those units.
    """
    for pattern, bits in ((_RATE, 1.0), (_BYTE_RATE, 8.0)):
        match = pattern.fullmatch(text)
        if match and 0 < float(match[1]) * _PREFIX[match[2]] * bits < math.inf:
            return float(match[1]) * _PREFIX[match[2]] * bits
    raise UsageError(
        f'a rate must be a positive number with bit/s, kbit/s, Mbit/s, Gbit/s or kB/s, got "{text}"'
    )


def parse_duration_s(text: str) -> float:
    """Seconds from text such as `20ms`, `1.5 s`, `2min`.

    Raises:
        UsageError: the text is not a number at least 0 with one of those units.
    """
    match = _DURATION.fullmatch(text)
    if match is None or math.isinf(float(match[1]) * _SECONDS[match[2]]):
        raise UsageError(f'a duration must be a number with us, ms, s, min or h, got "{text}"')
    return float(match[1]) * _SECONDS[match[2]]


def _scaled(value: float, unit: str, digits: int) -> str:
    for prefix, scale in (("", 1.0), ("k", 1e3), ("M", 1e6)):
        shown = f"{value / scale:.{digits}g}"
        if abs(float(shown)) < 1e3:
            return f"{shown} {prefix}{unit}"
    return f"{float(f'{value / 1e9:.{digits}g}'):.15g} G{unit}"


def format_rate(rate_bps: float, *, digits: int = 3) -> str:
    """A rate with a decimal prefix.

    >>> format_rate(3e5)
    '300 kbit/s'
    """
    return _scaled(rate_bps, "bit/s", digits)


def format_bytes(num_bytes: float, *, digits: int = 3) -> str:
    """A size in B, kB, MB, GB (powers of 1,000).

    >>> format_bytes(999.6)
    '1 kB'
    """
    return _scaled(num_bytes, "B", digits)


def format_duration(duration_s: float, *, digits: int = 3) -> str:
    """A duration in us, ms or s; `-` where it is not finite.

    >>> format_duration(0.01234)
    '12.3 ms'
    """
    if not math.isfinite(duration_s):
        return "-"
    for unit, seconds in (("us", 1e-6), ("ms", 1e-3)):
        shown = f"{duration_s / seconds:.{digits}g}"
        if abs(float(shown)) < 1e3:
            return f"{shown} {unit}"
    return f"{float(f'{duration_s:.{digits}g}'):.15g} s"
