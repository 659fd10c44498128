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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..data import Images
from ..engine.segments import Segments
from ..errors import DataError
from ..exits import is_sure
from ..plan import Candidate, Evidence, Plan, Side, TensorSpec

Arrays = tuple[NDArray[Any], ...]
BATCH = 50


def spare_threads() -> int:
    """Threads for work whose time is not measured."""
    return os.cpu_count() or 1


def top1(outputs: tuple[NDArray[np.generic], ...]) -> NDArray[np.int64]:
    """The best class of each image from the network's first output, (N, classes)."""
    return np.asarray(np.argmax(outputs[0].reshape(len(outputs[0]), -1), axis=1), dtype=np.int64)


class Classified(NamedTuple):
    """What a plan makes of N pictures: best class, payload bytes (0 of what did not cross), and who answered.

    `answered_by` is the place in the plan of the exit that answered, the number of its exits where none did.
    """

    classes: NDArray[np.int64]
    num_bytes: NDArray[np.int64]
    answered_by: NDArray[np.int64]


class AtExits(NamedTuple):
    """Of N pictures: logits (N, K) at each exit of a plan, best class at its end, payload bytes."""

    logits: tuple[NDArray[Any], ...]
    classes: NDArray[np.int64]
    num_bytes: NDArray[np.int64]


class Deployed:
    """One plan's segments and codec as a bundle's folder holds them."""

    def __init__(
        self, folder: Path, plan: Plan, outputs: tuple[TensorSpec, ...], *, threads: int | None = None
    ) -> None:
        self.plan = plan
        self._segments = Segments(lambda name: folder / name, outputs, threads=threads or spare_threads())

    def classify(self, pixels: NDArray[np.uint8]) -> Classified:
        """What comes of every picture (N, H, W, C), in batches; each is really coded."""
        parts = [self._classified(pixels[i : i + BATCH]) for i in range(0, len(pixels), BATCH)]
        return Classified(*(np.concatenate(column) for column in zip(*parts, strict=True)))

    def _classified(self, pixels: NDArray[np.uint8]) -> Classified:
        count, plan = len(pixels), self.plan
        found = Classified(np.zeros(count, np.int64), np.zeros(count, np.int64), np.full(count, len(plan.exits)))
        left = np.arange(count)

        def decide(place: int, logits: NDArray[Any]) -> NDArray[np.bool_]:
            nonlocal left
            is_out = is_sure(logits, plan.exits[place].rule)
            found.classes[left[is_out]] = top1((logits,))[is_out]
            found.answered_by[left[is_out]] = place
            left = left[~is_out]
            return ~is_out

        outputs = self._run(pixels, decide, lambda num_bytes: found.num_bytes.__setitem__(left, num_bytes))
        if len(left):
            found.classes[left] = top1(outputs)
        return found

    def at_exits(self, pixels: NDArray[np.uint8]) -> AtExits:
        """What every exit of the plan, and its end, makes of every picture, whoever would have answered."""
        logits: list[list[NDArray[Any]]] = [[] for _ in self.plan.exits]
        num_bytes: list[NDArray[np.int64]] = []
        classes = []

        def note(place: int, given: NDArray[Any]) -> NDArray[np.bool_]:
            logits[place].append(given)
            return np.ones(len(given), np.bool_)

        for i in range(0, len(pixels), BATCH):
            classes.append(top1(self._run(pixels[i : i + BATCH], note, num_bytes.append)))
        sent = np.concatenate(num_bytes) if num_bytes else np.zeros(len(pixels), np.int64)
        return AtExits(tuple(np.concatenate(one) for one in logits), np.concatenate(classes), sent)

    def _run(
        self,
        pixels: NDArray[np.uint8],
        decide: Callable[[int, NDArray[Any]], NDArray[np.bool_]],
        note_bytes: Callable[[NDArray[np.int64]], object],
    ) -> Arrays:
        """The network's outputs for the pictures that are left at its end; `decide` says behind each exit which are."""
        values = self._side("device", (pixels,), decide)
        if self.plan.codec is None:
            return values
        codec = self._segments.codec(self.plan)
        payloads = [codec.encode([v[i : i + 1] for v in values]) for i in range(len(values[0]))]
        note_bytes(np.array([len(payload) for payload in payloads], np.int64))
        if not payloads:
            return values
        decoded = [codec.decode(payload) for payload in payloads]
        joined = tuple(np.concatenate([one[k] for one in decoded]) for k in range(len(values)))
        return self._side("edge", joined, decide)

    def _side(
        self, side: Side, values: Arrays, decide: Callable[[int, NDArray[Any]], NDArray[np.bool_]]
    ) -> Arrays:
        """What one machine's segments make of the values of pictures, those that an exit answers left out."""
        for part in self._segments.parts(self.plan, side):
            if not len(values[0]):
                break
            given = tuple(part.segment.run(values))
            if part.exit is None:
                values = given
            else:
                stays = decide(part.exit, given[0])
                values = tuple(value[stays] for value in values)
        return values


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
    outputs = bundle.manifest.outputs
    found = Deployed(bundle.folder, plan, outputs, threads=threads).classify(images.pixels)
    own = found.classes
    if number != reference:
        own = Deployed(bundle.folder, bundle.plan(reference), outputs, threads=threads).classify(images.pixels).classes
    return evidence_of(candidates[number], found, own, images.labels)


def evidence_of(
    candidate: Candidate,
    found: Classified,
    reference_classes: NDArray[np.int64],
    labels: NDArray[np.int64] | None,
) -> Evidence:
    """Evidence on test images from a plan's answers; times and size are taken over from what is known of it.

    Times of segments behind exits are those of the shares that the exits answered where choices were made.
    """
    known, classes = candidate.evidence, found.classes
    shares = np.bincount(found.answered_by, minlength=len(candidate.plan.exits) + 1) / len(classes)
    crossing = found.num_bytes[found.num_bytes > 0]
    payload_bytes = crossing if len(crossing) else np.zeros(1)
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
        exit_s=known.exit_s,
        exit_shares=tuple(float(share) for share in shares[:-1]),
        exit_file=known.exit_file,
        device_bytes=known.device_bytes,
        device_memory_bytes=known.device_memory_bytes,
    )
