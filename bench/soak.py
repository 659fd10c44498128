"""Half a million requests, to see that nothing grows: memory, descriptors, threads, connections, an edge's tasks.

    python -m bench.soak --requests 500000 --bundle out/demo/bundle

    device process: three devices that live as long as it      --> edge in the clear
                      plans chosen; a fixed upload; a fixed split   --> edge with TLS and a token (the last one's)
                    and now and then one that lives for one turn alone

Devices take turns of twenty requests; at the beginning of each turn the connection is cut and made anew.
Memory of all three processes is read four hundred times; its growth is that of a line through what was read
after the first tenth of the requests (the median of all slopes, Theil 1950), in percent of where that line begins.
Each device keeps the spans, outcomes and changes of plan of its latest 200 requests, each edge 10,000 spans, so that
these are full by then.

Written: soak.json with the figures, soak.jsonl.gz with a line for each look.
"""

from __future__ import annotations

import argparse
import json
import logging
import ssl
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
from numpy.typing import NDArray

from coinfer.bundle import Bundle, load_bundle
from coinfer.runtime.certificates import make_test_ca
from coinfer.runtime.guarded import GuardedDevice
from coinfer.runtime.keeper import KeepTerms
from coinfer.runtime.memory import keep_heap_whole
from coinfer.runtime.recent import RecentTimeline
from coinfer.runtime.spawn import EdgeProcess
from coinfer.runtime.tls import DeviceTls
from coinfer.runtime.tokens import add_token

from .answers import pictures_of
from .figures import RAW, keep_figures, rounded

TURN = 20
KEEP = 200
# Connections are cut on purpose: nobody has to wait before the next.
SOON = KeepTerms(backoff_s=0.005, most_backoff_s=0.01)
# From the tenth turn on, each so many turns later, a device of its own has one.  Not oftener: ONNX Runtime leaves some
# thousands of bytes behind for each time that the segments are loaded and given up, up to two megabytes.
GUEST = 200
LOOKS = 400
WARM = 0.1
SETTLE_S = 3.0


class Where(NamedTuple):
    """How the device process reaches the edges."""

    plain: str
    secure: str
    token: str
    ca: str


class Look(NamedTuple):
    """What a process had at some time: bytes, descriptors, threads; an edge's loop its tasks, while it is asked."""

    rss: int
    fds: int
    threads: int
    tasks: int | None


# The device process.


def device_process(folder: Path, requests: int, turn: int, where: Where) -> None:
    """Run the requests; a line on stdout behind each turn."""
    # As `coinfer run` does.
    keep_heap_whole()
    bundle = load_bundle(folder)
    pictures = pictures_of(bundle)
    upload, split = (_first(bundle, kind) for kind in ("upload", "split"))
    secure = {"edge": where.secure, "token": where.token, "tls": DeviceTls(ca=Path(where.ca))}
    ways: list[dict[str, Any]] = [
        {"edge": where.plain, "plan": None}, {"edge": where.plain, "plan": upload}, {**secure, "plan": split}
    ]  # fmt: skip
    done = reconnects = turns = 0
    answered: Counter[str] = Counter()
    with ExitStack() as stack:
        devices = [stack.enter_context(_device(bundle, way)) for way in ways]
        while done < requests:
            count = min(turn, requests - done)
            if turns % GUEST == 9:
                with _device(bundle, ways[turns // GUEST % len(ways)]) as guest:
                    answered.update(_take_turn(guest, pictures, done, count))
            else:
                device = devices[turns % len(devices)]
                reconnects += _cut(device)
                answered.update(_take_turn(device, pictures, done, count))
            done, turns = done + count, turns + 1
            print(json.dumps({"done": done, "reconnects": reconnects, "answered": answered}), flush=True)
        # Until nothing of the last turn is on its way.
        time.sleep(SETTLE_S)
        print(json.dumps({"done": done, "reconnects": reconnects, "answered": answered}), flush=True)
        sys.stdin.read()


def _first(bundle: Bundle, kind: str) -> int:
    return next(plan.number for plan in bundle.manifest.menu if plan.kind == kind)


def _device(bundle: Bundle, way: dict[str, Any]) -> GuardedDevice:
    return GuardedDevice(bundle, timeline=RecentTimeline(keep=KEEP), keep=SOON, seed=0, **way)


def _cut(device: GuardedDevice) -> int:
    """Cut the connection, if there is one, and wait for the next."""
    channel, before = device.keeper.channel, device.keeper.num_connected
    if channel is None:
        return 0
    channel.abort()
    deadline_s = time.monotonic() + 10
    while device.keeper.num_connected == before and time.monotonic() < deadline_s:
        time.sleep(0.001)
    return 1


def _take_turn(device: GuardedDevice, pictures: NDArray[Any], first: int, count: int) -> Counter[str]:
    these = (pictures[number % len(pictures)] for number in range(first, first + count))
    return Counter(answer.answered for answer in device.stream(these))


# The process that looks on.


class Watched:
    """A process that is looked at; an edge's tasks are read from its metrics."""

    def __init__(self, name: str, pid: int, edge: str | None = None, where: Where | None = None) -> None:
        self.name, self._process, self._edge, self._where = name, psutil.Process(pid), edge, where

    def look(self) -> Look:
        """What it has now."""
        with self._process.oneshot():
            found = self._process.memory_info().rss, self._process.num_fds(), self._process.num_threads()
        if self._edge is None or self._where is None:
            return Look(*found, None)
        asked = urllib.request.Request(
            self._edge.replace("ws", "http", 1) + "/metrics", headers={"Authorization": f"Bearer {self._where.token}"}
        )
        trusted = ssl.create_default_context(cafile=self._where.ca)
        try:
            with urllib.request.urlopen(asked, timeout=10, context=trusted) as answer:
                lines = answer.read().decode().splitlines()
        except OSError:
            # An edge that is busy for a moment: the soak goes on.
            return Look(*found, None)
        return Look(*found, next(int(float(line.split()[1])) for line in lines if line.startswith("coinfer_tasks ")))


def growth_pct(done: Sequence[int], rss: Sequence[int], requests: int) -> float:
    """Growth of the line through (requests done, bytes), from the end of warming up to the end, in percent.

    The slope is the median of those between all pairs of looks, the height the median of what is left (Theil, 1950;
    Sen, 1968): single looks that are far off do not matter.

    >>> round(growth_pct([0, 100, 200, 300, 1000], [500, 1000, 1010, 1020, 1090], 1000), 6)
    9.0
    """
    warm = [(x, y) for x, y in zip(done, rss, strict=True) if x >= WARM * requests]
    x, y = np.array(warm, dtype=np.float64).T
    after, before = np.triu_indices(len(x), k=1)[::-1]
    steps = x[after] - x[before]
    slope = float(np.median((y[after] - y[before])[steps > 0] / steps[steps > 0]))
    begin = float(np.median(y - slope * x)) + slope * WARM * requests
    return 100 * slope * (1 - WARM) * requests / begin


def soak(folder: Path, requests: int, *, raw: Path = RAW, turn: int = TURN) -> dict[str, Any]:
    """Run the requests, look at the processes, write what was seen, and give the figures."""
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="coinfer-soak-")))
        make_test_ca(temporary / "certs", ["127.0.0.1"])
        token = add_token(temporary / "tokens.json", "soak")
        certs = temporary / "certs"
        options = ("--cert", str(certs / "server.pem"), "--key", str(certs / "server.key"))
        plain = stack.enter_context(EdgeProcess(folder))
        secure = stack.enter_context(
            EdgeProcess(folder, options=(*options, "--tokens", str(temporary / "tokens.json")))
        )
        where = Where(plain.url, secure.url, token, str(certs / "ca.pem"))
        device = stack.enter_context(_started(folder, requests, turn, where))
        watched = [
            Watched("device", device.pid), Watched("edge", plain.pid, plain.url, where),
            Watched("edge with TLS", secure.pid, secure.url, where),
        ]  # fmt: skip
        since_s = time.monotonic()
        events = _watch(device, watched, requests)
        seconds = time.monotonic() - since_s
        connections = _connections(plain.url)
        assert device.stdin is not None
        device.stdin.close()
        if (code := device.wait(60)) != 0:
            raise SystemExit(f"the device process ended with {code}")
        time.sleep(1.0)
        left = _connections(plain.url)
    figures = _figures(events, watched, requests, seconds) | {"edge_connections": [connections, left]}
    keep_figures(raw, "soak", figures, events)
    return figures


def _started(folder: Path, requests: int, turn: int, where: Where) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "bench.soak", "--bundle", str(folder), "--requests", str(requests)]
    command += ["--turn", str(turn), "--device", *where]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, process_group=0)


def _watch(device: subprocess.Popen[str], watched: Sequence[Watched], requests: int) -> list[dict[str, Any]]:
    """A look at every process each time that the device process has come so far."""
    events: list[dict[str, Any]] = []
    said_s, due = 0.0, 0.0
    assert device.stdout is not None
    for line in device.stdout:
        told = json.loads(line)
        is_last = bool(events) and told["done"] == events[-1]["done"]
        if told["done"] >= due or told["done"] == requests:
            due = told["done"] + requests / LOOKS
            looks = {one.name: one.look()._asdict() for one in watched}
            events.append({**told, "at_s": round(time.monotonic(), 3), "looks": looks})
        if time.monotonic() > said_s + 15:
            said_s = time.monotonic()
            rss = ", ".join(f"{one.name} {one.look().rss / 1e6:.1f} MB" for one in watched)
            print(f"{time.strftime('%H:%M:%S')} {told['done']} of {requests}: {rss}", flush=True)
        if is_last:
            break
    if not events or events[-1]["done"] < requests:
        raise SystemExit(f"the device process ended before its requests did ({device.poll()})")
    return events


def _connections(url: str) -> int:
    with urllib.request.urlopen(url.replace("ws:", "http:") + "/healthz", timeout=10) as answer:
        return int(json.load(answer)["connections"])


def _figures(
    events: Sequence[dict[str, Any]], watched: Sequence[Watched], requests: int, seconds: float
) -> dict[str, Any]:
    done = [event["done"] for event in events]
    warm = next(event for event in events if event["done"] >= WARM * requests)
    processes = {}
    for one in watched:
        looks = [event["looks"][one.name] for event in events]
        begin, end = warm["looks"][one.name], looks[-1]
        processes[one.name] = {
            "rss_growth_pct": rounded(growth_pct(done, [look["rss"] for look in looks], requests)),
            "rss_bytes": [begin["rss"], end["rss"]],
            "fds": [begin["fds"], end["fds"]], "most_fds": max(look["fds"] for look in looks),
            "threads": [begin["threads"], end["threads"]], "most_threads": max(look["threads"] for look in looks),
        }  # fmt: skip
        tasks = [event["looks"][one.name]["tasks"] for event in events if event["done"] >= warm["done"]]
        if told := [count for count in tasks if count is not None]:
            processes[one.name] |= {"tasks": [told[0], told[-1]], "most_tasks": max(told)}
    answered = events[-1]["answered"]
    return {
        "soak_requests": sum(answered.values()),
        "soak_rss_growth_pct": max(one["rss_growth_pct"] for one in processes.values()),
        "answered": answered, "reconnects": events[-1]["reconnects"], "processes": processes,
        "seconds": round(seconds, 1), "requests_per_s": rounded(requests / seconds), "looks": len(events),
    }  # fmt: skip


def main() -> int:
    """0 when it is done; in the device process too."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=500_000)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo/bundle"))
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--turn", type=int, default=TURN, help="requests between two connections")
    parser.add_argument("--device", nargs=4, metavar=Where._fields, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.device is not None:
        logging.getLogger("coinfer").setLevel(logging.ERROR)
        threading.excepthook = _end_with
        device_process(given.bundle, given.requests, given.turn, Where(*given.device))
        return 0
    figures = soak(given.bundle, given.requests, raw=given.raw, turn=given.turn)
    for name in ("soak_requests", "soak_rss_growth_pct", "requests_per_s"):
        print(f"{name}: {figures[name]}")
    return 0


def _end_with(given: threading.ExceptHookArgs) -> None:
    """No thread of the device may end unseen."""
    threading.__excepthook__(given)
    logging.shutdown()
    sys.stdout.flush()
    psutil.Process().kill()


if __name__ == "__main__":
    sys.exit(main())
