"""How far an edge may be reached: this machine alone needs nothing, anywhere else needs TLS and tokens."""

from __future__ import annotations

from pathlib import Path

from ..errors import UsageError
from ..plan import Value
from .addresses import is_loopback
from .door import Door, OpenDoor
from .tls import EdgeTls
from .tokens import Tokens


class Access(Value, frozen=True, kw_only=True):
    """Who may reach an edge, and by what.

    `tls` are the edge's certificate and key, `tokens` the file that `coinfer token` writes.  `verify_key` is the public
    key that a bundle must be signed with, where one is given, at the start and at each reload.  `is_insecure` gives up
    TLS, which an address beyond loopback needs; tokens it needs all the same.
    """

    tls: EdgeTls | None = None
    tokens: Path | None = None
    verify_key: Path | None = None
    is_insecure: bool = False

    def door(self) -> Door:
        """Who is let in.

        Raises:
            UsageError: the tokens file cannot be read, or is none.
        """
        return OpenDoor() if self.tokens is None else Tokens(self.tokens)

    def check(self, address: str) -> str | None:
        """Whether an edge may listen on `address`, which is resolved; a warning where it may only by `is_insecure`.

        Raises:
            UsageError: it may not.
        """
        if is_loopback(address):
            return None
        missing = []
        if self.tls is None and not self.is_insecure:
            missing.append("TLS (--cert and --key, or --insecure)")
        if self.tokens is None:
            missing.append("tokens (--tokens)")
        if missing:
            raise UsageError(
                f"{address} can be reached from other machines: that needs {' and '.join(missing)}; "
                f"127.0.0.1 needs nothing"
            )
        if self.tls is not None:
            return None
        return f"insecure: {address} can be reached from other machines without TLS: tokens can be read on the way"


def access_of(
    *,
    cert: Path | None,
    key: Path | None,
    client_ca: Path | None,
    crl: Path | None,
    tokens: Path | None,
    verify_key: Path | None,
    is_insecure: bool,
) -> Access:
    """What a command line gives, by the names of its options.

    Raises:
        UsageError: a file without those that it needs.
    """
    if (cert is None) != (key is None):
        raise UsageError("TLS needs both --cert and --key")
    if cert is None and (client_ca or crl):
        raise UsageError("--client-ca and --crl need --cert and --key")
    tls = None
    if cert is not None and key is not None:
        tls = EdgeTls(certificate=cert, key=key, client_ca=client_ca, crl=crl)
    return Access(tls=tls, tokens=tokens, verify_key=verify_key, is_insecure=is_insecure)
