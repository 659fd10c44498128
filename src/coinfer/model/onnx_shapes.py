"""Removal of shape arithmetic from an exported ONNX graph.

An exporter writes `x.reshape(n, -1)` as nodes that ask a value for its shape, pick numbers from it and join
them again.  Such nodes tie a tail to values that do not cross.  But every dimension is either a number or the
batch, so the arithmetic can be done here, on lists like [B, 17, 3, 8]:

    Shape(v) -> Slice -> Concat -> Reshape        becomes     Reshape with the constant [-1, 17, 3, 8]
    Shape(v) -> Concat -> Expand                  becomes     Concat(batch_size, [17, 8]) -> Expand

where `batch_size` is the one node that asks the model's input (see onnx_graph).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper, numpy_helper

from .onnx_graph import BATCH_VALUE, Producers, batch_node

BATCH = "B"
Element = int | str
_LARGEST = 64


@dataclass(frozen=True)
class _Numbers:
    """A small integer tensor: its elements, each a number or the batch; a scalar has one and `is_scalar`."""

    elements: tuple[Element, ...]
    is_scalar: bool = False


def simplify_shapes(model: onnx.ModelProto) -> None:
    """Replace in `model` (in place) every shape that holds numbers and the batch alone.

    The first dimension of the model's first input is the batch.
    """
    graph = model.graph
    dims = _dims(model)
    known = {t.name: _read(t) for t in graph.initializer if _is_small_integer(t)}
    read = dict(known)
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute[0].name == "value" and _is_small_integer(node.attribute[0].t):
            known[node.output[0]] = read[node.output[0]] = _read(node.attribute[0].t)
        else:
            result = _evaluate(node, known, dims)
            if result is not None:
                known[node.output[0]] = result
    fresh = {name: value for name, value in known.items() if name not in read}
    made: list[onnx.NodeProto] = []
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.output[0] not in fresh:
            _rewire(node, fresh, dims, graph, made)
            nodes.append(node)
    for output in graph.output:
        if output.name in fresh:
            made += _build(output.name, fresh[output.name], graph)
    del graph.node[:]
    graph.node.extend([batch_node(graph.input[0].name), *made, *nodes])


def pool_means(model: onnx.ModelProto) -> None:
    """Write means over height and width as global average pooling, which has an int8 form; in place."""
    graph = model.graph
    dims = _dims(model)
    constants = {t.name: _read(t) for t in graph.initializer if _is_small_integer(t)}
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        axes = constants.get(node.input[1]) if node.op_type == "ReduceMean" and len(node.input) > 1 else None
        if axes is None or len(dims.get(node.input[0], ())) != 4 or {int(a) % 4 for a in axes.elements} != {2, 3}:
            nodes.append(node)
            continue
        keeps = all(a.i for a in node.attribute if a.name == "keepdims")
        pooled = node.output[0] if keeps else f"{node.output[0]}_pooled"
        nodes.append(helper.make_node("GlobalAveragePool", [node.input[0]], [pooled], name=node.name))
        if not keeps:
            axes_name = f"{pooled}_axes"
            graph.initializer.append(numpy_helper.from_array(np.array([2, 3], np.int64), axes_name))
            nodes.append(
                helper.make_node("Squeeze", [pooled, axes_name], [node.output[0]], name=f"{node.name}_squeeze")
            )
    del graph.node[:]
    graph.node.extend(nodes)


def remove_unused(model: onnx.ModelProto) -> None:
    """Drop nodes and constants that no output needs, in place."""
    producers = Producers(model)
    places, leaves = producers.needed([value.name for value in model.graph.output], [])
    nodes = [producers.nodes[place] for place in sorted(places)]
    constants = [tensor for tensor in model.graph.initializer if tensor.name in leaves]
    del model.graph.node[:]
    del model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend(constants)


def _dims(model: onnx.ModelProto) -> dict[str, tuple[Element, ...]]:
    """Shapes of values whose dimensions are all numbers or the batch."""
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    batch = inferred.input[0].type.tensor_type.shape.dim[0].dim_param
    dims: dict[str, tuple[Element, ...]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        if not value.type.tensor_type.HasField("shape"):
            continue
        shape: list[Element] = []
        for dim in value.type.tensor_type.shape.dim:
            if dim.HasField("dim_value"):
                shape.append(dim.dim_value)
            elif batch and dim.dim_param == batch:
                shape.append(BATCH)
        if len(shape) == len(value.type.tensor_type.shape.dim):
            dims[value.name] = tuple(shape)
    return dims


def _is_small_integer(tensor: onnx.TensorProto) -> bool:
    integer = tensor.data_type in (onnx.TensorProto.INT64, onnx.TensorProto.INT32)
    return integer and len(tensor.dims) <= 1 and int(np.prod(tensor.dims)) <= _LARGEST


def _read(tensor: onnx.TensorProto) -> _Numbers:
    array = numpy_helper.to_array(tensor)
    return _Numbers(tuple(int(v) for v in array.reshape(-1)), is_scalar=array.ndim == 0)


def _evaluate(
    node: onnx.NodeProto, known: dict[str, _Numbers], dims: dict[str, tuple[Element, ...]]
) -> _Numbers | None:
    """What an integer node gives, if that follows from shapes; None: it does not, or this is no such node."""
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if node.op_type == "Shape":
        shape = dims.get(node.input[0])
        return None if shape is None else _Numbers(shape[attributes.get("start", 0) : attributes.get("end")])
    if len(node.output) != 1 or not node.input or any(name not in known for name in node.input if name):
        return None
    args = [known[name] for name in node.input if name]
    first = args[0]
    match node.op_type:
        case "Identity" | "Cast":
            return first if attributes.get("to", onnx.TensorProto.INT64) == onnx.TensorProto.INT64 else None
        case "Unsqueeze":
            return _Numbers(first.elements) if first.is_scalar else None
        case "Squeeze":
            return _Numbers(first.elements, is_scalar=True) if len(first.elements) == 1 else None
        case "Reshape":
            return _Numbers(first.elements) if args[1].elements in ((-1,), (len(first.elements),)) else None
        case "Concat":
            return _Numbers(tuple(e for arg in args for e in arg.elements))
        case "Gather":
            if not all(isinstance(i, int) for i in args[1].elements):
                return None
            picked = tuple(first.elements[i] for i in args[1].elements if isinstance(i, int))
            return _Numbers(picked, args[1].is_scalar)
        case "Slice":
            return _sliced(args)
        case "Mul" | "Add" | "Sub":
            return _arithmetic(node.op_type, first, args[1])
    return None


def _sliced(args: list[_Numbers]) -> _Numbers | None:
    numbers = [arg.elements[0] for arg in args[1:]]
    if not all(isinstance(n, int) for n in numbers) or any(len(arg.elements) != 1 for arg in args[1:]):
        return None
    start, end = numbers[:2]
    step = numbers[3] if len(numbers) > 3 else 1
    assert isinstance(start, int) and isinstance(end, int) and isinstance(step, int)
    return _Numbers(args[0].elements[slice(start, end, step)]) if step > 0 else None


def _arithmetic(kind: str, a: _Numbers, b: _Numbers) -> _Numbers | None:
    if len(a.elements) != 1 or len(b.elements) != 1:
        return None
    x, y = a.elements[0], b.elements[0]
    is_scalar = a.is_scalar and b.is_scalar
    if isinstance(x, int) and isinstance(y, int):
        value = {"Mul": x * y, "Add": x + y, "Sub": x - y}[kind]
        return _Numbers((value,), is_scalar)
    if kind == "Mul" and 1 in (x, y):
        return _Numbers((y if x == 1 else x,), is_scalar)
    return None


def _rewire(
    node: onnx.NodeProto,
    fresh: dict[str, _Numbers],
    dims: dict[str, tuple[Element, ...]],
    graph: onnx.GraphProto,
    made: list[onnx.NodeProto],
) -> None:
    """Give a node constants, or joins of the batch size and constants, in the place of computed shapes."""
    for k, name in enumerate(node.input):
        if name not in fresh:
            continue
        numbers = fresh[name]
        if node.op_type == "Reshape" and k == 1:
            constant = _without_batch(node, numbers, dims)
            if constant is not None:
                node.input[1] = f"{name}_for_{node.output[0]}"
                graph.initializer.append(numpy_helper.from_array(np.array(constant, np.int64), node.input[1]))
                continue
        if not any(name == value.name for value in graph.initializer) and all(name not in n.output for n in made):
            made += _build(name, numbers, graph)


def _without_batch(node: onnx.NodeProto, numbers: _Numbers, dims: dict[str, tuple[Element, ...]]) -> list[int] | None:
    """A Reshape's target with its batch as -1 (the rest), or as 0 (as it is) where -1 is taken."""
    shape = numbers.elements
    if numbers.is_scalar or shape.count(BATCH) > 1:
        return None
    if BATCH not in shape or -1 not in shape:
        return [-1 if e == BATCH else int(e) for e in shape]
    keeps = shape[0] == BATCH and dims.get(node.input[0], (0,))[0] == BATCH
    return [0 if e == BATCH else int(e) for e in shape] if keeps else None


def _build(name: str, numbers: _Numbers, graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """A constant in `graph`, or nodes that give `numbers` under `name`."""
    if BATCH not in numbers.elements:
        array = np.array([int(e) for e in numbers.elements], np.int64)
        graph.initializer.append(numpy_helper.from_array(array[0] if numbers.is_scalar else array, name))
        return []
    if numbers.is_scalar:
        axes = f"{name}_axis"
        graph.initializer.append(numpy_helper.from_array(np.array([0], np.int64), axes))
        return [helper.make_node("Squeeze", [BATCH_VALUE, axes], [name], name=f"squeeze_{name}")]
    parts: list[str] = []
    for k, element in enumerate(numbers.elements):
        parts.append(BATCH_VALUE if element == BATCH else f"{name}_{k}")
        if element != BATCH:
            graph.initializer.append(numpy_helper.from_array(np.array([int(element)], np.int64), parts[-1]))
    return [helper.make_node("Concat", parts, [name], name=f"join_{name}", axis=0)]
