"""The raw log of a benchmark: every line's form, and reading and writing it.

    Header           once: what ran, on what machine
    CalibrationLine  one for each emulated device and load: where the estimates' times come from
    CellLine         one for each cell: its conditions, who was to be measured, what was estimated
    RequestLine      one for each request, in the order in which they were sent
    MemoryLine       one after each cell: what the device process holds in memory, how long a stream kept it busy

A log holds all that a table shows, so `summary.summarise` recomputes every figure from it alone.
Written as gzipped JSON lines with neither time nor name in the gzip header: equal lines, equal bytes.
"""

from __future__ import annotations

import gzip
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Literal, TypeVar

import msgspec

from ..errors import DataError
from ..files import write_atomically
from ..plan import Kind, Precision, Value, Way
from ..profile import Link, Machine, Slowdown
from .worker import Ready, Request
from .yardstick import LoopTimes

Phase = Literal["warmup", "main", "final", "stream", "calibrate"]


class MenuPlan(Value, frozen=True, kw_only=True):
    """What the log needs to know of a plan; its accuracy is that of images no choice has seen, where measured."""

    number: int
    kind: Kind
    precision: Precision
    label: str
    loss_points: float | None
    accuracy: float | None
    num_images: int
    split: str
    has_exits: bool = False


class Header(Value, frozen=True, kw_only=True, tag="header", tag_field="line"):
    """What ran: the bundle, the machine, the device process as it was when it was ready.

    `yardstick`: the speed that the emulated device has (see `lab.yardstick`).
    """

    coinfer: str
    bundle: str
    model: str
    data: str
    date: str
    machine: Machine
    cores: tuple[int | None, int | None]
    seed: int
    max_loss_points: float
    menu: tuple[MenuPlan, ...]
    ready: Ready
    start_s: float
    yardstick: LoopTimes | None = None


class CalibrationLine(Value, frozen=True, kw_only=True, tag="calibration", tag_field="line"):
    """The following "calibrate" requests: no limit of rate, this delay, this device, this load.

    `is_direct`: device and edge were joined without the shaped link between them.
    """

    cell: str
    slowdown: Slowdown
    load: float
    delay_s: float
    is_direct: bool = False


class EstimateLine(Value, frozen=True, kw_only=True):
    """What is expected of one plan in a cell, from times measured between its requests but without a limit of rate."""

    plan: int
    roles: tuple[str, ...]
    latency_s: float
    stages_s: dict[str, float]
    busy_s: dict[str, float]


class CellLine(Value, frozen=True, kw_only=True, tag="cell", tag_field="line"):
    """One cell: conditions, the chosen plan, the best of each way, the estimate of each plan to be measured."""

    cell: str
    link: Link
    slowdown: Slowdown
    load: float
    device: str
    exchange_s: float
    chosen: int
    baselines: dict[Way, int]
    estimates: tuple[EstimateLine, ...]


class RequestLine(Value, frozen=True, kw_only=True, tag="request", tag_field="line"):
    """One request as the device saw it; `label` is the picture's true class where it is known."""

    cell: str
    phase: Phase
    round: int
    request: Request
    label: int | None = None


class MemoryLine(Value, frozen=True, kw_only=True, tag="memory", tag_field="line"):
    """Resident memory of the device process when a cell was done; `stream_busy_s`: how long its slowed core computed
    for the stream (0 where it was not slowed, None where there was no stream)."""

    cell: str
    rss_bytes: int
    stream_busy_s: float | None = None


Line = Header | CalibrationLine | CellLine | RequestLine | MemoryLine
T = TypeVar("T")
_DECODER = msgspec.json.Decoder(Line)


def write_log(path: Path, lines: Iterable[Value]) -> None:
    """Write a whole log in place of what was there, atomically; folders are made."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=buffer, mtime=0) as file:
        for line in lines:
            file.write(msgspec.json.encode(line) + b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read_log(path: Path) -> list[Line]:
    """The lines of a log, in order.

    Raises:
        DataError: no such file, or not such a log.
    """
    return read_lines(path, _DECODER)


def read_lines(path: Path, decoder: msgspec.json.Decoder[T]) -> list[T]:
    """The lines of a log, each by `decoder`.

    Raises:
        DataError: as `read_log`.
    """
    try:
        return [decoder.decode(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise DataError(f"not a benchmark's log: {error} (log {path})") from error
