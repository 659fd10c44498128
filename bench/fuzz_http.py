"""The fuzz of what an edge answers over HTTP: a real edge in a process of its own, asked what nobody should ask.

python -m bench.fuzz_http [--requests 20000] [--hostile 6000] [--seed 1] [--result FILE]

Two sources, one after the other.  `schemathesis` makes requests from the edge's own OpenAPI document, ones that fit it
and ones that do not, and checks that status, kind and schema of each answer are in the document.  `hostile` damages
valid bodies and sends what no library would: random bytes, sections cut short, lengths that are not true, deep
nesting, NaN, files that are no pictures.  What counts as a fault:

    status      5xx other than 503, or an answer that the document does not have
    slow        no answer within a second, the best of four tries
    lost        a request of HTTP that has no answer at all
    dead        the edge has ended
    growth      its resident memory, after a tenth of the requests to settle in, grows by more than 32 MiB

The result is a JSON object; beside it lies a log with a line for each request.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import io
import json
import socket
import struct
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from typing import Any, TextIO

import msgspec
import numpy as np
import psutil
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis.errors import Unsatisfiable
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi import checks

from bench.fuzz_inputs import Mutator
from coinfer.plan import CodecSpec, Plan
from coinfer.runtime.spawn import EdgeProcess

ROOT = Path(__file__).parents[1]
RESULT = Path("docs/results/raw/runtime/fuzz_http.json")
SLOW_S = 1.0
PATIENCE_S = 15.0
ALLOWED_GROWTH_BYTES = 32 << 20
BLOCK = 100
KEPT = 20
# Statuses that the server below the app gives to what is no HTTP, or none of its own.
RAW_STATUSES = ("400", "408", "413", "405", "404", "200", "501", "431", "closed")


class Fault(msgspec.Struct):
    """What went wrong with which request."""

    kind: str
    what: str
    request: str


class Summary(msgspec.Struct):
    """What came of a run."""

    seed: int
    requests: dict[str, int]
    statuses: dict[str, int]
    seconds: float
    slowest_s: float
    settled_bytes: int
    end_bytes: int
    is_alive: bool
    num_faults: int
    faults: list[Fault]
    date: str = ""


class Fuzz:
    """Sends requests to the edge at `url`, process `pid`, and keeps what comes of them.

    Args:
        url: http://HOST:PORT.
        pid: the edge's process.
        seed: of everything random.
        settle: so many requests come before memory counts.
        log: takes a line for each request.
    """

    def __init__(self, url: str, pid: int, *, seed: int, settle: int, log: TextIO) -> None:
        self.url, self.seed, self._settle, self._log = url, seed, settle, log
        self._process = psutil.Process(pid)
        self._session = requests.Session()
        self._begun_s = time.perf_counter()
        self._requests: Counter[str] = Counter()
        self._statuses: Counter[str] = Counter()
        self._faults: list[Fault] = []
        self._num_faults = self._settled_bytes = 0
        self._slowest_s = 0.0
        with urllib.request.urlopen(f"{url}/v2/openapi.json", timeout=PATIENCE_S) as answer:
            self.document = json.load(answer)

    def count(self, source: str) -> int:
        """Requests of a source so far."""
        return self._requests[source]

    def fault(self, kind: str, what: str, request: str) -> None:
        """Keep a fault."""
        self._num_faults += 1
        if len(self._faults) < KEPT:
            self._faults.append(Fault(kind, what[:300], request[:300]))

    def send(self, source: str, name: str, call: Callable[[], requests.Response]) -> requests.Response | None:
        """One request over HTTP, tried again where it was slow."""
        answer, best_s = None, float("inf")
        for _ in range(4):
            start_s = time.perf_counter()
            try:
                answer = call()
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL):
                raise
            except requests.RequestException as error:
                self.fault("lost", f"{type(error).__name__}: {error}", name)
            best_s = min(best_s, time.perf_counter() - start_s)
            if best_s <= SLOW_S:
                break
        status = "none" if answer is None else str(answer.status_code)
        self._note(source, name, status, best_s)
        if answer is not None and answer.status_code >= 500 and answer.status_code != 503:
            self.fault("status", f"{status}: {answer.text}", name)
        return answer

    def send_raw(self, name: str, data: bytes) -> None:
        """Bytes on a connection of their own, which then says no more; whatever answers first is noted."""
        start_s = time.perf_counter()
        host, port = self.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=PATIENCE_S) as connection:
            try:
                connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.makefile("rb").read(1 << 20)
            except OSError:
                # It did not want to hear the end of it.
                answer = b""
        words = answer.split(b" ", 2)
        status = words[1].decode(errors="replace") if answer.startswith(b"HTTP/") and len(words) > 2 else "closed"
        if status not in RAW_STATUSES:
            self.fault("status", repr(answer[:200]), name)
        self._note("hostile", name, status, time.perf_counter() - start_s)

    def _note(self, source: str, name: str, status: str, took_s: float) -> None:
        self._requests[source] += 1
        self._statuses[status] += 1
        self._slowest_s = max(self._slowest_s, took_s)
        self._log.write(f"{source} {name[:60]} {status} {1e3 * took_s:.1f} ms\n")
        if took_s > SLOW_S:
            self.fault("slow", f"{took_s:.2f} s", name)
        if self._requests.total() == self._settle:
            self._settled_bytes = self._process.memory_info().rss

    def summary(self) -> Summary:
        """What came of it; a dead or grown edge is a fault as well."""
        is_alive = self._process.is_running() and self._process.status() != psutil.STATUS_ZOMBIE
        end_bytes = self._process.memory_info().rss if is_alive else 0
        if not is_alive:
            self.fault("dead", "the edge has ended", "")
        growth = end_bytes - self._settled_bytes
        if self._settled_bytes and growth > ALLOWED_GROWTH_BYTES:
            self.fault("growth", f"{growth} B", "")
        return Summary(
            seed=self.seed,
            requests=dict(self._requests),
            statuses=dict(sorted(self._statuses.items())),
            seconds=round(time.perf_counter() - self._begun_s, 1),
            slowest_s=round(self._slowest_s, 4),
            settled_bytes=self._settled_bytes,
            end_bytes=end_bytes,
            is_alive=is_alive,
            num_faults=self._num_faults,
            faults=self._faults,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )

    # --- from the document ---------------------------------------------------------------------------

    def by_schema(self, num_requests: int) -> None:
        """Requests that schemathesis makes of the document, by all operations in turn until there are enough."""
        schema = schemathesis.openapi.from_dict(self.document)
        operations = [result.ok() for result in schema.get_all_operations()]
        kinds = [(operation, mode) for operation in operations for mode in GenerationMode]
        # What takes a body comes several times as often as what only has a name in its path.
        kinds += [(operation, mode) for operation, mode in kinds if operation.method == "post"] * 5
        turn = 0
        while kinds and self.count("schemathesis") < num_requests:
            operation, mode = kinds[turn % len(kinds)]
            most = min(BLOCK, num_requests - self.count("schemathesis"))
            before = self.count("schemathesis")
            self._block(operation, mode, most, self.seed + turn)
            turn += 1
            if self.count("schemathesis") - before <= 1 and most > 1:
                # It has no more than one request, and that was it.
                kinds.remove((operation, mode))

    def _block(self, operation: Any, mode: GenerationMode, most: int, seed: int) -> None:
        @seeded(seed)
        @settings(
            max_examples=most, deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode))
        def run(case: Any) -> None:
            self._one(operation, case)

        try:
            run()
        except Unsatisfiable:
            # There is nothing that such an operation does not take.
            return

    def _one(self, operation: Any, case: Any) -> None:
        name = f"{operation.method.upper()} {operation.path}"
        kept: list[Any] = []

        def call() -> requests.Response:
            kept.append(case.call(base_url=self.url, session=self._session, timeout=PATIENCE_S))
            answer = requests.Response()
            answer.status_code, answer._content = kept[-1].status_code, kept[-1].content
            return answer

        try:
            if self.send("schemathesis", name, call) is not None:
                case.validate_response(
                    kept[-1],
                    checks=[
                        checks.status_code_conformance,
                        checks.content_type_conformance,
                        checks.response_schema_conformance,
                        checks.response_headers_conformance,
                    ],
                )
        except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
            # The client's own library does not send it.
            return
        except BaseExceptionGroup as group:
            self.fault("status", "; ".join(str(error) for error in group.exceptions), f"{name} {case!r}")
        except AssertionError as error:
            self.fault("status", str(error), f"{name} {case!r}")

    # --- hostile bodies ------------------------------------------------------------------------------

    def by_damage(self, num_requests: int) -> None:
        """Damaged and untrue requests."""
        random = Random(self.seed)
        makers = hostile(self.url, self.document)
        for turn in range(num_requests):
            name, path, headers, body = makers[turn % len(makers)](random)
            if path:
                self.send("hostile", name, self._posting(path, headers, body))
            else:
                self.send_raw(name, body)

    def _posting(self, path: str, headers: dict[str, str], body: bytes) -> Callable[[], requests.Response]:
        return lambda: self._session.post(self.url + path, body, headers=headers, timeout=PATIENCE_S)


Hostile = Callable[[Random], tuple[str, str, dict[str, str], bytes]]
LENGTH = "Inference-Header-Content-Length"


def metadata_of(url: str, document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What the edge says of each model that its document names."""
    for name in document["components"]["parameters"]["model"]["schema"]["enum"]:
        with urllib.request.urlopen(f"{url}/v2/models/{name}", timeout=PATIENCE_S) as answer:
            yield json.load(answer)


def hostile(url: str, document: dict[str, Any]) -> list[Hostile]:
    """Makers of requests that nobody should send, for the models at an edge."""
    found: list[Hostile] = []
    for model in metadata_of(url, document):
        path, given_ = f"/v2/models/{model['name']}/infer", model["inputs"][0]
        found += _of_files(path, given_) if given_["datatype"] == "BYTES" else _of_tensors(path, given_)
    return [*found, *_untrue(found_path(document))]


def found_path(document: dict[str, Any]) -> str:
    """Where the first model is asked."""
    return f"/v2/models/{document['components']['parameters']['model']['schema']['enum'][0]}/infer"


def _tensor(given_: dict[str, Any], count: int) -> dict[str, Any]:
    return {"name": given_["name"], "shape": [count, *given_["shape"][1:]], "datatype": given_["datatype"]}


def _of_tensors(path: str, given_: dict[str, Any]) -> list[Hostile]:
    dtype = {"UINT8": np.uint8, "FP32": np.float32}[given_["datatype"]]
    xs = np.random.default_rng(0).integers(0, 256, (2, *given_["shape"][1:])).astype(dtype)
    nested = json.dumps({"id": "1", "inputs": [{**_tensor(given_, 1), "data": xs[:1].tolist()}]}).encode()
    flat = json.dumps({"inputs": [{**_tensor(given_, 1), "data": xs[0].ravel().tolist()}]}).encode()
    small = json.dumps(
        {
            "id": "1",
            "inputs": [{**_tensor(given_, 2), "parameters": {"binary_data_size": xs.nbytes}}],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True, "classification": 2}}],
            "parameters": {"binary_data_output": True},
        }
    ).encode()
    texts, smalls = Mutator([nested, flat]), Mutator([small])

    def damaged(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        return f"damaged JSON {path}", path, {}, texts.make(random)

    def behind(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        text = smalls.make(random)
        return f"damaged binary {path}", path, {LENGTH: str(len(text))}, text + xs.tobytes()

    def cut(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        whole = small + xs.tobytes()
        return f"cut {path}", path, {LENGTH: str(len(small))}, whole[: random.randrange(len(whole))]

    def lied(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        digits = "9" * random.randrange(1, 3000)
        length = random.choice(["-1", "0", "1e3", "", "+7", "0x7", digits, str(random.randrange(2000))])
        return f"length {path}", path, {LENGTH: length}, small + xs.tobytes()

    def all_data(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        return f"data {path}", path, {LENGTH: "0"}, random.randbytes(random.randrange(2000))

    return [damaged, behind, cut, lied, all_data]


def _of_files(path: str, given_: dict[str, Any]) -> list[Hostile]:
    kind = path.split("/")[3].rpartition(".")[2]
    seeds = [_file(kind, lossless) for lossless in (True, False)]
    files = Mutator(seeds)

    def damaged(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        return f"file {path}", path, {LENGTH: "0"}, files.make(random)

    def framed(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        content = files.make(random)[:4000]
        size = random.choice([len(content), len(content) + 1, 2**32 - 1, 0])
        data = struct.pack("<I", size) + content
        tensor = {**_tensor(given_, random.choice([1, 1, 2])), "parameters": {"binary_data_size": len(data)}}
        text = json.dumps({"inputs": [tensor]}).encode()
        return f"framed {path}", path, {LENGTH: str(len(text))}, text + data

    return [damaged, framed]


def _file(kind: str, lossless: bool) -> bytes:
    picture = np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    options: dict[str, Any] = {"lossless": lossless} if kind == "webp" else {}
    Image.fromarray(picture).save(file, format=kind.upper(), **options)
    return file.getvalue()


def _untrue(path: str) -> list[Hostile]:
    """What is no HTTP, or not as long as it says; and what costs a reader much."""

    def head(random: Random) -> bytes:
        length = random.choice([0, 1, 100, 2**24, 2**24 + 1, 2**31, 2**63, 2**64, 10**30, -1])
        return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode()

    def declared(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        return "declared", "", {}, head(random) + random.randbytes(random.randrange(300))

    def noise(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        return "noise", "", {}, random.randbytes(random.randrange(1, 3000))

    def chunked(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        start = f"POST {path} HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        size = random.choice([b"5", b"0", b"-1", b"ffffffffffffffff", b"zz", b"5;x=" + b"y" * 3000])
        return "chunked", "", {}, start + size + b"\r\n" + random.randbytes(random.randrange(20))

    def long_head(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        lines = b"".join(b"x-%d: %s\r\n" % (k, b"a" * 500) for k in range(random.randrange(300)))
        return "long head", "", {}, f"GET {path} HTTP/1.1\r\nHost: x\r\n".encode() + lines

    def nested(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        depth = random.randrange(1, 200_000)
        opening = random.choice([b"[", b'{"a":', b'{"inputs":['])
        closing = random.choice([b"", b"]" * depth])
        return "nested", path, {}, random.choice([b"", b'{"inputs":[{"data":']) + opening * depth + closing

    def many(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        item = random.choice([b"[],", b"1,", b'"",', b"{},", b"0.1,"])
        tensor = b'{"inputs":[{"name":"input","shape":[2147483647,8,8,3],"datatype":"UINT8","data":['
        return "many", path, {}, tensor + item * random.randrange(100_000) + b"0]}]}"

    def not_numbers(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        word = random.choice([b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e308", b"null", b"true", b"9" * 4000])
        start = b'{"inputs":[{"name":"input","shape":[1,8,8,3],"datatype":"UINT8","data":['
        return "not numbers", path, {}, start + b"1," * 191 + word + b"]}]}"

    def coded(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        coding = random.choice(["gzip", "deflate", "br", "zstd", "gzip, gzip", "x" * 3000])
        return "coded", path, {"Content-Encoding": coding}, random.randbytes(random.randrange(300))

    def large(random: Random) -> tuple[str, str, dict[str, str], bytes]:
        if random.random() < 0.9:
            return noise(random)
        return "large", path, {LENGTH: "0"}, bytes(random.choice([(1 << 24) - 1, (1 << 24) + 1, 20 << 20]))

    return [declared, noise, chunked, long_head, nested, many, not_numbers, coded, large]


def fuzz_edge(folder: Path, *, num_schema: int, num_hostile: int, seed: int, log: TextIO) -> Summary:
    """Start an edge on the bundle in `folder`, ask it all that, and say what came of it."""
    with EdgeProcess(folder, max_batch=4) as edge:
        settle = max(1, (num_schema + num_hostile) // 10)
        fuzz = Fuzz(edge.url.replace("ws://", "http://"), edge.pid, seed=seed, settle=settle, log=log)
        # Both before memory is taken to be settled: the largest bodies are hostile ones.
        fuzz.by_damage(num_hostile // 4)
        fuzz.by_schema(num_schema)
        fuzz.by_damage(num_hostile - num_hostile // 4)
        found = fuzz.summary()
        for line in edge.log:
            if "Traceback" in line:
                found.num_faults += 1
                found.faults.append(Fault("log", line[:300], ""))
        return found


def uploads_bundle(folder: Path) -> Path:
    """The tests' small bundle, with an upload plan for each format of picture files; its folder."""
    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_bundle import INPUT, MENU, make_tiny_bundle

    codecs = [("png", None), ("webp", 90), ("webp-lossless", None), ("jpeg", 90), ("jpeg-bare", 90)]
    uploads = (
        Plan(
            number=20 + place, kind="upload", variant="tiny", tail="segments/whole.onnx", crossing=(INPUT,),
            codec=CodecSpec(transform="image", coder=coder, quality=quality),  # type: ignore[arg-type]
        )
        for place, (coder, quality) in enumerate(codecs)
    )  # fmt: skip
    return Path(make_tiny_bundle(folder / "uploads", menu=(*MENU, *uploads)).folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz_http", description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000, help="made by schemathesis")
    parser.add_argument("--hostile", type=int, default=6_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--result", type=Path, default=RESULT)
    given_ = parser.parse_args()
    given_.result.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, gzip.open(given_.result.with_suffix(".log.gz"), "wt") as log:
        found = fuzz_edge(
            uploads_bundle(Path(folder)),
            num_schema=given_.requests, num_hostile=given_.hostile, seed=given_.seed, log=log,
        )  # fmt: skip
    given_.result.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=1) + b"\n")
    print(msgspec.json.encode(found).decode())
    return 1 if found.num_faults else 0


if __name__ == "__main__":
    sys.exit(main())
