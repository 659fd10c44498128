"""Recorded bandwidth from the files that others publish: one reader for four forms.

    form        a file looks like                                           rate of
    sabre       [{"duration_ms": 840, "bandwidth_kbps": 16823, ...}, ...]    a piece
    mahimahi    one integer a line: ms at which one 1,500 B packet may pass  bins of 1 s (or `bin_s`)
    G-NetTrack  CSV with Timestamp, DL_bitrate, UL_bitrate in kbit/s         a row, all rows equally long
    own         CSV with the header `seconds,bit/s`                          a row, up to the next row's time

The form is seen from the content.  The last row of an own CSV lasts as long as the median of the
others.  G-NetTrack samples evenly and writes whole seconds (0, 1 or 2 s from row to row), so its rows
share the log's duration evenly.
"""

from __future__ import annotations

import csv
import math
import re
import statistics
from datetime import UTC, datetime
from itertools import accumulate
from pathlib import Path
from typing import Literal

import msgspec

from ..errors import DataError, PlanError
from ..profile import Trace

_PACKET_BITS = 1500 * 8
_TIMESTAMP = "%Y.%m.%d_%H.%M.%S"


class _SabrePiece(msgspec.Struct):
    duration_ms: float
    bandwidth_kbps: float


def load_trace(path: Path, *, column: Literal["DL_bitrate", "UL_bitrate"] = "DL_bitrate", bin_s: float = 1.0) -> Trace:
    """The trace in a file, named after it.

    `column` is which rate of a G-NetTrack log counts; `bin_s` how long the bins of a mahimahi file are.

    Raises:
        DataError: the file is missing, empty, or in none of the four forms (the message says where).
    """
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read a trace: {error} (trace {path})") from error
    if not text:
        raise DataError(f"a trace must have at least one piece, got an empty file (trace {path})")
    first_line = text.splitlines()[0].strip()
    try:
        if text.startswith("["):
            pieces = _read_sabre(text)
        elif re.fullmatch(r"\d+", first_line):
            pieces = _read_mahimahi(text, bin_s)
        elif first_line.replace(" ", "") == "seconds,bit/s":
            pieces = _read_own(text)
        elif "Timestamp" in first_line and column in first_line:
            pieces = _read_nettrack(text, column)
        else:
            raise ValueError(
                f'starts with "{first_line[:40]}", which is neither sabre, mahimahi, G-NetTrack nor own CSV'
            )
        return _joined(path.stem, pieces)
    except (ValueError, msgspec.MsgspecError, PlanError) as error:
        raise DataError(f"not a trace: {' '.join(str(error).split())} (trace {path})") from error


def mean_rate_bps(trace: Trace) -> float:
    """The rate averaged over the trace's duration."""
    ends = (*trace.start_s[1:], trace.duration_s)
    bits = sum(rate * (end - start) for rate, start, end in zip(trace.rate_bps, trace.start_s, ends, strict=True))
    return bits / trace.duration_s


def _joined(name: str, pieces: list[tuple[float, float]]) -> Trace:
    """A trace from (seconds, bit/s) pieces; pieces without a duration are left out."""
    pieces = [piece for piece in pieces if piece[0] > 0]
    if not pieces:
        raise ValueError("no piece lasts longer than 0 s")
    ends = list(accumulate(duration for duration, _ in pieces))
    return Trace(
        name=name,
        start_s=(0.0, *ends[:-1]),
        rate_bps=tuple(rate for _, rate in pieces),
        duration_s=ends[-1],
    )


def _read_sabre(text: str) -> list[tuple[float, float]]:
    pieces = msgspec.json.decode(text, type=list[_SabrePiece])
    return [(piece.duration_ms / 1e3, piece.bandwidth_kbps * 1e3) for piece in pieces]


def _read_mahimahi(text: str, bin_s: float) -> list[tuple[float, float]]:
    times_s = [int(line) / 1e3 for line in text.split()]
    if any(b < a for a, b in zip(times_s, times_s[1:], strict=False)):
        raise ValueError("a mahimahi file's times must not decrease")
    # The file repeats after its last time, so that is its duration, and a packet ends the bin on whose end it falls.
    ends = [bin_s * (k + 1) for k in range(math.ceil(times_s[-1] / bin_s) - 1)] + [times_s[-1]]
    packets = [0] * len(ends)
    for time_s in times_s:
        packets[min(max(math.ceil(time_s / bin_s) - 1, 0), len(ends) - 1)] += 1
    lengths = [b - a for a, b in zip([0.0, *ends], ends, strict=False)]
    return [(length, count * _PACKET_BITS / length) for length, count in zip(lengths, packets, strict=True) if length]


def _read_own(text: str) -> list[tuple[float, float]]:
    rows = [(float(row[0]), float(row[1])) for row in list(csv.reader(text.splitlines()))[1:] if row]
    if not rows:
        raise ValueError("has a header but no rows")
    lengths = [b[0] - a[0] for a, b in zip(rows, rows[1:], strict=False)]
    if any(length <= 0 for length in lengths):
        raise ValueError("seconds must increase from row to row")
    lengths.append(statistics.median(lengths) if lengths else 1.0)
    return [(length, rate) for length, (_, rate) in zip(lengths, rows, strict=True)]


def _read_nettrack(text: str, column: str) -> list[tuple[float, float]]:
    times, rates = [], []
    for row in csv.DictReader(text.splitlines()):
        if row[column] not in ("-", "", None):
            times.append(datetime.strptime(row["Timestamp"], _TIMESTAMP).replace(tzinfo=UTC).timestamp())
            rates.append(float(row[column]) * 1e3)
    if not rates:
        raise ValueError(f"has no row with a {column}")
    if any(b < a for a, b in zip(times, times[1:], strict=False)):
        raise ValueError("times must not decrease")
    length_s = (times[-1] - times[0]) / (len(times) - 1) if times[-1] > times[0] else 1.0
    return [(length_s, rate) for rate in rates]
