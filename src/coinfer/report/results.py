"""Measured figures as files: docs/results/NAME.json, NAME.md, and the raw logs behind them.

No figure is typed by hand: a `Row` names its raw log (gzipped JSON, a line a request), from which the
bench recomputes it. Everything written here is the same, byte for byte, for the same content, so that a
recomputation that changes nothing changes no file.
"""

from __future__ import annotations

import gzip
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from ..errors import DataError
from ..files import write_atomically
from ..plan import Value
from .table import TextTable, markdown

How = Literal["measured", "simulated", "estimated"]


class Row(Value, frozen=True, kw_only=True):
    """One figure: what it is, of how many, how it was had, and where its raw log lies.

    `against` names the baseline of a ratio (None for an absolute figure); `spread` is the 5th and 95th
    percentile in the same unit (None where there is one value); `raw` the raw log's file name, or None.

    Raises:
        DataError: the value or the spread is not finite, or `n` is below 1.
    """

    name: str
    value: float
    unit: str
    how: How
    n: int
    against: str | None = None
    spread: tuple[float, float] | None = None
    raw: str | None = None

    def __post_init__(self) -> None:
        if not all(math.isfinite(number) for number in (self.value, *(self.spread or ()))):
            raise DataError(f'value must be finite, got {self.value}, spread {self.spread} (row "{self.name}")')
        if self.n < 1:
            raise DataError(f'n must be at least 1, got {self.n} (row "{self.name}")')


class Results(Value, frozen=True, kw_only=True):
    """What a results file holds: from which commit, when, where, by which command, and the rows."""

    commit: str
    date: str
    machine: str
    command: str
    rows: tuple[Row, ...]


def write_results(path: Path, results: Results) -> None:
    """Write the JSON file at `path`, atomically.

    Raises:
        DataError: two rows have the same name.
    """
    names = [row.name for row in results.rows]
    for name in names:
        if names.count(name) > 1:
            raise DataError(f'row names must be unique, got "{name}" {names.count(name)} times ({path.name})')
    fields = [msgspec.to_builtins(row) for row in results.rows]
    head = msgspec.to_builtins(results)
    order = ("name", "value", "unit", "against", "how", "n", "spread", "raw")
    head["rows"] = [{key: row[key] for key in order} for row in fields]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(head), indent=1) + b"\n")


def read_results(path: Path) -> Results:
    """The results file at `path`.

    Raises:
        DataError: no such file, or not a results file.
    """
    if not path.is_file():
        raise DataError(f"no results file {path}")
    try:
        return msgspec.json.decode(path.read_bytes(), type=Results)
    except msgspec.MsgspecError as error:
        raise DataError(f"{path} is not a results file: {error}") from error


def results_table(rows: Sequence[Row]) -> TextTable:
    """The rows as a table, in their order."""
    return TextTable(
        title="",
        columns=("figure", "value", "unit", "p5 to p95", "against", "how", "n", "raw log"),
        right=("value", "p5 to p95", "n"),
        rows=tuple(
            (
                row.name,
                f"{row.value:.4g}",
                row.unit,
                "" if row.spread is None else f"{row.spread[0]:.4g} to {row.spread[1]:.4g}",
                row.against or "",
                row.how,
                str(row.n),
                row.raw or "",
            )
            for row in rows
        ),
    )


def results_markdown(results: Results) -> str:
    """The rows as a Markdown table under one line that says where they come from."""
    source = f"Commit {results.commit}, {results.date}, {results.machine}. Made by `{results.command}`."
    return f"{source}\n\n{markdown(results_table(results.rows))}"


def write_raw(path: Path, lines: Iterable[Value | Mapping[str, Any]]) -> None:
    """Write one JSON object a line, gzipped with no time and no name in its header, atomically."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        for line in lines:
            file.write(msgspec.json.encode(line) + b"\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())


def read_raw(path: Path) -> list[dict[str, Any]]:
    """The objects of a raw log, in order.

    Raises:
        DataError: no such file, or not gzipped JSON lines.
    """
    if not path.is_file():
        raise DataError(f"no raw log {path}")
    try:
        lines = gzip.decompress(path.read_bytes()).splitlines()
        return [msgspec.json.decode(line, type=dict[str, Any]) for line in lines]
    except (OSError, EOFError, msgspec.MsgspecError) as error:
        raise DataError(f"{path} is not a raw log (gzipped JSON lines): {error}") from error
