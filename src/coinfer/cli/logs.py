"""Log lines of the long-lived commands on stderr: text for people, or a JSON object a line."""

from __future__ import annotations

import logging
import sys
from datetime import UTC, datetime
from typing import Any

import msgspec

from ..errors import UsageError

FORMS = ("text", "json")
# What a log call may name in `extra`, beside its message.
FIELDS = ("peer", "device", "request", "plan")


class JsonLines(logging.Formatter):
    """`{"time", "level", "logger", "message"}` and whichever of FIELDS the record has."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        entry |= {name: value for name in FIELDS if (value := getattr(record, name, None)) is not None}
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(entry, enc_hook=str).decode()


def log_to_stderr(name: str, form: str, *, level: int = logging.INFO) -> None:
    """Let the lines of a logger appear on stderr, in one of FORMS.

    Raises:
        UsageError: there is no such form.
    """
    if form not in FORMS:
        raise UsageError(f'--log must be {" or ".join(FORMS)}, got "{form}"')
    handler = logging.StreamHandler(sys.stderr)
    if form == "json":
        handler.setFormatter(JsonLines())
    log = logging.getLogger(name)
    log.setLevel(level)
    log.propagate = False
    log.handlers = [handler]
