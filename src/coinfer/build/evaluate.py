"""Accuracy and bytes of plans in their deployed form, in one process: the same segments, codecs and tables.

What is compared is always top-1 on the same images against the unmodified fp32 network, image by
image, so that the interval of a loss is that of paired differences:

    d_i = reference right - candidate right      in {-1, 0, 1}
    loss_points = 100 mean(d),   half width = 196 std(d) / sqrt(n)

Without labels the reference's own answers stand in: "accuracy" is then agreement with it.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..codec import load_tables, make_codec
from ..data import Images
from ..engine.onnx import Session
from ..errors import DataError
from ..plan import Evidence, Plan

BATCH = 50


def spare_threads() -> int:
    """Threads for work whose time is not measured."""
    return os.cpu_count() or 1


def top1(outputs: tuple[NDArray[np.generic], ...]) -> NDArray[np.int64]:
    """The best class of each image from the network's first output, (N, classes)."""
    return np.asarray(np.argmax(outputs[0].reshape(len(outputs[0]), -1), axis=1), dtype=np.int64)


class Deployed:
    """One plan's head, codec and tail as a bundle's folder holds them."""

    def __init__(self, folder: Path, plan: Plan, *, threads: int | None = None) -> None:
        threads = threads or spare_threads()
        self.plan = plan
        self.head = None if plan.head is None else Session(folder / plan.head, threads=threads)
        self.tail = None if plan.tail is None else Session(folder / plan.tail, threads=threads)
        tables = None if plan.tables is None else load_tables(folder / plan.tables)
        self.codec = None if plan.codec is None else make_codec(plan.codec, plan.crossing, tables)

    def run(self, pixels: NDArray[np.uint8]) -> tuple[tuple[NDArray[np.generic], ...], NDArray[np.int64]]:
        """Outputs for a batch of pictures (N, H, W, C), and each image's payload bytes, really coded."""
        values: tuple[NDArray[np.generic], ...] = (pixels,)
        if self.head is not None:
            values = self.head.run(values)
        if self.codec is None or self.tail is None:
            return values, np.zeros(len(pixels), dtype=np.int64)
        payloads = [self.codec.encode([v[i : i + 1] for v in values]) for i in range(len(pixels))]
        decoded = [self.codec.decode(payload) for payload in payloads]
        joined = [np.concatenate([one[k] for one in decoded]) for k in range(len(values))]
        return self.tail.run(joined), np.array([len(payload) for payload in payloads])

    def classify(self, pixels: NDArray[np.uint8]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Best class and payload bytes of every picture, in batches."""
        parts = [self.run(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        return np.concatenate([top1(p[0]) for p in parts]), np.concatenate([p[1] for p in parts])


def proportion_ci(correct: NDArray[np.bool_]) -> float:
    """Half width of the 95 % Wilson interval of a share of right answers, in points."""
    n, share, z = len(correct), float(np.mean(correct)), 1.96
    return 100 * z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / (1 + z * z / n)


def loss_of(reference: NDArray[np.bool_], correct: NDArray[np.bool_]) -> tuple[float, float]:
    """Loss in top-1 points on the same images, and the half width of its 95 % interval."""
    difference = reference.astype(np.float64) - correct
    spread = float(np.std(difference)) / math.sqrt(len(difference))
    return 100 * float(np.mean(difference)), 196 * spread


def evaluate_plan(bundle: Bundle, number: int, images: Images, *, threads: int | None = None) -> Evidence:
    """Accuracy, loss and payload bytes of one plan of a bundle on these images (reported, n = all of them).

    The times are those of the bundle's own evidence.

    Raises:
        BundleError: the menu has no such plan.
        DataError: no images, or images of another size than the bundle's input.
    """
    if len(images.pixels) == 0:
        raise DataError("no images to evaluate on (split test)")
    expected = bundle.manifest.input.shape
    if images.pixels.shape[1:] != expected:
        raise DataError(f"pictures must be {expected}, got {images.pixels.shape[1:]} (bundle {bundle.folder})")
    candidates = {c.plan.number: c for c in bundle.candidates()}
    reference = bundle.manifest.reference_plan
    plan = bundle.plan(number)
    classes, payload_bytes = Deployed(bundle.folder, plan, threads=threads).classify(images.pixels)
    reference_classes = classes
    if number != reference:
        reference_classes = Deployed(bundle.folder, bundle.plan(reference), threads=threads).classify(images.pixels)[0]
    return evidence_of(candidates[number].evidence, classes, reference_classes, images.labels, payload_bytes)


def evidence_of(
    known: Evidence,
    classes: NDArray[np.int64],
    reference_classes: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
    payload_bytes: NDArray[np.int64],
) -> Evidence:
    """Evidence on test images from answers and payload sizes; times and size are taken over from `known`."""
    truth = reference_classes if labels is None else labels
    correct, reference = classes == truth, reference_classes == truth
    loss, loss_ci = loss_of(reference, correct)
    return Evidence(
        split="test",
        num_images=len(classes),
        accuracy=100 * float(np.mean(correct)),
        accuracy_ci=proportion_ci(correct),
        loss_points=loss,
        loss_ci_points=loss_ci,
        payload_bytes=float(np.mean(payload_bytes)),
        payload_bytes_p95=float(np.percentile(payload_bytes, 95)),
        payload_bytes_p50=float(np.median(payload_bytes)),
        reply_bytes=known.reply_bytes,
        head_s=known.head_s,
        encode_s=known.encode_s,
        decode_s=known.decode_s,
        tail_s=known.tail_s,
        device_bytes=known.device_bytes,
    )
