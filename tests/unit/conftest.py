"""Made-up candidates for everything that ranks, prices or prints them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from coinfer.plan import Candidate, CodecSpec, Evidence, Kind, Plan

CODECS = {
    "upload": CodecSpec(transform="image", coder="png"),
    "split": CodecSpec(transform="uniform", bits=2, per_channel=True, coder="range"),
}


def build_candidate(
    number: int,
    kind: Kind,
    *,
    payload_bytes: float = 1000.0,
    loss_points: float | None = 0.0,
    head_s: float = 0.001,
    tail_s: float = 0.001,
    encode_s: float = 0.0001,
    decode_s: float = 0.0001,
    reply_bytes: float = 10.0,
    precision: str = "fp32",
    device_bytes: float | None = None,
    dropped: str | None = None,
) -> Candidate:
    is_remote = kind != "device"
    plan = Plan(
        number=number,
        kind=kind,
        variant="net",
        precision=precision,
        cut=f"layer{number}#0" if kind == "split" else None,
        codec=CODECS.get(kind),
        head=None if kind == "upload" else "head.onnx",
        tail=None if kind == "device" else "tail.onnx",
    )
    evidence = Evidence(
        split="validation",
        num_images=2000,
        accuracy=None if loss_points is None else 90.0 - loss_points,
        accuracy_ci=0.01,
        loss_points=loss_points,
        loss_ci_points=0.5,
        payload_bytes=payload_bytes if is_remote else 0.0,
        payload_bytes_p95=payload_bytes if is_remote else 0.0,
        reply_bytes=reply_bytes if is_remote else 0.0,
        head_s=0.0 if kind == "upload" else head_s,
        encode_s=encode_s if is_remote else 0.0,
        decode_s=decode_s if is_remote else 0.0,
        tail_s=tail_s if is_remote else 0.0,
        device_bytes=device_bytes,
    )
    return Candidate(plan=plan, evidence=evidence, dropped=dropped)


@pytest.fixture(scope="session")
def make_candidate() -> Callable[..., Candidate]:
    return build_candidate


@pytest.fixture(scope="session")
def trio() -> list[Candidate]:
    """A slow device plan, a large upload, a small split: each wins somewhere."""
    return [
        build_candidate(0, "device", head_s=0.010, loss_points=0.0),
        build_candidate(1, "upload", payload_bytes=2000.0, tail_s=0.010, loss_points=0.0, encode_s=0.0002),
        build_candidate(2, "split", payload_bytes=300.0, head_s=0.003, tail_s=0.007, loss_points=0.5),
    ]
