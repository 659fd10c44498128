"""An edge in a process of its own, for as long as a `with` block lasts.

    with EdgeProcess(bundle.folder, port=0) as edge:
        with Device(bundle, edge=edge.url, plan=3) as device:
            ...

The process ends with the block, and with this process however that one ends: it watches its
standard input, which nobody else holds.  Nothing here imports a server.
"""

from __future__ import annotations

import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from ..errors import LinkError

_READY = re.compile(r"listening on (wss?://\S+)")
STOP_S = 10.0


class EdgeProcess:
    """Starts an edge that serves the bundle in `folder` on loopback, and waits until it listens.

    `url` is what a Device is given, `pid` the process, `log` its latest lines.

    Args:
        folder: the bundle's folder.
        port: 0 lets the system choose.
        workers, threads, max_batch, load: as `serve`.
        core: pin the process to one core.
        ready_s: how long it may take to listen.
        options: more of `python -m coinfer.runtime`, such as ("--tokens", "tokens.json").
        module: what is run in its place, with the same options.

    Raises:
        LinkError: it ended or did not listen in time; the message has its last line.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        workers: int = 1,
        threads: int = 1,
        max_batch: int = 1,
        load: float = 1.0,
        core: int | None = None,
        ready_s: float = 60.0,
        options: Sequence[str] = (),
        module: str = "coinfer.runtime",
    ) -> None:
        command = [sys.executable, "-m", module, str(folder), "--end-with-stdin"]
        command += ["--port", str(port), "--workers", str(workers), "--threads", str(threads)]
        command += ["--load", str(load), "--max-batch", str(max_batch)]
        if core is not None:
            command += ["--core", str(core)]
        command += options
        self.log: deque[str] = deque(maxlen=1000)
        self.url = ""
        self._settled = threading.Event()
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            # Ctrl-C goes to the caller alone, which then ends its children in order.
            process_group=0,
        )
        self._reader = threading.Thread(target=self._read, name="coinfer-edge-log", daemon=True)
        self._reader.start()
        try:
            self._settled.wait(ready_s)
        finally:
            if not self.url:
                self.stop()
        if not self.url:
            last = self.log[-1] if self.log else "it said nothing"
            raise LinkError(f"the edge for {folder} did not start: {last}")

    @property
    def pid(self) -> int:
        """The process's number."""
        return self.process.pid

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.log.append(line.rstrip())
            found = _READY.search(line)
            if found and not self.url:
                self.url = found[1]
                self._settled.set()
        self._settled.set()

    def stop(self) -> int:
        """End the process, by force after a while; its exit code."""
        deadline_s = time.monotonic() + STOP_S
        self.process.terminate()
        try:
            code = self.process.wait(max(0.0, deadline_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            self.process.kill()
            code = self.process.wait()
        self._reader.join()
        for pipe in (self.process.stdin, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return code

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
