"""Bytes and accuracy of deployed plans, every picture sent over the link: the curves of one network.

    measure_curves(NAME, raw)     a bundle of its units, picture codecs and plain quantised splits; a line a plan

The bundle is of a job that keeps all candidates (`keep_all`).  Device and edge are two processes on loopback, each
request is one picture; what is counted is what crossed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from coinfer.build.make import assemble, build
from coinfer.bundle import Bundle
from coinfer.plan import Candidate, Plan
from coinfer.report.results import write_raw
from coinfer.runtime.device import Device
from coinfer.runtime.spawn import EdgeProcess

from .cells import OUT, job_of, note_commit, pictures_of, scored, show, workshop_of


def is_shown(candidate: Candidate) -> bool:
    """Device alone, every unit, every picture codec behind fp32, plain splits whose symbols are coded by channel."""
    plan, codec = candidate.plan, candidate.plan.codec
    if codec is None or plan.way == "unit":
        return True
    if plan.precision != "fp32":
        return False
    if plan.kind == "upload":
        return codec.coder in ("webp-lossless", "webp", "jpeg-bare")
    return codec.transform == "uniform" and codec.coder == "range" and codec.per_channel and codec.quality is None


def measure_curves(name: str, raw: Path) -> None:
    """Build the job `name` where that has not been done, and send every test picture by each plan shown."""
    folder = OUT / f"{name}.work"
    if not (folder / "manifest.json").is_file():
        build(job_of(name), OUT / name, progress=show)
    workshop = workshop_of(name)
    chosen_on = {c.plan.number: c.evidence.loss_points for c in workshop.candidates}
    shown = [c.plan.number for c in workshop.candidates if is_shown(c)]
    bundle = assemble(folder, shown, OUT / f"{name}.curves")
    images = pictures_of(name)
    truth = images.labels
    assert truth is not None
    lines: list[dict[str, Any]] = []
    with (
        EdgeProcess(bundle.folder, port=0) as edge,
        Device(bundle, edge=edge.url, plan=bundle.manifest.reference_plan) as device,
    ):
        reference = _sent(device, bundle, bundle.manifest.reference_plan, images.pixels)[0]
        for done, plan in enumerate(bundle.manifest.menu):
            show("over the link", done, len(shown), plan.label)
            classes, payload, wire = _sent(device, bundle, plan.number, images.pixels)
            named = {**_named(plan), "validation_loss_points": chosen_on[plan.number]}
            sizes = {"wire_bytes": float(np.mean(wire))}
            lines.append(named | scored(reference == truth, classes == truth, payload) | sizes)
    note_commit(raw, name)
    write_raw(raw / f"{name}.curves.jsonl.gz", lines)


def _named(plan: Plan) -> dict[str, Any]:
    codec = plan.codec
    return {
        "plan": plan.number,
        "kind": plan.kind,
        "variant": plan.variant,
        "precision": plan.precision,
        "cut": plan.cut,
        "codec": None if codec is None else codec.name,
        "coder": None if codec is None else codec.coder,
        "rate": codec.rate if codec is not None and plan.way == "unit" else None,
        "label": plan.label,
    }


def _sent(device: Device, bundle: Bundle, number: int, pixels: Any) -> tuple[Any, Any, Any]:
    """Best class, payload and wire bytes of every picture by one plan."""
    plan = bundle.plan(number)
    answers = list(device.stream(pixels, plan=plan.number))
    best = [a.outputs[0].argmax() if a.classes is None else a.classes[0] for a in answers]
    payload = [a.outcome.payload_bytes for a in answers]
    return np.array(best), np.array(payload), np.array([a.outcome.wire_bytes for a in answers])
