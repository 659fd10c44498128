"""`--config FILE.toml`: a command's options by the names that the command line gives them.

    port = 8300
    workers = 2
    tokens = "/etc/coinfer/tokens.json"
    insecure = false

What the command line says itself wins.  Paths are as on the command line: relative to where the command is started.
"""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError


def _take(context: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of all other options."""
    if path is not None and not context.resilient_parsing:
        context.default_map = _defaults(context, path)
    return path


def _defaults(context: typer.Context, path: Path) -> dict[str, object]:
    try:
        given = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config cannot be read: {(error.strerror or str(error)).lower()} ({path})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"--config is not TOML: {error} ({path})") from error
    # An argument has one name without hyphens, an option those that begin with them.
    known = {max(param.opts, key=len).removeprefix("--"): param for param in context.command.params}
    known.pop("config", None)
    defaults: dict[str, object] = {}
    for key, value in given.items():
        if key not in known:
            raise UsageError(f'"{key}" is no option of this command; these are: {", ".join(sorted(known))} ({path})')
        is_flag = bool(getattr(known[key], "is_flag", False))
        if not isinstance(value, str | int | float) or isinstance(value, bool) != is_flag:
            wanted = "true or false" if is_flag else "a text or a number"
            raise UsageError(f'"{key}" must be {wanted}, got {value!r} ({path})')
        name = known[key].name
        assert name is not None
        defaults[name] = value
    return defaults


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config", help="TOML file with any of these options by name; what is given here wins.", is_eager=True,
        callback=_take, show_default=False,
    ),
]  # fmt: skip
