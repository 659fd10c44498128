"""`coinfer cert`: certificates to try TLS with."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..errors import UsageError
from .options import Json
from .output import note, print_json


def cert(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where the files go.", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option("--host", metavar="NAME", help="Name or address of the edge; repeatable.", show_default=False),
    ] = None,
    days: Annotated[int, typer.Option("--days", min=1, max=3650, help="How long they are valid.")] = 90,
    revoke: Annotated[
        Path | None,
        typer.Option(
            "--revoke", metavar="FILE", help="Add this certificate to the CRL of the CA in DIR instead.",
            show_default=False,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make a CA and certificates for tests.

    Writes a CA (ca.pem), a certificate for the edge (server.pem, server.key), one for devices (client.pem, client.key)
    and a list of revoked ones (crl.pem), all labelled as for tests; keys are readable by their owner alone. Devices
    need ca.pem and no more, unless the edge is given --client-ca. In production, use the certificates of your own CA.
    """
    from ..runtime.certificates import FILES, make_test_ca, revoke_certificate

    if (revoke is None) == (host is None):
        raise UsageError("`coinfer cert DIR` needs --host NAME to make certificates, or --revoke FILE to revoke one")
    if revoke is not None:
        revoke_certificate(folder, revoke, days=days)
        note(f"revoked {revoke} in {folder / 'crl.pem'}; send the edge SIGHUP")
        files = ["crl.pem"]
    else:
        make_test_ca(folder, host or [], days=days)
        note(f"for tests only: a CA and certificates for {', '.join(host or [])} in {folder}, valid for {days} days")
        files = list(FILES)
    if json:
        print_json({"folder": str(folder), "files": files, "hosts": host or [], "days": days})
