"""The fuzz of the parsers that meet strangers' bytes: protocol messages, payloads, bundle manifests.

python -m bench.fuzz [protocol] [payloads] [manifests] [--inputs 1000000] [--seed 1]

Three engines for each parser: `mutator`, seeded damage of valid inputs, gives the most; `hypothesis` builds inputs from
strategies; `atheris` is guided by what lines an input reaches (left out where it is not installed).  A process of each
works through its inputs and keeps what came of them in out/fuzz, so that a run that was stopped goes on; two run at a
time.  What counts as a fault of an input:

    crash        it raises what its parser does not document, breaks what the parser promises, or ends the process
    hang         it takes over a second of the best of four tries, or does not end at all: its process is then ended
    allocation   the process grows by more than its parser may ever hold

A fault's input is kept.  docs/results/raw/runtime/fuzz.json has the counts of all engines.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import mmap
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import repeat
from pathlib import Path
from random import Random
from typing import Any

import msgspec

ROOT = Path(__file__).parents[1]
OUT = Path("out/fuzz")
RESULT = Path("docs/results/raw/runtime/fuzz.json")
PARSERS = ("protocol", "payloads", "manifests")
ENGINES = ("mutator", "hypothesis", "atheris")
# Of `--inputs`: what the two other engines get on top of the mutator's.
SHARES = {"mutator": 1.0, "hypothesis": 0.005, "atheris": 0.2}
AT_A_TIME = 2000
HANG_S = 1.0
# A process that is this long at one input does not end by itself; before the first there is much to import.
STUCK_S, START_S = 10.0, 120.0
ALLOWED_BYTES = 16 << 20
SPACE_BYTES = 2 << 30
KEPT_BYTES = 4096
# A file that says what a process is at: how many inputs it has begun, how long the latest is, its bytes.
CURRENT = "current"
_CURRENT = struct.Struct("<QQ")
_CURRENT_BYTES = 1 << 20


class Fault(msgspec.Struct):
    """One kind of fault of one parser: what it is, how often it came, and the first input (hex) that showed it."""

    kind: str
    what: str
    count: int
    input: str


class Tally(msgspec.Struct):
    """What came of the inputs of one parser by one engine so far."""

    parser: str
    engine: str
    seed: int
    inputs: int = 0
    accepted: int = 0
    seconds: float = 0.0
    slowest_s: float = 0.0
    slowest: str = ""
    growth_bytes: int = 0
    faults: list[Fault] = []

    def add(self, kind: str, what: str, data: bytes) -> None:
        """Count a fault."""
        for fault in self.faults:
            if (fault.kind, fault.what) == (kind, what):
                fault.count += 1
                return
        self.faults.append(Fault(kind, what, 1, data[:KEPT_BYTES].hex()))

    def count(self, kind: str) -> int:
        """How many inputs had a fault of that kind."""
        return sum(fault.count for fault in self.faults if fault.kind == kind)


def place_of(out: Path, parser: str, engine: str, seed: int) -> Path:
    """Where a tally is kept."""
    return out / f"{parser}-{engine}-{seed}.json"


def read_tally(out: Path, parser: str, engine: str, seed: int) -> Tally:
    """What a former run has left, or a new tally."""
    path = place_of(out, parser, engine, seed)
    return msgspec.json.decode(path.read_bytes(), type=Tally) if path.is_file() else Tally(parser, engine, seed)


def keep(out: Path, tally: Tally) -> None:
    """Write a tally whole."""
    path = place_of(out, tally.parser, tally.engine, tally.seed)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.format(msgspec.json.encode(tally), indent=1) + b"\n")
    fresh.rename(path)


class Trial:
    """Gives inputs to a target and tallies what comes of them; what its valid inputs need is what it may hold."""

    def __init__(self, target: Any, tally: Tally, current: mmap.mmap | None = None) -> None:
        self._target = target
        self.tally = tally
        self._current = current
        self.settle()

    def settle(self) -> None:
        """Memory counts from here on."""
        for data in self._target.seeds:
            self._target.run(data)
        self._start_bytes = self._peak_bytes = peak_bytes()

    def __call__(self, data: bytes) -> None:
        """One input; nothing but a process that must end comes out."""
        tally = self.tally
        if self._current is not None:
            kept = data[: _CURRENT_BYTES - _CURRENT.size]
            self._current[: _CURRENT.size] = _CURRENT.pack(tally.inputs, len(kept))
            self._current[_CURRENT.size : _CURRENT.size + len(kept)] = kept
        start_s = time.perf_counter()
        try:
            tally.accepted += bool(self._target.run(data))
        except Exception as error:
            tally.add("crash", _describe(error), data)
        took_s = time.perf_counter() - start_s
        tally.inputs += 1
        if took_s > max(tally.slowest_s, 0.002):
            took_s = min(took_s, *(self._again_s(data) for _ in range(3)))
            if took_s > tally.slowest_s:
                tally.slowest_s, tally.slowest = took_s, data[:KEPT_BYTES].hex()
            if took_s > HANG_S:
                tally.add("hang", f"{took_s:.1f} s", data)
        peak = peak_bytes()
        if peak > self._peak_bytes + ALLOWED_BYTES:
            tally.add("allocation", f"{(peak - self._peak_bytes) >> 20} MiB", data)
        self._peak_bytes = max(peak, self._peak_bytes)
        tally.growth_bytes = max(tally.growth_bytes, self._peak_bytes - self._start_bytes)

    def _again_s(self, data: bytes) -> float:
        start_s = time.perf_counter()
        try:
            self._target.run(data)
        except Exception:
            pass
        return time.perf_counter() - start_s


def peak_bytes() -> int:
    """The most address space that this process has ever had: memory that was only asked for counts."""
    text = Path("/proc/self/status").read_bytes()
    return int(text[text.index(b"VmPeak:") + 7 :].split(None, 1)[0]) << 10


def limit_space(most_bytes: int) -> None:
    """Let this process have no more address space than that."""
    resource.setrlimit(resource.RLIMIT_AS, (most_bytes, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _describe(error: Exception) -> str:
    """What and where, without what differs from input to input."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    return f"{type(error).__name__} at {where}: {str(error)[:120]!r}"


def bundle_and_scratch(folder: Path) -> tuple[Any, Path]:
    """The tests' small bundle, and an empty folder, both below `folder`."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_bundle import EXITS, MENU, make_tiny_bundle

    scratch = folder / "scratch"
    scratch.mkdir()
    return make_tiny_bundle(folder / "tiny", menu=(*MENU, *EXITS)), scratch


def memory_folder() -> str | None:
    """Where a temporary folder is in memory, if anywhere."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


# --- in a process of its own -----------------------------------------------------------------------


def work(out: Path, parser: str, engine: str, seed: int, most: int, folder: Path) -> None:
    """Go on with one tally until it has `most` inputs; `folder` is empty but for the file that says where it is."""
    tally = read_tally(out, parser, engine, seed)
    if engine == "atheris":
        import atheris

        # Before anything else imports them: only what is imported in here tells which lines it has reached.
        with atheris.instrument_imports(include=["coinfer"]):
            from .fuzz_targets import make_target
    else:
        from .fuzz_targets import make_target
    bundle, scratch = bundle_and_scratch(folder)
    target = make_target(parser, bundle, scratch)
    with (folder / CURRENT).open("r+b") as file:
        trial = Trial(target, tally, mmap.mmap(file.fileno(), _CURRENT_BYTES))
    start_s = time.monotonic() - tally.seconds
    is_begun = False

    def give(data: bytes) -> None:
        nonlocal is_begun
        if not is_begun:
            # What an engine itself holds, from its first call on, is none of the parser's.
            trial.settle()
            limit_space(peak_bytes() + SPACE_BYTES)
            is_begun = True
        trial(data)
        if tally.inputs % AT_A_TIME == 0 or tally.inputs >= most:
            tally.seconds = time.monotonic() - start_s
            keep(out, tally)

    corpus = out / f"corpus-{parser}-{seed}"
    _ENGINES[engine](target, tally, most, give, corpus)
    keep(out, tally)


def _by_mutator(target: Any, tally: Tally, most: int, give: Callable[[bytes], None], corpus: Path) -> None:
    from .fuzz_inputs import Mutator

    mutator = Mutator(target.seeds, skip=target.skip)
    while tally.inputs < most:
        # Inputs come in blocks, each with a seed of its own, so that a run goes on where it stopped.
        block, done = divmod(tally.inputs, AT_A_TIME)
        random = Random(f"{tally.seed}:{tally.parser}:{block}")
        for place in range(min(AT_A_TIME, most - block * AT_A_TIME)):
            data = mutator.make(random)
            if place >= done:
                give(data)


def _by_hypothesis(target: Any, tally: Tally, most: int, give: Callable[[bytes], None], corpus: Path) -> None:
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded

    from .fuzz_strategies import inputs_of

    strategy = inputs_of(target)
    while tally.inputs < most:
        left = min(AT_A_TIME, most - tally.inputs)

        @seeded(f"{tally.seed}:{tally.inputs}")
        @settings(
            max_examples=left, database=None, deadline=None, phases=[Phase.generate], verbosity=Verbosity.quiet,
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(strategy)
        def every(data: bytes) -> None:
            if tally.inputs < most:
                give(data)

        every()


def _by_atheris(target: Any, tally: Tally, most: int, give: Callable[[bytes], None], corpus: Path) -> None:
    import atheris

    if not corpus.is_dir():
        corpus.mkdir(parents=True)
        for place, data in enumerate(target.seeds):
            (corpus / f"seed-{place}").write_bytes(data)

    def one(data: bytes) -> None:
        if tally.inputs < most:
            give(bytes(data))

    # What is guided leaves the process by itself when it has had its runs.  Its own clock would also count what this
    # program does between inputs: who is stuck is seen from outside, see `watch`.
    options = [f"-runs={most - tally.inputs}", f"-seed={tally.seed + tally.inputs}", "-max_len=8192", "-rss_limit_mb=0"]
    options += ["-timeout=86400", "-verbosity=0", f"-artifact_prefix={corpus.parent}/"]
    atheris.Setup([sys.argv[0], *options, str(corpus)], one)
    atheris.Fuzz()


_ENGINES = {"mutator": _by_mutator, "hypothesis": _by_hypothesis, "atheris": _by_atheris}


# --- over them ------------------------------------------------------------------------------------


def watch(out: Path, parser: str, engine: str, seed: int, most: int) -> Tally:
    """Run processes until a tally has its inputs; one that dies or is stuck leaves a fault, and the next goes on."""
    out.mkdir(parents=True, exist_ok=True)
    before = -1
    while (tally := read_tally(out, parser, engine, seed)).inputs < most:
        if tally.inputs == before:
            raise SystemExit(f"fuzz: {parser} by {engine} makes no progress, see {out}")
        before = tally.inputs
        log = out / f"{parser}-{engine}-{seed}.log"
        # Here, since what atheris guides leaves its process without tidying up.
        with tempfile.TemporaryDirectory(dir=memory_folder()) as folder, log.open("ab") as errors:
            path = Path(folder) / CURRENT
            path.write_bytes(bytes(_CURRENT_BYTES))
            command = [sys.executable, "-m", "bench.fuzz", parser, "--work", engine, folder]
            command += ["--inputs", str(most), "--seed", str(seed), "--out", str(out.resolve())]
            process = subprocess.Popen(command, stdout=errors, stderr=errors, cwd=ROOT)
            is_stuck = _wait(process, path)
            if process.returncode != 0 or is_stuck:
                tally = read_tally(out, parser, engine, seed)
                blame(tally, path, f"ended the process ({process.returncode}), see {log.name}", is_stuck=is_stuck)
                keep(out, tally)
    return tally


def blame(tally: Tally, current: Path, how: str, *, is_stuck: bool) -> None:
    """Count the input that a process was at as a fault, and go on behind it."""
    raw = current.read_bytes()
    number, size = _CURRENT.unpack_from(raw)
    data = raw[_CURRENT.size : _CURRENT.size + size]
    tally.add("hang" if is_stuck else "crash", "does not end" if is_stuck else how, data)
    # What came between the latest tally and this input is not lost: it is counted again, up to here.
    tally.inputs = max(tally.inputs, number) + 1


def _wait(process: subprocess.Popen[bytes], current: Path) -> bool:
    """Wait for a process's end; whether it had to be ended, stuck at one input."""
    seen, since_s = -1, time.monotonic()
    while True:
        try:
            process.wait(min(1.0, STUCK_S))
            return False
        except subprocess.TimeoutExpired:
            with current.open("rb") as file:
                number = _CURRENT.unpack(file.read(_CURRENT.size))[0]
        # Imports and the bundle come before the first input.
        patience_s = STUCK_S if number else START_S
        if number != seen:
            seen, since_s = number, time.monotonic()
        elif time.monotonic() - since_s > patience_s:
            process.send_signal(signal.SIGABRT)
            process.wait()
            return True


def summary(parser: str, tallies: list[Tally]) -> dict[str, Any]:
    """The counts of one parser, of all engines together and of each."""
    kinds = {"crashes": "crash", "hangs": "hang", "allocations": "allocation"}
    slowest = max(tallies, key=lambda tally: tally.slowest_s)
    return {
        "parser": parser,
        "inputs": sum(tally.inputs for tally in tallies),
        "accepted": sum(tally.accepted for tally in tallies),
        **{name: sum(tally.count(kind) for tally in tallies) for name, kind in kinds.items()},
        "slowest_call_s": slowest.slowest_s,
        "slowest_input": slowest.slowest[:400],
        # The two other engines keep inputs themselves, so that their processes grow.
        "growth_bytes": max((tally.growth_bytes for tally in tallies if tally.engine == "mutator"), default=0),
        "allowed_growth_bytes": ALLOWED_BYTES,
        "seconds": sum(tally.seconds for tally in tallies),
        "faults": [msgspec.to_builtins(fault) for tally in tallies for fault in tally.faults],
        "engines": {
            tally.engine: {
                "inputs": tally.inputs, "accepted": tally.accepted, "seconds": tally.seconds,
                "growth_bytes": tally.growth_bytes,
            }
            for tally in tallies
        },  # fmt: skip
    }


def engines_here() -> Iterator[str]:
    """Those that are installed."""
    for engine in ENGINES:
        if engine == "mutator" or importlib.util.find_spec(engine) is not None:
            yield engine


def write_result(found: list[dict[str, Any]], seed: int, inputs: int) -> None:
    """The raw result, parsers of earlier runs kept."""
    from coinfer.engine.measure import describe_machine

    earlier = msgspec.json.decode(RESULT.read_bytes())["parsers"] if RESULT.is_file() else []
    parsers = {entry["parser"]: entry for entry in [*earlier, *found]}
    machine = describe_machine()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "commit": commit,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{machine.processor}, {machine.cores} cores, {machine.system}",
        "command": f"python -m bench.fuzz {' '.join(PARSERS)} --inputs {inputs} --seed {seed}",
        "seed": seed,
        "parsers": [parsers[name] for name in PARSERS if name in parsers],
    }
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_bytes(msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("parsers", nargs="*", choices=[*PARSERS, []], help="all by default")
    parser.add_argument("--inputs", type=int, default=1_000_000, help="of the mutator, for each parser")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=OUT, help="where the tallies are kept")
    parser.add_argument("--work", nargs=2, metavar=("ENGINE", "FOLDER"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.work:
        engine, folder = asked.work
        work(asked.out, asked.parsers[0], engine, asked.seed, asked.inputs, Path(folder))
        return 0
    names = asked.parsers or list(PARSERS)
    items = [(name, engine) for name in names for engine in engines_here()]
    with ThreadPoolExecutor(2) as pool:
        shares = [round(SHARES[engine] * asked.inputs) for _, engine in items]
        parsers, engines = zip(*items, strict=True)
        tallies = list(pool.map(partial(watch, asked.out), parsers, engines, repeat(asked.seed), shares))
    found = [summary(name, [tally for tally in tallies if tally.parser == name]) for name in names]
    write_result(found, asked.seed, asked.inputs)
    for entry in found:
        shown = {key: entry[key] for key in ("inputs", "accepted", "crashes", "hangs", "allocations")}
        print(f"{entry['parser']}: {shown}, slowest {1e3 * entry['slowest_call_s']:.1f} ms")
    return int(any(entry["faults"] for entry in found))


if __name__ == "__main__":
    raise SystemExit(main())
