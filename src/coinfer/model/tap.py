"""A whole network with chosen inner values as its outputs, to compute the features of many cuts in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from ..plan import TensorSpec
from .export import Whole
from .onnx_graph import fixed_batch, value_info


def tap_onnx(whole: Whole, values: Sequence[TensorSpec], path: Path) -> None:
    """Write `whole` with `values` (named as in its cuts) as its only outputs, its batch as it is."""
    model = onnx.load(whole.path)
    del model.graph.output[:]
    model.graph.output.extend(value_info(value, fixed_batch(model)) for value in values)
    onnx.save(model, path)
