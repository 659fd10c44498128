"""Faults at random while a stream of requests runs: nothing may be lost, answered twice or wrong.

    python -m bench.chaos --requests 20000 --seed 0 --bundle out/demo/bundle

A device in this process, an edge in another, the link of `bench.faults` between them.  In each setting (plans chosen
or fixed, in the clear or with TLS and a token, two bounds of notice) requests come at random times, and faults
strike one after the other, each when the edge answers again, all kinds in random order.  Every answer is compared
with what the same plan gives in this process: bit by bit, or within a rounding error where the edge computes batches.
The edge writes down what it computes: no request may be computed there twice, on whatever connection.

Written: chaos.json with the figures, chaos.jsonl.gz with a line for each request and each fault.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import random
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self

import msgspec
import numpy as np
from numpy.typing import NDArray

from coinfer.bundle import Bundle, load_bundle
from coinfer.lab.slow import SlowedDevice
from coinfer.plan import Plan
from coinfer.profile import Slowdown
from coinfer.runtime.certificates import make_test_ca
from coinfer.runtime.guarded import GuardedDevice
from coinfer.runtime.keeper import KeepTerms
from coinfer.runtime.request import Answer
from coinfer.runtime.spawn import EdgeProcess
from coinfer.runtime.stream import Policy
from coinfer.runtime.tls import DeviceTls
from coinfer.runtime.tokens import add_token

from .answers import References, pictures_of
from .counted_edge import read_computed
from .faults import Accidents, Meddler, Names, Way, exchange, expired, renumbered, replace
from .figures import RAW, keep_figures, rounded

HOST = "edge.chaos.test"
DEVICE = "chaos"
# So long is waited for the edge's next answer before a fault, and behind it before that counts as none.
RETURN_S = 30.0
POLL_S = 0.002
SLOW_BPS = 4000.0
RATE_HZ = 60.0


class Setting(NamedTuple):
    """How a share of the requests is run.

    `way`: "adaptive", or the kind of the fixed plan.  `share`: of all requests, relative to the others'.  `slowdown`:
    of the device, so that it is worth asking the edge.  `rate`: of the requests, relative to the others': the longer a
    fault may go unnoticed, the longer a stream has to be for as many.
    """

    name: str
    way: str
    is_secure: bool
    notice_s: float
    share: int
    max_batch: int = 1
    policy: Policy = "block"
    deadline_s: float | None = None
    slowdown: float = 1.0
    rate: float = 1.0

    @property
    def keep(self) -> KeepTerms:
        """How the link is kept; with the usual bound of notice all other bounds are the usual ones, too."""
        usual = KeepTerms()
        return usual if self.notice_s == usual.notice_s else KeepTerms(notice_s=self.notice_s, most_backoff_s=1.0)


SETTINGS = (
    Setting("chosen plans", "adaptive", False, 0.3, 3, slowdown=100.0),
    Setting("upload", "upload", False, 0.3, 2),
    Setting("split", "split", False, 0.3, 3),
    Setting("chosen plans, TLS", "adaptive", True, 0.3, 3, slowdown=100.0),
    Setting("split, TLS", "split", True, 0.3, 3),
    Setting("split in batches", "split", False, 0.3, 1, max_batch=8),
    Setting("upload, newest first, deadline", "upload", False, 0.3, 1, policy="drop-oldest", deadline_s=0.5),
    Setting("split, 2 s", "split", False, 2.0, 2, rate=0.2),
    Setting("upload, 2 s, TLS", "upload", True, 2.0, 2, rate=0.2),
)


class Strike(msgspec.Struct, frozen=True, kw_only=True):
    """One fault: how long it lasted, and after how many seconds it was noticed and forgotten.

    `notice_s` from its beginning, None where it did not show.  `up_s` and `return_s` from its end: until there is a
    connection, and until the edge's first answer; None where the stream was over before.
    """

    setting: str
    fault: str
    lasted_s: float
    notice_s: float | None = None
    up_s: float | None = None
    return_s: float | None = None


class KeptEdge:
    """An edge process that is killed, stopped, drained and started again on its port; counts what it computes."""

    def __init__(self, folder: Path, port: int, logs: Path, *, max_batch: int, options: tuple[str, ...]) -> None:
        self._folder, self._port, self._logs = folder, port, logs
        self._max_batch, self._options = max_batch, options
        self._started = 0
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        log = self._logs / f"{self._started}.log"
        log.touch()
        self._started += 1
        self.process = EdgeProcess(
            self._folder, port=self._port, max_batch=self._max_batch,
            options=(*self._options, "--log", str(log)), module="bench.counted_edge",
        )  # fmt: skip

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.process.process.send_signal(number)

    def end(self) -> None:
        """End it, if it has not ended."""
        self.process.stop()

    def reload(self, said: str) -> None:
        """Have it read its files anew, and wait until it has said so."""
        before = self._said(said)
        self.signal(signal.SIGHUP)
        deadline_s = time.monotonic() + RETURN_S
        while self._said(said) == before and time.monotonic() < deadline_s:
            time.sleep(POLL_S)

    def _said(self, what: str) -> int:
        return sum(what in line for line in [*self.process.log])

    def computed(self) -> list[int]:
        """The requests of this setting that any of the processes has begun to compute."""
        return [request for log in self._logs.iterdir() for _, request in read_computed(log)]


class World:
    """What faults strike: the link, the edge and its files."""

    def __init__(self, setting: Setting, bundle: Bundle, folder: Path, seed: int) -> None:
        self.setting, self.chance = setting, random.Random(seed)
        self._served, self._other, self._certs = folder / "served", folder / "other", folder / "certs"
        self._tokens = folder / "tokens.json"
        shutil.copytree(bundle.folder, self._served)
        renumbered(bundle, self._other)
        logs = folder / "logs"
        logs.mkdir()
        options: tuple[str, ...] = ()
        self.link: dict[str, Any] = {}
        if setting.is_secure:
            make_test_ca(self._certs, [HOST])
            self._good, self._bad = (self._certs / "server.pem").read_bytes(), expired(self._certs, "server")
            token = add_token(self._tokens, DEVICE)
            self._known = self._tokens.read_bytes()
            files = {"--cert": self._certs / "server.pem", "--key": self._certs / "server.key"}
            options = tuple(str(word) for pair in ({**files, "--tokens": self._tokens}).items() for word in pair)
            self.link = {"token": token, "tls": DeviceTls(ca=self._certs / "ca.pem")}
        port = _free_port(self.chance)
        self.edge = KeptEdge(self._served, port, logs, max_batch=setting.max_batch, options=options)
        self.meddler = Meddler(("127.0.0.1", port), seed=seed, is_framed=not setting.is_secure)
        self.names = Names(HOST)
        self._entered = ExitStack()

    def __enter__(self) -> Self:
        self._entered.callback(self.edge.end)
        self._entered.enter_context(self.names)
        self._entered.enter_context(self.meddler)
        return self

    def __exit__(self, *_: object) -> None:
        self._entered.close()

    @property
    def url(self) -> str:
        """What the device is given."""
        return f"{'wss' if self.setting.is_secure else 'ws'}://{HOST}:{self.meddler.port}"

    def faults(self) -> dict[str, Callable[[], Callable[[], None]]]:
        """What can happen here, by name: begins it, and gives what ends it."""
        both = {
            "link lost": self._lose,
            "edge killed": self._kill,
            "edge stopped": self._stop,
            "edge drained": self._drain,
            "half-open": lambda: self._meddle(self.meddler.silence),
            "black hole": lambda: self._meddle(self.meddler.blacken),
            "slow link": lambda: self._meddle(lambda: self.meddler.slow(SLOW_BPS)),
            "reset in a message": lambda: self._tamper("cut", 1),
            "name gone": self._forget,
            "other bundle": self._exchange,
            "garbage": lambda: self._tamper("garbage", 1, way="down"),
            "bits flipped": lambda: self._tamper("flip", 3),
            "message swallowed": lambda: self._tamper("swallow", 1),
        }
        if self.setting.is_secure:
            return {**both, "certificate expired": self._expire, "token revoked": self._revoke}
        return {
            **both,
            "message doubled": lambda: self._tamper("double", 1),
            "replies swapped": lambda: self._tamper("swap", 10, way="down"),
        }

    def _meddle(self, how: Callable[[], None]) -> Callable[[], None]:
        how()
        return self.meddler.heal

    def _tamper(self, how: Any, messages: int, *, way: Way | None = None) -> Callable[[], None]:
        which = self.chance.choice(("up", "down")) if way is None else way
        return self._meddle(lambda: self.meddler.tamper(which, how, messages))

    def _lose(self) -> Callable[[], None]:
        self.meddler.break_all()
        return self.meddler.heal

    def _kill(self) -> Callable[[], None]:
        self.edge.signal(signal.SIGKILL)
        return self._restart

    def _drain(self) -> Callable[[], None]:
        self.edge.signal(signal.SIGTERM)
        return self._restart

    def _restart(self) -> None:
        self.edge.end()
        self.edge.start()

    def _stop(self) -> Callable[[], None]:
        self.edge.signal(signal.SIGSTOP)
        return lambda: self.edge.signal(signal.SIGCONT)

    def _forget(self) -> Callable[[], None]:
        self.names.is_gone = True
        self.meddler.break_all()

        def remember() -> None:
            self.names.is_gone = False

        return remember

    def _exchange(self) -> Callable[[], None]:
        def change() -> None:
            exchange(self._served, self._other)
            self.edge.reload("serves bundle")

        change()
        return change

    def _expire(self) -> Callable[[], None]:
        def give(certificate: bytes) -> None:
            replace(self._certs / "server.pem", certificate)
            self.edge.reload("certificates are read anew")

        give(self._bad)
        self.meddler.break_all()
        return lambda: give(self._good)

    def _revoke(self) -> Callable[[], None]:
        replace(self._tokens, b'{"devices": {}}')
        return lambda: replace(self._tokens, self._known)


def _free_port(chance: random.Random) -> int:
    """Beyond those that the system gives to outgoing connections, which could meet themselves there."""
    while True:
        port = chance.randrange(15000, 30000)
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if probe.connect_ex(("127.0.0.1", port)) != 0:
                return port


class Tally:
    """What came of the requests of one setting."""

    def __init__(self, setting: Setting, references: References) -> None:
        self._setting, self._references = setting, references
        # Which picture each request has, in their order.
        self.given: list[int] = []
        self.lines: list[dict[str, Any]] = []
        self.seen: Counter[int] = Counter()
        self.answered: Counter[str] = Counter()
        self.verdicts: Counter[str] = Counter()
        # When answers of the edge came, on the device's clock; and how many the device gave in its place.
        self.edge_s: list[float] = []
        self.num_fallback = 0

    def take(self, answer: Answer) -> None:
        """One answer; its picture follows from its number."""
        outcome = answer.outcome
        self.seen[answer.request] += 1
        self.answered[outcome.answered] += 1
        if outcome.answered == "edge":
            self.edge_s.append(outcome.end_s)
        self.num_fallback += outcome.answered == "fallback"
        verdict = "none"
        if answer.is_answered:
            verdict = self._references.judge(answer, self.given[answer.request])
            if verdict == "close" and not (self._setting.max_batch > 1 and outcome.answered == "edge"):
                # Whoever computes alone has no excuse.
                verdict = "wrong"
        self.verdicts[verdict] += 1
        self.lines.append({
            "setting": self._setting.name, "request": answer.request, "plan": outcome.plan,
            "answered": outcome.answered, "end_s": rounded(outcome.end_s), "latency_s": rounded(outcome.latency_s),
            "verdict": verdict,
        })  # fmt: skip

    def lost(self) -> int:
        """Requests without an answer, those left out that the stream's policy or deadline asked for."""
        missing = sum(request not in self.seen for request in range(len(self.given)))
        bad = {"dropped", "late", "failed"}
        if self._setting.policy != "block":
            bad.discard("dropped")
        if self._setting.deadline_s is not None:
            bad.discard("late")
        return missing + sum(self.answered[how] for how in bad)


class Injector(threading.Thread):
    """Has faults strike one after the other until `over` is set."""

    def __init__(self, world: World, device: GuardedDevice, tally: Tally) -> None:
        super().__init__(name="injector")
        self.over = threading.Event()
        self.strikes: list[Strike] = []
        self.error: BaseException | None = None
        self._world, self._device, self._tally = world, device, tally

    def run(self) -> None:
        """All kinds in random order, then again."""
        chance, faults = self._world.chance, self._world.faults()
        try:
            while not self.over.is_set():
                names = sorted(faults)
                chance.shuffle(names)
                for name in names:
                    if self.over.is_set() or not self._is_well():
                        break
                    self.over.wait(chance.uniform(0.1, 0.5))
                    self._strike(name, faults[name])
        except BaseException as error:
            self.error = error

    def _is_well(self) -> bool:
        """Whether the edge answers again."""
        since_s = self._device.now_s()
        return self._first_edge_s(since_s, RETURN_S) is not None

    def _strike(self, name: str, begin: Callable[[], Callable[[], None]]) -> None:
        device, notice_s = self._device, self._world.setting.notice_s
        hold_s = self._world.chance.uniform(0.3, 3.0) * notice_s
        seen, begun_s = self._seen(), device.now_s()
        noticed = threading.Event()
        noticing = threading.Thread(target=self._note, args=(seen, noticed), name="noticing", daemon=True)
        self._noticed_s: float | None = None
        noticing.start()
        end = begin()
        self.over.wait(hold_s)
        end()
        healed_s = device.now_s()
        up_s = self._first_up_s(healed_s)
        back_s = self._first_edge_s(healed_s, RETURN_S)
        noticed.set()
        noticing.join()
        self.strikes.append(Strike(
            setting=self._world.setting.name, fault=name, lasted_s=healed_s - begun_s,
            notice_s=None if self._noticed_s is None else self._noticed_s - begun_s,
            up_s=None if up_s is None else up_s - healed_s, return_s=None if back_s is None else back_s - healed_s,
        ))  # fmt: skip

    def _seen(self) -> tuple[int, int]:
        return self._device.keeper.num_lost, self._tally.num_fallback

    def _note(self, seen: tuple[int, int], is_done: threading.Event) -> None:
        """When the device first does other than before: it gives up a connection, or answers itself."""
        while not is_done.is_set():
            if self._seen() != seen:
                self._noticed_s = self._device.now_s()
                return
            is_done.wait(POLL_S)

    def _first_up_s(self, since_s: float) -> float | None:
        while not self.over.is_set() and self._device.now_s() < since_s + RETURN_S:
            if self._device.keeper.channel is not None:
                return self._device.now_s()
            time.sleep(POLL_S)
        return None

    def _first_edge_s(self, since_s: float, within_s: float) -> float | None:
        """When the first answer of the edge came behind a moment."""
        place = len(self._tally.edge_s)
        while not self.over.is_set() and self._device.now_s() < since_s + within_s:
            behind = [end_s for end_s in self._tally.edge_s[max(0, place - 50) :] if end_s > since_s]
            if behind:
                return min(behind)
            time.sleep(POLL_S)
        return None


class Course(NamedTuple):
    """What came of one setting."""

    setting: Setting
    tally: Tally
    strikes: list[Strike]
    computed: list[int]
    accidents: list[str]
    seconds: float


def run_setting(
    setting: Setting, bundle: Bundle, pictures: NDArray[Any], requests: int, *, seed: int, rate_hz: float
) -> Course:
    """Run a stream of so many requests under faults."""
    chance = random.Random(seed)
    tally = Tally(setting, References(bundle, pictures))
    plan = _plan_of(bundle, setting.way)

    def source() -> Iterator[NDArray[Any]]:
        for _ in range(requests):
            time.sleep(chance.expovariate(rate_hz * setting.rate))
            tally.given.append(chance.randrange(len(pictures)))
            yield pictures[tally.given[-1]]

    slow = setting.slowdown
    pace = None if slow == 1 else SlowedDevice(Slowdown(fp32=slow, int8=slow), counts="cpu")
    since_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="coinfer-chaos-") as folder, Accidents() as accidents:
        with World(setting, bundle, Path(folder), seed) as world:
            device = GuardedDevice(
                bundle, edge=world.url, plan=None if plan is None else plan.number, keep=setting.keep, pace=pace,
                seed=seed, **world.link,
            )  # fmt: skip
            injector = Injector(world, device, tally)
            try:
                with device:
                    injector.start()
                    answers = device.stream(
                        source(), policy=setting.policy, deadline_s=setting.deadline_s,
                        is_ordered=setting.deadline_s is None,
                    )  # fmt: skip
                    for answer in answers:
                        tally.take(answer)
                        progress(setting.name, len(tally.lines), requests)
            finally:
                injector.over.set()
                injector.join()
            if injector.error is not None:
                raise injector.error
            computed = world.edge.computed()
        return Course(setting, tally, injector.strikes, computed, accidents.lines, time.monotonic() - since_s)


def _plan_of(bundle: Bundle, way: str) -> Plan | None:
    """The fixed plan: the first of its kind; None where plans are chosen."""
    return None if way == "adaptive" else next(plan for plan in bundle.manifest.menu if plan.kind == way)


class _Progress:
    """Says every quarter of a minute how far it is; ends the process where it has not moved for two minutes."""

    def __init__(self) -> None:
        self.is_loud = False
        self._said_s = self._armed_s = 0.0

    def __call__(self, what: str, done: int, total: int) -> None:
        now_s = time.monotonic()
        if not self.is_loud or now_s < self._armed_s + 1:
            return
        self._armed_s = now_s
        faulthandler.dump_traceback_later(120, exit=True)
        if now_s > self._said_s + 15:
            self._said_s = now_s
            print(f"{time.strftime('%H:%M:%S')} {what}: {done} of {total}", flush=True)


progress = _Progress()


def figures_of(courses: list[Course], seed: int) -> dict[str, Any]:
    """The figures of all settings together, and of each kind of fault."""
    answered: Counter[str] = Counter()
    for course in courses:
        answered.update(course.tally.answered)
    requests = sum(len(course.tally.given) for course in courses)
    twice = {course.setting.name: _twice(course.computed) for course in courses}
    strikes = [strike for course in courses for strike in course.strikes]
    return {
        "chaos_requests": requests,
        "chaos_lost": sum(course.tally.lost() for course in courses),
        "chaos_duplicated": sum(n - 1 for course in courses for n in course.tally.seen.values()),
        "chaos_wrong": sum(course.tally.verdicts["wrong"] for course in courses),
        "chaos_close": sum(course.tally.verdicts["close"] for course in courses),
        "computed_at_edge": sum(len(course.computed) for course in courses),
        "computed_twice": sum(twice.values()),
        "accidents": [line for course in courses for line in course.accidents],
        "notice_s": _spread([s.notice_s for s in strikes]),
        "return_s": _spread([s.return_s for s in strikes]),
        "local_share": (answered["fallback"] + answered["device"]) / max(1, requests),
        "fallback_share": answered["fallback"] / max(1, requests),
        "answered": dict(answered),
        "faults": len(strikes),
        "seed": seed,
        "seconds": round(sum(course.seconds for course in courses), 1),
        "by_fault": {
            "all" if bound is None else f"{bound:g} s": _by_fault(courses, bound)
            for bound in (None, *sorted({course.setting.notice_s for course in courses}))
        },
        "by_setting": {course.setting.name: _of_setting(course) for course in courses},
    }


def _of_setting(course: Course) -> dict[str, Any]:
    strikes, tally = course.strikes, course.tally
    return {
        "requests": len(tally.given), "answered": dict(tally.answered), "verdicts": dict(tally.verdicts),
        "lost": tally.lost(), "computed_twice": _twice(course.computed), "faults": len(strikes),
        "notice_bound_s": course.setting.notice_s, "notice_s": _spread([s.notice_s for s in strikes]),
        "return_s": _spread([s.return_s for s in strikes]), "seconds": round(course.seconds, 1),
    }  # fmt: skip


def _by_fault(courses: list[Course], bound: float | None) -> dict[str, Any]:
    kinds: dict[str, list[Strike]] = defaultdict(list)
    for course in courses:
        if bound is None or course.setting.notice_s == bound:
            for strike in course.strikes:
                kinds[strike.fault].append(strike)
    return {
        kind: {
            "struck": len(strikes),
            "noticed": sum(strike.notice_s is not None for strike in strikes),
            "notice_s": _spread([strike.notice_s for strike in strikes]),
            "up_s": _spread([strike.up_s for strike in strikes]),
            "return_s": _spread([strike.return_s for strike in strikes]),
        }
        for kind, strikes in sorted(kinds.items())
    }


def _twice(requests: list[int]) -> int:
    """How many computations were of requests that had been computed."""
    return len(requests) - len(set(requests))


def _spread(values: list[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"median": None, "p95": None, "max": None, "n": 0}
    p95 = float(np.percentile(known, 95))
    return {"median": rounded(median(known)), "p95": rounded(p95), "max": rounded(max(known)), "n": len(known)}


def chaos(
    bundle: Bundle,
    requests: int,
    *,
    seed: int = 0,
    raw: Path = RAW,
    settings: tuple[Setting, ...] = SETTINGS,
    rate_hz: float = RATE_HZ,
) -> dict[str, Any]:
    """Run all settings, write what came of it, and give the figures."""
    pictures = pictures_of(bundle)
    shares = sum(setting.share for setting in settings)
    courses = []
    for place, setting in enumerate(settings):
        count = -(-requests * setting.share // shares)
        courses.append(run_setting(setting, bundle, pictures, count, seed=1000 * seed + place, rate_hz=rate_hz))
    figures = figures_of(courses, seed)
    events = [
        *({"kind": "request", **line} for course in courses for line in course.tally.lines),
        *({"kind": "fault", **msgspec.to_builtins(strike)} for course in courses for strike in course.strikes),
    ]
    keep_figures(raw, "chaos", figures, events)
    return figures


def main() -> int:
    """0 where nothing was lost, answered twice or wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bundle", type=Path, default=Path("out/demo/bundle"))
    parser.add_argument("--raw", type=Path, default=RAW)
    parser.add_argument("--rate", type=float, default=RATE_HZ, help="requests a second, on average")
    parser.add_argument("--setting", action="append", choices=[setting.name for setting in SETTINGS])
    given = parser.parse_args()
    logging.getLogger("coinfer").addHandler(logging.NullHandler())
    logging.getLogger("coinfer").propagate = False
    progress.is_loud = True
    settings = tuple(setting for setting in SETTINGS if not given.setting or setting.name in given.setting)
    figures = chaos(
        load_bundle(given.bundle), given.requests, seed=given.seed, raw=given.raw, settings=settings,
        rate_hz=given.rate,
    )  # fmt: skip
    for name in ("requests", "lost", "duplicated", "wrong"):
        print(f"chaos_{name}: {figures[f'chaos_{name}']}")
    bad = ("chaos_lost", "chaos_duplicated", "chaos_wrong", "computed_twice", "accidents")
    return 1 if any(figures[name] for name in bad) else 0


if __name__ == "__main__":
    sys.exit(main())
