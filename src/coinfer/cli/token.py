"""`coinfer token`: which devices an edge lets in."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Json
from .output import note, print_json


class TokenAction(StrEnum):
    """What is done with the file."""

    add = "add"
    list = "list"
    revoke = "revoke"


def token(
    action: Annotated[
        TokenAction, typer.Argument(metavar="add|list|revoke", help="What to do.", show_default=False)
    ],
    file: Annotated[
        Path, typer.Option("--file", metavar="FILE", help="What `coinfer serve --tokens` is given.", show_default=False)
    ],
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="Of the device, for add and revoke.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Give devices tokens, and take them back.

    `add NAME` prints a new token on stdout, once: the file holds its hash alone. Write it to a file on the device, for
    `coinfer run --token-file`. An earlier token of that device is no longer valid. `revoke NAME` ends a token; an edge
    that runs notices it within about a second and tells the device goodbye. `list` prints names and dates.
    """
    from ..runtime.tokens import add_token, read_tokens, revoke_token

    if (action is TokenAction.list) != (name is None):
        raise UsageError("`coinfer token add NAME` and `revoke NAME` need a name, `list` takes none")
    if name is None:
        devices = read_tokens(file).devices
        if json:
            print_json({"devices": {device: entry.created for device, entry in sorted(devices.items())}})
            return
        for device, entry in sorted(devices.items()):
            print(f"{device}  {entry.created}")
    elif action is TokenAction.add:
        made = add_token(file, name)
        if json:
            print_json({"device": name, "token": made})
        else:
            print(made)
    else:
        revoke_token(file, name)
        note(f"revoked the token of {name}")
        if json:
            print_json({"device": name, "revoked": True})
