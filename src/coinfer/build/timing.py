"""Times of segments: measured as deployed; of pruned networks predicted first, where that is good enough.

A job that prunes has networks by the dozen, each with a head and a tail for every cut.  Their times are predicted from
those of the unmodified network, of all whole networks, and of every few of their own; if segments that are left out are
predicted well.  What the predicted times do not rule out is measured before a menu is made of it (`make.timed`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from ..engine.measure import measure
from ..engine.onnx import Session
from ..model.export import cut_onnx, export_onnx
from ..model.graph import capture
from ..model.onnx_memory import memory_of_all
from ..plan import Preprocess, TensorSpec
from .drafts import Draft
from .predict import Errors, cross_validated, errors_of, features_of, fit
from .progress import Progress
from .workshop import Workshop

# The median error above which nothing is predicted, and of pruned networks' segments every so many that are measured.
MOST_ERROR = 0.1
MEASURED_OF = 5
# Fewer measured segments than that say too little about how well others are predicted.
LEAST_KNOWN = 12
# Of a network whose latency is a pruning's budget.
LATENCY_REPEATS = 21


class Predicted(NamedTuple):
    """Segments whose times were not measured, with what they are expected to take; and a line about how well."""

    seconds: dict[str, float]
    note: str

    def errors(self, measured_s: Mapping[str, float]) -> Errors | None:
        """How far they are from what was measured afterwards; None: nothing was."""
        pairs = [(took_s, measured_s[name]) for name, took_s in self.seconds.items() if name in measured_s]
        return errors_of(pairs) if pairs else None


def time_segments(workshop: Workshop, drafts: list[Draft], *, repeats: int, progress: Progress) -> Predicted:
    """Set head and tail times of these drafts, measured or predicted, and the size and memory of their heads.

    A session each with one thread; `repeats` calls of each.
    """
    names = {name: draft for draft in drafts for name in (draft.plan.head, draft.plan.tail) if name is not None}
    cut_from_pruned = [name for name, draft in names.items() if _is_cut_from_pruned(workshop, name, draft)]
    left = {name for place, name in enumerate(cut_from_pruned) if place % MEASURED_OF}
    times_s = {}
    now = [name for name in names if name not in left]
    for done, name in enumerate(now):
        progress("timing", done, len(now), name)
        times_s[name] = _measured_s(workshop.folder / name, repeats)
    progress("timing", len(now), len(now), "")
    predicted = _predicted(workshop, {name: draft.plan.precision for name, draft in names.items()}, times_s)
    again = sorted(left - predicted.seconds.keys())
    for done, name in enumerate(again):
        progress("timing", done, len(again), name)
        times_s[name] = _measured_s(workshop.folder / name, repeats)
    known = times_s | predicted.seconds
    heads = {draft.plan.head for draft in drafts if draft.plan.head is not None}
    memory = {head: float(memory_of_all([workshop.folder / head])) for head in heads}
    for draft in drafts:
        head, tail = draft.plan.head, draft.plan.tail
        draft.head_s = 0.0 if head is None else known[head]
        draft.tail_s = 0.0 if tail is None else known[tail]
        draft.device_bytes = 0.0 if head is None else float((workshop.folder / head).stat().st_size)
        draft.device_memory_bytes = 0.0 if head is None else memory[head]
        draft.is_time_predicted = head in predicted.seconds or tail in predicted.seconds
    return predicted


def _is_cut_from_pruned(workshop: Workshop, name: str, draft: Draft) -> bool:
    network = workshop.networks[draft.plan.variant]
    is_whole = name == workshop.whole_name(draft.plan.variant, draft.plan.precision)
    return bool(network.ancestry.pruned) and network.unit is None and not is_whole


def _measured_s(path: Path, repeats: int) -> float:
    session = Session(path)
    call = partial(session.run, [_noise(spec) for spec in session.inputs])
    return measure(call, warmup=3, repeats=repeats).median_s


def _predicted(workshop: Workshop, precision_of: Mapping[str, str], measured_s: Mapping[str, float]) -> Predicted:
    """The times of what was not measured, of those precisions where that goes well."""
    predicted_s: dict[str, float] = {}
    notes = []
    for precision in dict.fromkeys(precision_of.values()):
        own = [name for name, other in precision_of.items() if other == precision]
        known = [(features_of(workshop.folder / name), measured_s[name]) for name in own if name in measured_s]
        left = [name for name in own if name not in measured_s]
        if len(known) < LEAST_KNOWN or not left:
            continue
        errors = cross_validated(known)
        is_good = errors.median <= MOST_ERROR
        notes.append(f"{precision} {errors.text}{'' if is_good else ': measured instead'}")
        if is_good:
            predictor = fit(known)
            predicted_s |= {name: predictor.seconds(features_of(workshop.folder / name)) for name in left}
    note = f"times of {len(predicted_s)} segments predicted, errors on measured ones: {', '.join(notes)}"
    return Predicted(predicted_s, note if notes else "")


def deployed_s(
    module: nn.Module,
    example: Sequence[Tensor],
    cut: str | None,
    *,
    preprocess: Preprocess,
    pixels: NDArray[np.uint8],
    folder: Path,
) -> float:
    """Median seconds that a network, or its head up to `cut`, takes for `pixels` (1, H, W, C), exported, on one thread.

    What is exported lies in `folder` for as long.
    """
    device = next(module.parameters()).device
    path = folder / "latency.onnx"
    folder.mkdir(parents=True, exist_ok=True)
    whole = export_onnx(capture(module.cpu(), example), path, preprocess=preprocess)
    module.to(device)
    files = [path]
    if cut is not None:
        files = [folder / "latency.head.onnx", folder / "latency.tail.onnx"]
        cut_onnx(whole, cut, head=files[0], tail=files[1])
    session = Session(files[0])
    took_s = measure(lambda: session.run([pixels]), warmup=5, repeats=LATENCY_REPEATS).median_s
    for file in {path, path.with_suffix(".json"), *files}:
        file.unlink(missing_ok=True)
    return took_s


def int8_ratio_of(workshop: Workshop, drafts: list[Draft]) -> float:
    """How much more an int8 segment is slowed than an fp32 one, so that int8 is at most 2x faster there.

    The ratio is of the main network as a whole: max(1, (fp32 time / int8 time) / 2).
    """
    whole = {d.plan.precision: d.head_s for d in drafts if d.plan.kind == "device" and d.plan.variant == workshop.main}
    return max(1.0, whole["fp32"] / whole["int8"] / 2) if "int8" in whole else 1.0


def _noise(spec: TensorSpec) -> NDArray[np.generic]:
    rng = np.random.default_rng(0)
    shape = (1, *spec.shape)
    noise = rng.integers(0, 200, shape) if spec.dtype == "uint8" else rng.normal(size=shape)
    return noise.astype(spec.dtype)
