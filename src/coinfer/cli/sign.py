"""`coinfer sign`: whose bundle it is."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Json
from .output import note, print_json


def sign(
    bundle: Annotated[
        Path | None, typer.Argument(metavar="BUNDLE", help="Folder that `coinfer build` wrote.", show_default=False)
    ] = None,
    key: Annotated[
        Path | None, typer.Option("--key", metavar="FILE", help="Private key, Ed25519 in PEM.", show_default=False)
    ] = None,
    new_key: Annotated[
        Path | None,
        typer.Option(
            "--new-key", metavar="FILE", help="Make a private key, and FILE.pub beside it, instead.", show_default=False
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Sign a bundle.

    Writes bundle.json.sig beside bundle.json, which holds the hash of every other file. The bundle stays the same one;
    the signature moves with it. `coinfer serve --verify-key` and `coinfer run --verify-key` take no bundle that the
    holder of the key has not signed.
    """
    from ..signature import new_key as make_key
    from ..signature import sign as sign_bundle

    if (new_key is not None) == (bundle is not None) or (key is None) != (bundle is None):
        raise UsageError("`coinfer sign BUNDLE --key FILE` signs, `coinfer sign --new-key FILE` makes a key")
    if new_key is not None:
        public = make_key(new_key)
        note(f"wrote {new_key} (keep it secret) and {public} (give it to whoever verifies)")
        wrote = {"key": str(new_key), "public_key": str(public)}
    elif bundle is not None and key is not None:
        wrote = {"signature": str(sign_bundle(bundle, key))}
        note(f"wrote {wrote['signature']}")
    if json:
        print_json(wrote)
