"""Trained exits as one file, and each of them as a segment of its own.

NAME.safetensors    exits.K.*: the weights of exit K; network.*: those of the network, where it was trained with them
                    metadata: format, sha256 of the unmodified network's weights, cuts, spec, recipe
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import helper, numpy_helper
from torch import Tensor
from torch.nn.utils.fusion import fuse_conv_bn_eval

from ..errors import ModelError, WeightsError
from ..model.cut import Cut
from ..model.graph import Graph
from ..model.onnx_graph import save_atomically, value_info
from ..plan import TensorSpec
from .exits import ExitHead, ExitRecipe, ExitSpec
from .train import load_tensors, save_tensors

FORMAT = "coinfer-exits-2"
_OPSET, _IR_VERSION = 17, 9
_EXIT, _NETWORK = "exits.", "network."


class TrainedExits(NamedTuple):
    """Classifiers and the cuts where they are, in order; `network` has the weights that were trained with them."""

    cuts: tuple[Cut, ...]
    heads: tuple[ExitHead, ...]
    spec: ExitSpec
    recipe: ExitRecipe
    network: dict[str, Tensor]


def save_exits(trained: TrainedExits, path: Path, *, network: str) -> None:
    """Write trained exits; `network` is the sha256 of the unmodified network's weights."""
    tensors = {f"{_NETWORK}{name}": tensor for name, tensor in trained.network.items()}
    for place, head in enumerate(trained.heads):
        tensors |= {f"{_EXIT}{place}.{name}": tensor for name, tensor in head.state_dict().items()}
    metadata = {
        "format": FORMAT,
        "network": network,
        "cuts": msgspec.json.encode([cut.name for cut in trained.cuts]).decode(),
        "spec": msgspec.json.encode(trained.spec).decode(),
        "recipe": msgspec.json.encode(trained.recipe).decode(),
    }
    save_tensors(tensors, path, metadata=metadata)


def load_exits(path: Path, graph: Graph, *, network: str) -> TrainedExits:
    """The exits of a file that `save_exits` wrote.

    Raises:
        WeightsError: no such file, no exits, or those of another network or version.
        CutError: the graph has no such cut.
    """
    tensors, metadata = load_tensors(path, "file of exits")
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"exits {path} must be of format {FORMAT}, got {metadata.get('format')}")
    if metadata.get("network") != network:
        have, want = (str(text)[:12] for text in (metadata.get("network"), network))
        raise WeightsError(f"exits {path} were trained for another network: weights {have}, these are {want}")
    try:
        spec = msgspec.json.decode(metadata["spec"], type=ExitSpec)
        recipe = msgspec.json.decode(metadata["recipe"], type=ExitRecipe)
        cuts = tuple(graph.cut(name) for name in msgspec.json.decode(metadata["cuts"], type=list[str]))
        heads = []
        for place, cut in enumerate(cuts):
            head = ExitHead(cut.specs[0], graph.outputs[0].shape[0], spec)
            head.load_state_dict(_below(tensors, f"{_EXIT}{place}."))
            heads.append(head.eval())
    except (KeyError, msgspec.MsgspecError, ModelError, RuntimeError) as error:
        raise WeightsError(f"exits {path} do not fit: {error}") from error
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise WeightsError(f'exits {path} do not fit: "{name}" holds values that are no numbers')
    return TrainedExits(cuts, tuple(heads), spec, recipe, _below(tensors, _NETWORK))


def _below(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def export_exit(
    head: ExitHead, value: TensorSpec, path: Path, *, scales: Sequence[float] = (), zero_points: Sequence[int] = ()
) -> None:
    """Write a classifier as an ONNX file: `value` -> "logits" (K), fp32 arithmetic.

    Args:
        head: trained.
        value: what it takes, by its name in the exported network: float32, or the uint8 codes of an int8 one.
        path: the file.
        scales, zero_points: of those codes, one number each: value = scale * (code - zero point).
    """
    nodes: list[onnx.NodeProto] = []
    weights: dict[str, NDArray[np.generic]] = {}
    name, rank = value.name, len(value.shape)

    def add(kind: str, given: Sequence[str], **attributes: Any) -> None:
        nonlocal name
        made = f"exit.{kind.lower()}.{len(nodes)}"
        nodes.append(helper.make_node(kind, [name, *given], [made], name=made, **attributes))
        name = made

    def weight(key: str, tensor: Tensor) -> str:
        weights[key] = tensor.detach().cpu().float().contiguous().numpy()
        return key

    if value.dtype == "uint8":
        weights["scale"] = np.asarray(scales[0], np.float32)
        weights["zero_point"] = np.asarray(zero_points[0], np.uint8)
        add("DequantizeLinear", ["scale", "zero_point"])
    for place, layer in enumerate(_folded(head)):
        stem = f"features.{place}"
        if isinstance(layer, torch.nn.Conv2d):
            given = [weight(f"{stem}.weight", layer.weight), weight(f"{stem}.bias", _bias(layer))]
            add("Conv", given, pads=[1] * 4, strides=list(layer.stride))
        elif isinstance(layer, torch.nn.Linear):
            add("MatMul", [weight(f"{stem}.weight", layer.weight.T)])
            add("Add", [weight(f"{stem}.bias", _bias(layer))])
        else:
            add("Relu", [])
    if rank == 3:
        add("GlobalAveragePool", [])
        add("Flatten", [])
    elif rank == 2:
        add("ReduceMean", [], axes=[1], keepdims=0)
    add("Gemm", [weight("weight", head.classify.weight.T), weight("bias", _bias(head.classify))])
    nodes[-1].output[0] = "logits"
    logits = TensorSpec(name="logits", shape=(head.classify.out_features,))
    constants = [numpy_helper.from_array(array, key) for key, array in weights.items()]
    graph = helper.make_graph(nodes, "exit", [value_info(value)], [value_info(logits)], constants)
    opset = helper.make_opsetid("", _OPSET)
    save_atomically(
        helper.make_model(graph, opset_imports=[opset], ir_version=_IR_VERSION, producer_name="coinfer"), path
    )


def _folded(head: ExitHead) -> Iterator[torch.nn.Module]:
    """The layers before the mean, each batch norm within its convolution."""
    layers: list[torch.nn.Module | None] = [*head.features.eval(), None]
    for layer, after in pairwise(layers):
        assert layer is not None
        if isinstance(layer, torch.nn.Conv2d) and isinstance(after, torch.nn.BatchNorm2d):
            yield fuse_conv_bn_eval(layer, after)
        elif not isinstance(layer, torch.nn.BatchNorm2d):
            yield layer


def _bias(layer: torch.nn.Conv2d | torch.nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias
