"""What a segment needs of a machine's memory, from its file: weights, and the values that live at the same time.

    memory = weights + max over nodes of (bytes of all values that are made and still needed there)

An estimate for a batch of 1, without what the engine itself takes (some 40 MB for ONNX Runtime and numpy).  Where an
int8 network quantises a value and takes it back, the engine keeps the codes alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper

from .onnx_graph import load, needs_of


class Memory(NamedTuple):
    """Bytes of a segment's weights, and of its values at their most."""

    weights: int
    values: int


def memory_of(path: Path) -> Memory:
    """Of one segment.

    Raises:
        EngineError: the file is not there or no ONNX file.
    """
    model = load(path)
    weights = sum(_size(tensor.dims, tensor.data_type) for tensor in model.graph.initializer)
    sizes = _sizes(model)
    for node in model.graph.node:
        # What is taken back from codes is never written: its readers compute with the codes.
        if node.op_type == "DequantizeLinear" and node.output[0] in sizes:
            sizes[node.output[0]] = 0
    last = {name: place for place, node in enumerate(model.graph.node) for name in needs_of(node)}
    last |= {value.name: len(model.graph.node) for value in model.graph.output}
    live = sum(sizes.get(value.name, 0) for value in model.graph.input)
    most = live
    for place, node in enumerate(model.graph.node):
        live += sum(sizes.get(name, 0) for name in node.output)
        most = max(most, live)
        done = {name for name in (*needs_of(node), *node.output) if last.get(name, place) == place}
        live -= sum(sizes.get(name, 0) for name in done)
    return Memory(weights, most)


def memory_of_all(paths: Sequence[Path]) -> int:
    """Bytes of several segments on one machine, which run one at a time."""
    found = [memory_of(path) for path in paths]
    return sum(memory.weights for memory in found) + max((memory.values for memory in found), default=0)


def _sizes(model: onnx.ModelProto) -> dict[str, int]:
    """Bytes of every value of one sample; constants are none."""
    for value in (*model.graph.input, *model.graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = 1
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    constants = {tensor.name for tensor in model.graph.initializer}
    found = {}
    for value in (*graph.input, *graph.value_info, *graph.output):
        kind = value.type.tensor_type
        if value.name not in constants and kind.elem_type:
            found[value.name] = _size([max(1, dim.dim_value) for dim in kind.shape.dim], kind.elem_type)
    return found


def _size(dims: Sequence[int], elem_type: int) -> int:
    return int(np.prod(dims, dtype=np.int64)) * helper.tensor_dtype_to_np_dtype(elem_type).itemsize
