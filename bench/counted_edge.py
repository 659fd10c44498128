"""An edge that writes down every request before it computes it: `python -m bench.counted_edge BUNDLE --log FILE ...`.

The other options are those of `python -m coinfer.runtime`.  The log has 8 bytes a request: the number of its connection
in the order of their first requests, and its own number; it is whole even where the process is killed.
"""

from __future__ import annotations

import os
import struct
import sys
from collections.abc import Sequence
from pathlib import Path
from weakref import WeakKeyDictionary

from coinfer.runtime.__main__ import main as serve
from coinfer.runtime.batch import Computed, Workers
from coinfer.runtime.turns import Asker, Job

_ENTRY = struct.Struct("<II")
compute = Workers.compute


def read_computed(path: Path) -> list[tuple[int, int]]:
    """(connection, request) of all that an edge has begun to compute, in its order."""
    data = path.read_bytes()
    return list(_ENTRY.iter_unpack(data[: len(data) // _ENTRY.size * _ENTRY.size]))


def main() -> int:
    """Serve until ended."""
    place = sys.argv.index("--log")
    log = os.open(sys.argv[place + 1], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    del sys.argv[place : place + 2]
    connections: WeakKeyDictionary[Asker, int] = WeakKeyDictionary()
    known = 0

    def counted(self: Workers, jobs: Sequence[Job]) -> list[Computed]:
        nonlocal known
        for job in jobs:
            if job.connection not in connections:
                connections[job.connection] = known
                known += 1
            os.write(log, _ENTRY.pack(connections[job.connection], job.request.request))
        return compute(self, jobs)

    Workers.compute = counted  # type: ignore[method-assign]
    return serve()


if __name__ == "__main__":
    sys.exit(main())
