"""Latency of segments that nobody measured, from measured ones of the same machine.

Neurosurgeon (Kang et al., ASPLOS 2017) fits a regression for each type of layer to layers timed one by one.  A layer
alone is not what a deployed segment runs, so the unknowns are fitted to whole segments: for each type of layer a time
for a multiply-accumulate, for a value written and for the layer itself, none of them negative, and one for the call.

    fit([(path, seconds), ...]).seconds(path)
    cross_validated([(path, seconds), ...])     its errors on segments that were left out
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from scipy.optimize import nnls

from ..errors import DataError
from ..model.onnx_graph import load

# What costs nothing, or is part of the layer beside it.
_FREE = {
    "Constant", "DequantizeLinear", "Flatten", "Identity", "QuantizeLinear", "Reshape", "Shape", "Squeeze", "Unsqueeze",
}  # fmt: skip
_CALL = "call"
FOLDS = 5

Features = Mapping[str, float]


class Errors(NamedTuple):
    """Relative errors of predictions, |predicted / measured - 1|, of how many segments."""

    median: float
    p95: float
    num_segments: int

    @property
    def text(self) -> str:
        """In few words."""
        return f"median {100 * self.median:.1f} %, p95 {100 * self.p95:.1f} % of {self.num_segments}"


def errors_of(pairs: Sequence[tuple[float, float]]) -> Errors:
    """Of predicted and measured seconds."""
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    return Errors(float(np.median(errors)), float(np.percentile(errors, 95)), len(errors))


class Predictor(NamedTuple):
    """Seconds of each feature."""

    seconds_of: dict[str, float]

    def seconds(self, features: Features) -> float:
        """Of one call of a segment; layers of a type that was never measured count as nothing."""
        return sum(self.seconds_of.get(name, 0.0) * value for name, value in features.items())


def cross_validated(known: Sequence[tuple[Features, float]], *, seed: int = 0) -> Errors:
    """Errors on segments that were left out of the fit, a fifth at a time.

    Raises:
        DataError: fewer segments than parts.
    """
    if len(known) < FOLDS:
        raise DataError(f"errors of predictions need at least {FOLDS} measured segments, got {len(known)}")
    part = np.random.default_rng(seed).permutation(len(known)) % FOLDS
    pairs: list[tuple[float, float]] = []
    for fold in range(FOLDS):
        predictor = fit([line for line, own in zip(known, part, strict=True) if own != fold])
        left_out = [line for line, own in zip(known, part, strict=True) if own == fold]
        pairs += [(predictor.seconds(features), seconds) for features, seconds in left_out]
    return errors_of(pairs)


def fit(known: Sequence[tuple[Features, float]]) -> Predictor:
    """The times that fit measured segments best, by relative error.

    Args:
        known: what segments of one precision are made of, and their seconds on one machine.

    Raises:
        DataError: none, or one that took no time.
    """
    if not known or min(seconds for _, seconds in known) <= 0:
        raise DataError(f"a predictor needs segments with times above 0, got {len(known)}")
    names = sorted({name for features, _ in known for name in features})
    rows = np.array([[features.get(name, 0.0) for name in names] for features, _ in known])
    took_s = np.array([seconds for _, seconds in known])
    # Columns of one scale, so that the solver's tolerance means the same for each.
    scale = rows.max(0)
    times, _ = nnls(rows / scale / took_s[:, None], np.ones(len(known)))
    return Predictor({name: float(time) for name, time in zip(names, times / scale, strict=True) if time > 0})


def features_of(path: Path) -> Features:
    """What a segment is made of: for each type of layer its multiply-accumulates, values written, and number."""
    model = load(path)
    shapes = _shapes(model)
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    origin = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    found: dict[str, float] = {_CALL: 1.0}
    for node in model.graph.node:
        if node.op_type in _FREE:
            continue
        given = [origin.get(name, name) for name in node.input]
        weight = _shape_of(given[1], weights, shapes) if len(given) > 1 else None
        kind, macs_per_value = _kind(node, weight)
        written = float(sum(np.prod(shapes.get(name, (0,))) for name in node.output))
        for what, value in (("macs", written * macs_per_value), ("values", written), ("layers", 1.0)):
            if value:
                found[f"{kind} {what}"] = found.get(f"{kind} {what}", 0.0) + value
    return found


def _kind(node: onnx.NodeProto, weight: tuple[int, ...] | None) -> tuple[str, float]:
    """A layer's type, and its multiply-accumulates for each value written."""
    if node.op_type == "Conv" and weight is not None:
        size = int(np.prod(weight[1:]))
        groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
        if groups > 1:
            return "Conv of groups", size
        return ("Conv 1x1" if np.prod(weight[2:]) == 1 else "Conv"), size
    if node.op_type in ("Gemm", "MatMul") and weight is not None:
        is_turned = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        return "MatMul", float(weight[-1] if is_turned else weight[-2])
    return node.op_type, 0.0


def _shape_of(
    name: str, weights: Mapping[str, onnx.TensorProto], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[int, ...] | None:
    return tuple(weights[name].dims) if name in weights else shapes.get(name)


def _shapes(model: onnx.ModelProto) -> dict[str, tuple[int, ...]]:
    """Shapes of all values of one sample."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    return {
        value.name: tuple(max(1, dim.dim_value) for dim in value.type.tensor_type.shape.dim)
        for value in (*graph.input, *graph.value_info, *graph.output)
    }
