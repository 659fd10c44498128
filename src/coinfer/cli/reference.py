"""docs/cli.md, written from the commands' own help: `python -m coinfer.cli.reference > docs/cli.md`."""

from __future__ import annotations

import sys

import typer

from .app import COMMANDS, app

INTRODUCTION = """# Command line

Written from `--help` by `make docs`; do not edit.  Exit codes: 0 done, 1 coinfer could not do it, 2 the command
line was not understood.  What went wrong is one line on stderr; `coinfer --debug COMMAND` adds the traceback.
"""
WIDTH = 100


def reference() -> str:
    """The whole page: the help of `coinfer` and of each command, 100 characters wide."""
    group = typer.main.get_command(app)
    context = group.make_context("coinfer", [], resilient_parsing=True, terminal_width=WIDTH)
    parts = [INTRODUCTION, _block("coinfer", group.get_help(context))]
    for name in COMMANDS:
        command = group.commands[name]  # type: ignore[attr-defined]
        inner = command.make_context(name, [], parent=context, resilient_parsing=True, terminal_width=WIDTH)
        parts.append(_block(f"coinfer {name}", command.get_help(inner)))
    return "\n".join(parts)


def _block(title: str, text: str) -> str:
    lines = "\n".join(line.rstrip() for line in text.splitlines())
    return f"## {title}\n\n```text\n{lines}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
