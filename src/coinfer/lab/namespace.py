"""The kernel's shaper between two network namespaces: a second opinion on the user-space link, for root.

    namespace "device"                                   namespace "edge"
    10.213.0.1  veth, tbf: uplink rate   <---------->    10.213.0.2  veth, tbf: downlink rate

The kernel counts what really crosses, acknowledgements and 14 B of Ethernet a packet included.  Delay needs
the kernel's netem, which many kernels lack; without it only links without delay can be made here.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from types import TracebackType
from typing import IO, Literal, Self

from ..errors import LinkError
from ..profile import Link

Side = Literal["device", "edge"]
_ADDRESSES: dict[Side, str] = {"device": "10.213.0.1", "edge": "10.213.0.2"}
_NUMBERS = count()
_PACKET_BYTES = 1514
_BURST_S = 0.001
_QUEUE_S = 0.4


def why_not() -> str | None:
    """Why kernel shaping cannot work here, in one line; None where nothing speaks against trying."""
    if os.name != "posix" or os.geteuid() != 0:
        return "kernel shaping needs root"
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            return f'kernel shaping needs the command "{tool}" (package iproute2)'
    return None


class NamespaceLink:
    """Two namespaces joined by a link of `link`'s rates; processes are launched into either.

    Use it as a context manager: leaving ends the launched processes and removes the namespaces.

    Raises:
        LinkError: (on entering or `set`) not root, no iproute2, the kernel refuses, a trace, or a delay
            without netem.
    """

    def __init__(self, link: Link) -> None:
        number = f"{os.getpid()}-{next(_NUMBERS)}"
        self.link = link
        self._spaces: dict[Side, str] = {"device": f"coinfer-{number}-device", "edge": f"coinfer-{number}-edge"}
        self._launched: list[subprocess.Popen[bytes]] = []

    def address(self, side: Side) -> str:
        """The IP address of one side."""
        return _ADDRESSES[side]

    def __enter__(self) -> Self:
        reason = why_not()
        if reason is not None:
            raise LinkError(f"{reason} (namespace link)")
        try:
            for space in self._spaces.values():
                _command("ip", "netns", "add", space)
            device, edge = self._spaces["device"], self._spaces["edge"]
            _command(*f"ip link add veth0 netns {device} type veth peer name veth0 netns {edge}".split())
            for side, space in self._spaces.items():
                _command(*f"ip -n {space} addr add {_ADDRESSES[side]}/30 dev veth0".split())
                _command(*f"ip -n {space} link set veth0 up".split())
                _command(*f"ip -n {space} link set lo up".split())
            self.set(self.link)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def set(self, link: Link) -> None:
        """Another rate and delay from now on."""
        if link.trace is not None:
            raise LinkError("the kernel's shaper takes constant rates only, got a trace (namespace link)")
        down_bps = link.rate_bps if link.down_rate_bps is None else link.down_rate_bps
        rates: dict[Side, float] = {"device": link.rate_bps, "edge": down_bps}
        for side, rate_bps in rates.items():
            tc = f"tc -n {self._spaces[side]} qdisc"
            with suppress(LinkError):  # there is none to remove the first time
                _command(*f"{tc} del dev veth0 root".split())
            if math.isfinite(rate_bps):
                burst = max(_PACKET_BYTES + 86, int(rate_bps * _BURST_S / 8))
                queue_ms = int(_QUEUE_S * 1e3 + 64 * _PACKET_BYTES * 8e3 / rate_bps)
                shaper = f"tbf rate {int(rate_bps)}bit burst {burst} latency {queue_ms}ms"
                _command(*f"{tc} add dev veth0 root handle 1: {shaper}".split())
            if link.delay_s > 0:
                place = "parent 1:1 handle 10:" if math.isfinite(rate_bps) else "root handle 10:"
                _command(*f"{tc} add dev veth0 {place} netem delay {link.delay_s * 1e6:.0f}us".split())
        self.link = link

    def launch(
        self,
        side: Side,
        command: Sequence[str],
        *,
        stdin: int | IO[bytes] | None = None,
        stdout: int | IO[bytes] | None = None,
        stderr: int | IO[bytes] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process inside one side's namespace; it is ended when the link is left."""
        process = subprocess.Popen(
            ["ip", "netns", "exec", self._spaces[side], *command], stdin=stdin, stdout=stdout, stderr=stderr
        )
        self._launched.append(process)
        return process

    def _remove(self) -> None:
        for process in self._launched:
            if process.poll() is None:
                process.kill()
            process.wait()
        for space in self._spaces.values():
            with suppress(LinkError):  # it may never have been made
                _command("ip", "netns", "del", space)


def _command(*words: str) -> None:
    """Run one command.

    Raises:
        LinkError: it failed; the message has its own first line of complaint.
    """
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise LinkError(f"`{' '.join(words)}` did not run: {error} (namespace link)") from error
    if done.returncode != 0:
        complaint = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise LinkError(f"`{' '.join(words)}` was refused: {complaint} (namespace link)")
