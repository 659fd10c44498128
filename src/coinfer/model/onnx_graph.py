"""Sub-graphs of an ONNX model by value name, and files that are either whole or not there.

The batch size has one source in every file that coinfer writes, a node named `batch_size`:

    Shape(first input, start=0, end=1) -> "batch_size"

so that a segment which starts at other values asks the first of those instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx import TensorProto, helper

from ..errors import EngineError
from ..files import write_atomically
from ..plan import TensorSpec

BATCH_VALUE = "batch_size"
BATCH_DIM = "batch"
ELEMENT = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "uint8": TensorProto.UINT8,
    "int8": TensorProto.INT8,
    "int32": TensorProto.INT32,
    "int64": TensorProto.INT64,
    "bool": TensorProto.BOOL,
}


class Producers:
    """Which node makes each value of a model."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self.nodes = list(model.graph.node)
        self.inputs = {value.name for value in model.graph.input}
        self.place = {name: k for k, node in enumerate(self.nodes) for name in node.output if name}
        self._needs = [tuple(needs_of(node)) for node in self.nodes]

    def needed(self, wanted: Iterable[str], given: Iterable[str]) -> tuple[set[int], set[str]]:
        """Places of the nodes that make `wanted` from `given`, and every other name that they read."""
        stop = set(given)
        stack = [name for name in wanted if name not in stop]
        places: set[int] = set()
        leaves: set[str] = set()
        while stack:
            name = stack.pop()
            if name in stop:
                continue
            stop.add(name)
            place = self.place.get(name)
            if place is None:
                leaves.add(name)
            elif place not in places:
                places.add(place)
                if name != BATCH_VALUE:
                    stack.extend(self._needs[place])
        return places, leaves

    def closes(self, wanted: Iterable[str], given: Iterable[str]) -> bool:
        """Can `wanted` be made from `given` and constants alone?"""
        return not (self.needed(wanted, given)[1] & self.inputs)


def needs_of(node: onnx.NodeProto) -> list[str]:
    """The values that a node reads, those of its inner graphs included."""
    names = [name for name in node.input if name]
    for attribute in node.attribute:
        for graph in (attribute.g, *attribute.graphs) if attribute.type in (5, 10) else ():
            inner = {name for child in graph.node for name in child.output}
            inner |= {value.name for value in graph.input} | {value.name for value in graph.initializer}
            names += [name for child in graph.node for name in needs_of(child) if name not in inner]
            names += [value.name for value in graph.output if value.name not in inner]
    return names


def batch_node(source: str) -> onnx.NodeProto:
    """The node that asks `source` for the batch size."""
    return helper.make_node("Shape", [source], [BATCH_VALUE], name=BATCH_VALUE, start=0, end=1)


def value_info(spec: TensorSpec, batch: int | None = None) -> onnx.ValueInfoProto:
    """An input or output whose leading batch is dynamic, or fixed to `batch`."""
    return helper.make_tensor_value_info(spec.name, ELEMENT[spec.dtype], [batch or BATCH_DIM, *spec.shape])


def fixed_batch(model: onnx.ModelProto) -> int | None:
    """The batch that the model's first input states; None where it is dynamic."""
    dims = model.graph.input[0].type.tensor_type.shape.dim
    return int(dims[0].dim_value) or None if dims else None


def extract(
    model: onnx.ModelProto, producers: Producers, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """The part of `model` that makes `outputs` from `inputs`, with the constants that it needs and no others.

    Raises:
        EngineError: the outputs need an input of the model that is not among `inputs`.
    """
    given = [spec.name for spec in inputs]
    wanted = [spec.name for spec in outputs]
    places, leaves = producers.needed(wanted, given)
    missing = sorted(leaves & producers.inputs)
    if missing:
        raise EngineError(f'values {given} do not make {wanted}: input "{missing[0]}" is needed too')
    part = onnx.ModelProto(ir_version=model.ir_version, producer_name="coinfer")
    part.opset_import.extend(model.opset_import)
    graph = part.graph
    graph.name = model.graph.name
    for place in sorted(places):
        node = producers.nodes[place]
        graph.node.append(batch_node(given[0]) if node.output[0] == BATCH_VALUE else node)
    graph.initializer.extend(tensor for tensor in model.graph.initializer if tensor.name in leaves)
    part.functions.extend(model.functions)
    batch = fixed_batch(model)
    graph.input.extend(value_info(spec, batch) for spec in inputs)
    graph.output.extend(value_info(spec, batch) for spec in outputs)
    return part


def check_folder(path: Path) -> None:
    """See, before long work, that there is a folder for `path`.

    Raises:
        EngineError: there is none.
    """
    if not path.parent.is_dir():
        raise EngineError(f"cannot write {path}: there is no folder {path.parent}")


def save_atomically(model: onnx.ModelProto, path: Path) -> None:
    """Write a model, whole or not at all.  Raises as `write_file`."""
    write_file(model.SerializeToString(), path)


def write_file(content: bytes, path: Path) -> None:
    """Write a file, whole or not at all.

    Raises:
        EngineError: the folder is not there or cannot be written.
    """
    try:
        write_atomically(path, content)
    except OSError as error:
        raise EngineError(f"cannot write {path}: {error.strerror}") from error


def load(path: Path) -> onnx.ModelProto:
    """The model in a file.

    Raises:
        EngineError: there is none.
    """
    try:
        return onnx.load(path, load_external_data=False)
    except OSError as error:
        raise EngineError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise EngineError(f"{path} is not an ONNX file: {error}") from error
