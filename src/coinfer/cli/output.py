"""Printing: JSON objects and tables on stdout, progress and notes on stderr.

On a terminal, progress is a bar per stage; elsewhere (a log, a pipe) one line when a stage begins.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ..report.table import TextTable

Progress = Callable[[str, int, int, str], None]
"""(stage, done, total, detail), as `build` reports it."""



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
def progress_on_stderr(*, is_quiet: bool = False) -> Iterator[Progress]:
    """A `Progress` that shows on stderr how far each stage is."""
    if is_quiet:
        yield lambda stage, done, total, detail: None
    elif sys.stderr.isatty():
        with _bars() as report:
            yield report
    else:
        yield _lines()


def _lines() -> Progress:
    seen: set[str] = set()

    def report(stage: str, done: int, total: int, detail: str) -> None:
        if stage not in seen:
            seen.add(stage)
            note(f"{stage} ({total})" if total > 1 else stage)

    return report


@contextmanager
def _bars() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[detail]}"),
    )
    tasks: dict[str, TaskID] = {}
    with Bars(*columns, console=Console(stderr=True)) as bars:

        def report(stage: str, done: int, total: int, detail: str) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(stage, total=total, detail="")
            bars.update(tasks[stage], completed=done, total=total, detail=detail)

        yield report
