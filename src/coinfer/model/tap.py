"""A whole network with chosen inner values as its outputs, to compute the features of many cuts in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnx

from ..plan import TensorSpec
from .export import Whole

_ELEMENT = {"float32": onnx.TensorProto.FLOAT, "uint8": onnx.TensorProto.UINT8, "int64": onnx.TensorProto.INT64}


def tap_onnx(whole: Whole, values: Sequence[TensorSpec], path: Path) -> None:
    """Write `whole` with `values` (named as in its cuts) as its only outputs, batch dynamic."""
    model = onnx.load(whole.path)
    del model.graph.output[:]
    for value in values:
        shape: list[str | int | None] = ["batch", *value.shape]
        model.graph.output.append(onnx.helper.make_tensor_value_info(value.name, _ELEMENT[value.dtype], shape))
    onnx.save(model, path)
