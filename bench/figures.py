"""Where the runtime's benches leave what they found: NAME.json with the figures, NAME.jsonl.gz with each event.

The figures say by which command, at which commit, on which machine and when they were had.
"""

from __future__ import annotations

import datetime
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec

from coinfer.engine.measure import describe_machine
from coinfer.files import write_atomically
from coinfer.report.results import write_raw

RAW = Path("docs/results/raw/runtime")
_MODULES = {"tls": "tls_overhead"}


def keep_figures(
    raw: Path, name: str, figures: Mapping[str, Any], events: Iterable[Mapping[str, Any]] | None = None
) -> None:
    """Write a bench's figures, and what they are made of."""
    machine = describe_machine()
    told = {
        "command": " ".join(["python -m", f"bench.{_MODULES.get(name, name)}", *sys.argv[1:]]),
        "commit": commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.system}",
    }
    raw.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode({**told, **figures}), indent=1)
    write_atomically(raw / f"{name}.json", content + b"\n")
    if events is not None:
        write_raw(raw / f"{name}.jsonl.gz", events)


def commit() -> str:
    """Of what is run, as far as git knows."""
    found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def rounded(value: float | None) -> float | None:
    """Six digits are enough for people."""
    return None if value is None else float(f"{value:.6g}")
