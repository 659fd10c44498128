"""Static int8 of an exported network, with the cuts at which codes instead of numbers can cross.

ONNX Runtime writes a quantise / dequantise pair behind every activation that it quantises:

    Conv -> x -> QuantizeLinear -> codes (uint8) -> DequantizeLinear -> Conv ...
                                   ^ the cut: the head ends in codes, the tail starts from them

so an int8 head already ends in bytes with a static scale, and value = scale * (code - zero point).  A cut is
offered where each crossing value has such a pair and the tail can be made from the codes alone.

Weights are symmetric, one scale a channel, and 7 bits wide: on processors whose 8-bit products saturate in 16
bits (x86 without VNNI) full-width weights lose accuracy, 7 bits give the same answer everywhere.  Depthwise
convolutions add one product at a time in 32 bits on every processor, so theirs are 8 bits wide.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.quant_utils import add_pre_process_metadata

from ..engine.onnx import ORT_ERRORS
from ..errors import DataError, EngineError
from ..model.export import DeployedCut, Whole, save_record
from ..model.onnx_graph import Producers, fixed_batch, load, save_atomically
from ..model.onnx_shapes import remove_unused
from ..model.trace import first_line
from ..plan import TensorSpec

# What is cheap or exact in 8 bits.  Softmax, layer normalisation and gelu stay as they are: their ranges
# are wide and their share of the time is small.
QUANTISED = (
    "Add",
    "AveragePool",
    "Clip",
    "Concat",
    "Conv",
    "ConvTranspose",
    "Flatten",
    "Gemm",
    "GlobalAveragePool",
    "MatMul",
    "MaxPool",
    "Mul",
    "Pad",
    "Relu",
    "Reshape",
    "Slice",
    "Split",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
)
_LARGEST_BATCH = 32
_BATCH_ELEMENTS = 600_000


class _Pictures(CalibrationDataReader):  # type: ignore[misc]
    """Feeds pictures to ONNX Runtime's calibration, a small batch at a time."""

    def __init__(self, name: str, images: NDArray[np.uint8], batch: int | None) -> None:
        # All activations of a batch are in memory at once: four pictures of 224 x 224.
        size = batch or max(1, min(_LARGEST_BATCH, _BATCH_ELEMENTS // images[0].size))
        self._batches: Iterator[NDArray[np.uint8]] = (images[k : k + size] for k in range(0, len(images), size))
        self._name = name

    def get_next(self) -> dict[str, NDArray[np.uint8]] | None:
        """The next batch; None: there are no more."""
        batch = next(self._batches, None)
        return None if batch is None else {self._name: batch}


def quantize_onnx(whole: Whole, images: NDArray[np.uint8], path: Path) -> Whole:
    """An int8 form of `whole` at `path`, its record beside it.

    Args:
        whole: an exported fp32 network.
        images: (N, *input shape), of the input's dtype: a few hundred training pictures, for the ranges.
        path: the ONNX file to write.

    Raises:
        DataError: no images, or images of another shape than the network's input.
        EngineError: `whole` is not fp32, has several inputs, cannot be read, or cannot be quantised.
    """
    if whole.precision != "fp32" or whole.more_inputs:
        raise EngineError(
            f"int8 is made from an fp32 network with one input, got {whole.precision} with "
            f"{1 + len(whole.more_inputs)} ({whole.path.name})"
        )
    if len(images) == 0 or images.shape[1:] != whole.input.shape or images.dtype.name != whole.input.dtype:
        raise DataError(
            f"calibration needs images of {whole.input.dtype} (N, {', '.join(map(str, whole.input.shape))}), "
            f"got {images.dtype.name} {images.shape}"
        )
    model = load(whole.path)
    _unshare(model)
    # Batch norms are folded and shapes simple already, which is what this mark tells the quantiser.
    add_pre_process_metadata(model)
    own = [node.name for node in model.graph.node if node.name.startswith("preprocess_")]
    temporary = path.with_name(f".{path.name}.quantised")
    try:
        quantize_static(
            model,
            temporary,
            _Pictures(whole.input.name, images, fixed_batch(model)),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=list(QUANTISED),
            per_channel=True,
            reduce_range=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=own,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"CalibMovingAverage": True, "TensorQuantOverrides": _full_width(model)},
        )
        quantised = load(temporary)
    except ORT_ERRORS as error:
        raise EngineError(f"this network cannot be quantised: {first_line(error)} ({whole.path.name})") from error
    finally:
        temporary.unlink(missing_ok=True)
    _free_outputs(quantised)
    del quantised.graph.value_info[:]
    del quantised.metadata_props[:]
    save_atomically(quantised, path)
    result = msgspec.structs.replace(whole, path=path, precision="int8", cuts=_cuts(whole, quantised))
    save_record(result)
    return result


def _unshare(model: onnx.ModelProto) -> None:
    """Give each layer weights of its own; in place.

    Equal weights are exported once, but a convolution's channels lie on another axis than those of its mirror: one
    scale for each channel cannot suit both.
    """
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    taken: set[str] = set()
    for number, node in enumerate(model.graph.node):
        own = weights.keys() & set(node.input)
        if node.op_type in QUANTISED:
            for name in sorted(own & taken):
                copy = onnx.TensorProto()
                copy.CopyFrom(weights[name])
                copy.name = f"{name}.{number}"
                model.graph.initializer.append(copy)
                node.input[:] = [copy.name if given == name else given for given in node.input]
        taken |= own


def _full_width(model: onnx.ModelProto) -> dict[str, list[dict[str, Any]]]:
    """For ONNX Runtime: the weights that can use all 8 bits."""
    shapes = {tensor.name: tensor.dims for tensor in model.graph.initializer}
    depthwise = [
        node.input[1]
        for node in model.graph.node
        for attribute in node.attribute
        if node.op_type == "Conv"
        and attribute.name == "group"
        and attribute.i > 1
        and tuple(shapes.get(node.input[1], ()))[:2] == (attribute.i, 1)
    ]
    return {name: [{"axis": 0, "reduce_range": False}] for name in depthwise}


def _free_outputs(model: onnx.ModelProto) -> None:
    """Give the network's outputs as they are computed: 8 bits would make ties between classes; in place."""
    nodes = model.graph.node
    made = {node.output[0]: node for node in nodes}
    for output in model.graph.output:
        pair = made[output.name]
        codes = made.get(pair.input[0]) if pair.op_type == "DequantizeLinear" else None
        if codes is None or codes.input[0] not in made:
            continue
        value = codes.input[0]
        nodes.remove(pair)
        for node in nodes:
            node.output[:] = [output.name if name == value else name for name in node.output]
            node.input[:] = [output.name if name == value else name for name in node.input]
    remove_unused(model)


def _cuts(whole: Whole, quantised: onnx.ModelProto) -> tuple[DeployedCut, ...]:
    """The cuts of `whole` whose every value has codes, from which alone the outputs can be made."""
    producers = Producers(quantised)
    constants = {tensor.name: tensor for tensor in quantised.graph.initializer}
    codes = {node.input[0]: node for node in quantised.graph.node if node.op_type == "QuantizeLinear"}
    outputs = [spec.name for spec in whole.outputs]
    cuts = []
    for cut in whole.cuts:
        pairs = [codes.get(spec.name) for spec in cut.specs]
        nodes = [node for node in pairs if node is not None and _is_uint8(node, constants)]
        if len(nodes) != len(cut.specs) or not producers.closes(outputs, [node.output[0] for node in nodes]):
            continue
        cuts.append(
            msgspec.structs.replace(
                cut,
                specs=tuple(
                    TensorSpec(name=node.output[0], shape=spec.shape, dtype="uint8")
                    for node, spec in zip(nodes, cut.specs, strict=True)
                ),
                scales=tuple(float(_number(constants[node.input[1]])) for node in nodes),
                zero_points=tuple(int(_number(constants[node.input[2]])) for node in nodes),
            )
        )
    return tuple(cuts)


def _is_uint8(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> bool:
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    return zero is not None and zero.data_type == onnx.TensorProto.UINT8 and not zero.dims


def _number(tensor: onnx.TensorProto) -> Any:
    return numpy_helper.to_array(tensor).item()
