"""An edge in a process of its own: `python -m coinfer.runtime BUNDLE --port 0`; `spawn` starts it.

The command line `coinfer serve` is the same for people.  This one can end with whoever started it, so that a
benchmark that is killed leaves no orphan behind.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
import threading
from pathlib import Path

from ..engine.measure import pin
from ..errors import CoinferError
from ..signature import load_signed_bundle
from .access import access_of
from .edge import DEFAULT_PORT, LOOPBACK, EdgeLimits, serve

_LOG = logging.getLogger("coinfer.edge")
_LIMITS = {name: float if name.endswith("_s") else int for name in EdgeLimits.__struct_fields__}


def _end_with_stdin() -> None:
    """Ask this process to end as soon as whoever holds its standard input is gone."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="coinfer-stdin", daemon=True).start()


def main() -> int:
    """Serve until ended; 0, or the exit code of the error that is logged in one line."""
    parser = argparse.ArgumentParser(prog="python -m coinfer.runtime", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--host", default=LOOPBACK)
    parser.add_argument("--port", type=int, default=DEFAULT_PORT)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--max-batch", type=int, default=1)
    parser.add_argument("--batch-wait", type=float, default=0.0, help="in s")
    parser.add_argument("--load", type=float, default=1.0)
    for name, kind in _LIMITS.items():
        option = "--" + name.removesuffix("_s").replace("_", "-")
        default = getattr(EdgeLimits(), name)
        parser.add_argument(option, dest=name, type=kind, default=default, help="in s" if kind is float else None)
    for option in ("--cert", "--key", "--client-ca", "--crl", "--tokens", "--verify-key"):
        parser.add_argument(option, type=Path)
    parser.add_argument("--insecure", action="store_true")
    parser.add_argument("--core", type=int, default=None)
    parser.add_argument("--end-with-stdin", action="store_true")
    given = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    if given.end_with_stdin:
        _end_with_stdin()
    try:
        if given.core is not None:
            pin(given.core)
        serve(
            load_signed_bundle(given.bundle, given.verify_key),
            host=given.host,
            port=given.port,
            workers=given.workers,
            threads=given.threads,
            max_batch=given.max_batch,
            batch_wait_s=given.batch_wait,
            load=given.load,
            limits=EdgeLimits(**{name: getattr(given, name) for name in _LIMITS}),
            access=access_of(
                cert=given.cert, key=given.key, client_ca=given.client_ca, crl=given.crl,
                tokens=given.tokens, verify_key=given.verify_key, is_insecure=given.insecure,
            ),  # fmt: skip
        )
    except CoinferError as error:
        _LOG.error("%s", error)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
