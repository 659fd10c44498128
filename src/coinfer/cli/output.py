"""Printing: JSON objects and tables on stdout, progress and notes on stderr.

On a terminal, progress is a bar per stage; elsewhere (a log, a pipe) a line when a stage begins, and one
now and then while a long one goes on.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

from ..units import format_duration

if TYPE_CHECKING:
    from ..report.table import TextTable

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, detail), as `build` reports it."""

# Into a log, a long stage has a line every so many seconds.
LINE_S = 30.0


def print_json(value: object) -> None:
    """One JSON object (NaN and infinity as null) on stdout."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())


def note(text: str) -> None:
    """A line for people, on stderr."""
    print(text, file=sys.stderr)


def print_table(table: TextTable) -> None:
    """A table on stdout: coloured on a terminal, in plain columns into a pipe or a file."""
    if not sys.stdout.isatty():
        from ..report.table import plain_text

        print(plain_text(table))
        return
    from rich.console import Console

    from ..report.table import rich_table

    Console(highlight=False).print(rich_table(table))


@contextmanager
def progress_on_stderr() -> Iterator[Progress]:
    """A `Progress` that shows on stderr how far each stage is, and how long it may still take."""
    if sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


def _lines() -> Progress:
    """A line when a stage begins, and every `LINE_S` of a long one."""
    begun: dict[str, tuple[float, int]] = {}
    told_s = 0.0

    def report(stage: str, done: int, total: int, detail: str) -> None:
        nonlocal told_s
        now_s = time.monotonic()
        if stage not in begun:
            begun[stage], told_s = (now_s, done), now_s
            note(f"{stage} ({total})" if total > 1 else stage)
        elif now_s > told_s + LINE_S and done < total:
            told_s = now_s
            start_s, first = begun[stage]
            left_s = (now_s - start_s) * (total - done) / max(done - first, 1)
            note(f"{stage} {done}/{total}, {format_duration(left_s)} left{', ' if detail else ''}{detail}")

    return report


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    # On a narrow terminal the names and details are shortened, not the time that is left.
    columns = (
        TextColumn("{task.description}", table_column=Column(max_width=36, no_wrap=True, overflow="ellipsis")),
        BarColumn(bar_width=12),
        MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=9)),
        TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
        TextColumn("{task.fields[detail]}", table_column=Column(ratio=1, no_wrap=True, overflow="ellipsis")),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True), expand=True) as bars:

        def report(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail="")
            bars.update(tasks[stage], completed=done, total=total, detail=detail)

        yield report
