"""Figures of single parts: the codec against its cost, encoding speed, searching 10,000 candidates.

python -m bench.parts       writes docs/results/raw/main-job/parts.jsonl.gz
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from coinfer.codec import HEADER_BYTES, calibrate, make_codec
from coinfer.codec.uniform import UniformCodec
from coinfer.plan import Candidate, CodecSpec, Evidence, Plan, TensorSpec
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.results import write_raw
from coinfer.search.estimate import Table
from coinfer.search.goal import Goal
from coinfer.search.solve import search

RAW = Path("docs/results/raw/main-job/parts.jsonl.gz")
SHAPES = ((1, 4, 4), (4, 4, 4), (16, 4, 4), (64, 1, 1), (64, 8, 8), (32, 16, 16), (16, 32, 32), (64, 56, 56))


def features(shape: tuple[int, int, int], skew: float, count: int, seed: int) -> NDArray[np.float32]:
    """Rectified normal features whose channels differ in scale; a large `skew` leaves mostly zeros."""
    rng = np.random.default_rng(seed)
    scale = rng.uniform(0.2, 3.0, (1, shape[0], 1, 1))
    return np.maximum(rng.normal(-skew, 1, (count, *shape)) * scale, 0).astype(np.float32)


def codec_lines() -> Iterator[dict[str, Any]]:
    """Code bytes of single payloads beside their cost under the static tables."""
    for shape in SHAPES:
        crossing = (TensorSpec(name="x", shape=shape),)
        for skew in (0.0, 1.0, 2.5):
            known, fresh = features(shape, skew, 64, 0), features(shape, skew, 6, 1)
            for bits in (1, 2, 4, 8):
                for coder in ("range", "rans"):
                    spec = CodecSpec(transform="uniform", bits=bits, per_channel=True, coder=coder)
                    tables = calibrate(spec, crossing, [known])
                    codec = make_codec(spec, crossing, tables)
                    assert isinstance(codec, UniformCodec)
                    for x in fresh:
                        yield _codec_line(codec, x, skew)


def _codec_line(codec: UniformCodec, x: NDArray[np.float32], skew: float) -> dict[str, Any]:
    payload = codec.encode([x[None]])
    return {
        "kind": "codec",
        "codec": codec.spec.name,
        "symbols": int(x.size),
        "skew": skew,
        "cost_bytes": float(codec.cost_bits([x[None]])[0] / 8),
        "code_bytes": len(payload) - HEADER_BYTES,
    }


def speed_lines() -> Iterator[dict[str, Any]]:
    """Symbols encoded a second, one line a repeat."""
    for shape in ((16, 32, 32), (64, 56, 56), (256, 56, 56)):
        crossing = (TensorSpec(name="x", shape=shape),)
        x = features(shape, 1.0, 9, 2)
        for bits in (2, 4, 8):
            for coder in ("range", "rans", "zstd", "none"):
                spec = CodecSpec(transform="uniform", bits=bits, per_channel=True, coder=coder)
                codec = make_codec(spec, crossing, calibrate(spec, crossing, [x[:8]]))
                codec.encode([x[8:]])
                for _ in range(20):
                    start = time.perf_counter()
                    codec.encode([x[8:]])
                    took_s = time.perf_counter() - start
                    yield {"kind": "speed", "codec": spec.name, "symbols": int(x[8:].size), "encode_s": took_s}


def candidates_of(count: int) -> list[Candidate]:
    """Made-up candidates for timing the search alone."""
    rng = np.random.default_rng(0)
    spec = TensorSpec(name="x", shape=(16, 8, 8))
    codec = CodecSpec(transform="uniform", bits=4, coder="range")
    plan = Plan(number=0, kind="split", variant="n", cut="c", codec=codec, crossing=(spec,), head="h", tail="t")
    whole = Plan(number=0, kind="device", variant="n", head="w")
    result = []
    for number in range(count):
        times = rng.uniform(1e-4, 1e-2, 4)
        evidence = Evidence(
            split="validation",
            num_images=2000,
            accuracy=90.0,
            accuracy_ci=1.0,
            loss_points=float(rng.uniform(-0.2, 4)),
            loss_ci_points=0.5,
            payload_bytes=float(rng.uniform(20, 5000)),
            payload_bytes_p95=5000.0,
            reply_bytes=40.0,
            head_s=times[0],
            encode_s=times[1],
            decode_s=times[2],
            tail_s=times[3],
        )
        base = whole if number % 100 == 0 else plan
        result.append(Candidate(plan=msgspec.structs.replace(base, number=number), evidence=evidence))
    return result


def search_lines() -> Iterator[dict[str, Any]]:
    """Seconds of one search over 10,000 candidates, the table's making included and not."""
    candidates = candidates_of(10_000)
    conditions = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=30, int8=45))
    table = Table(candidates)
    for repeat in range(25):
        start = time.perf_counter()
        best = search(candidates, conditions, Goal()).best
        from_list_s = time.perf_counter() - start
        start = time.perf_counter()
        assert search(table, conditions, Goal()).best == best
        from_table_s = time.perf_counter() - start
        yield {"kind": "search", "repeat": repeat, "from_list_s": from_list_s, "from_table_s": from_table_s}


def main() -> None:
    """Run all parts and write the raw log."""
    lines = [*codec_lines(), *speed_lines(), *search_lines()]
    write_raw(RAW, lines)
    print(f"{len(lines)} lines written to {RAW}")


if __name__ == "__main__":
    main()
