"""The device's process of a benchmark: started, spoken to in lines with a deadline, and always ended.

It ends with its standard input, so it does not outlive this process however that dies; leaving the context
ends it at once.  What it wrote to its standard error is quoted when it fails.
"""

from __future__ import annotations

import select
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import msgspec

from ..errors import LinkError
from .worker import Command, Done, Ready, Request
from .yardstick import LoopTimes

START_S = 60.0
STOP_S = 2.0


class WorkerProcess:
    """A device that runs plans of the bundle in `folder` on pictures of a .npy file, (N, H, W, C) uint8.

    `ready` is what it reported of itself when it began, `start_s` the seconds from starting the process until then,
    `rss_bytes` its resident memory after the last command, `busy_s` how long its slowed core computed for that.

    Raises:
        LinkError: it ends, or is not ready in a minute; the message quotes it.
    """

    def __init__(
        self,
        folder: Path,
        pixels: Path,
        *,
        edge: str | None = None,
        core: int | None = None,
        timeout_s: float = 120.0,
        yardstick: LoopTimes | None = None,
    ) -> None:
        command = [sys.executable, "-m", "coinfer.lab.worker", str(folder), "--pixels", str(pixels)]
        command += ["--timeout", str(timeout_s)]
        command += [] if edge is None else ["--edge", edge]
        command += [] if core is None else ["--core", str(core)]
        command += [] if yardstick is None else ["--yardstick", str(yardstick.fp32_s), str(yardstick.int8_s)]
        self._timeout_s = timeout_s
        self._rest = b""
        self._errors = tempfile.TemporaryFile()
        started_s = time.monotonic()
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            # Ctrl-C goes to the benchmark alone, which then ends its children in order.
            process_group=0,
        )
        is_ready = False
        try:
            self.ready = msgspec.json.decode(self._read_line(START_S), type=Ready)
            is_ready = True
        finally:
            if not is_ready:
                self.close()
        self.start_s = time.monotonic() - started_s
        self.rss_bytes = self.ready.rss_bytes
        self.busy_s = 0.0

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, command: Command) -> list[Request]:
        """A line for each image of the command, in order.

        Raises:
            LinkError: the worker ended, or is silent for longer than its own limit allows.
        """
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(command) + b"\n")
        except BrokenPipeError as error:
            raise self._ended() from error
        # Lines come when the whole command is done, so the silence grows with its length.
        silence_s = START_S + self._timeout_s * len(command.images)
        lines = [msgspec.json.decode(self._read_line(silence_s), type=Request) for _ in command.images]
        done = msgspec.json.decode(self._read_line(START_S), type=Done)
        self.rss_bytes, self.busy_s = done.rss_bytes, done.busy_s
        return lines

    def close(self) -> None:
        """End the process: by the end of its input, else by force."""
        process = self._process
        assert process.stdin is not None and process.stdout is not None
        with suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass  # it is in the middle of something that nobody waits for any more
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
            self._errors.close()

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        deadline_s = time.monotonic() + timeout_s
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._process.stdout], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                raise LinkError(f"the device process was silent for {timeout_s:g} s (process {self.pid})")
            data = self._process.stdout.read(65536)
            if not data:
                raise self._ended()
            self._rest += data
        line, self._rest = self._rest.split(b"\n", 1)
        return line

    def _ended(self) -> LinkError:
        try:
            code: int | None = self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            code = None
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace").strip().splitlines()
        return LinkError(f"the device process ended with code {code}: {said[-1] if said else 'it said nothing'}")
