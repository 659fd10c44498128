"""Folding of batch normalisation into the convolution before it, on the captured graph.

In eval mode a batch normalisation is one scale and one offset a channel, so

    bn(conv(x, w, b)) = conv(x, w * s, (b - mean) * s + beta)      s = gamma / sqrt(var + eps)

The convolution's own value vanishes (no cut can be made there any more), the normalised one stays under its
name.  Scales are computed in float64, so the folded network differs from the original by rounding alone.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .graph import output_nodes
from .trace import keep_needed

_CONVOLUTIONS = (torch.ops.aten.conv1d.default, torch.ops.aten.conv2d.default, torch.ops.aten.conv3d.default)


@dataclass(frozen=True)
class Folded:
    """A module whose output is a flat tuple: the network's output tensors, then the surviving values.

    `values` names what each output is in the captured graph, in order.
    """

    module: fx.GraphModule
    num_outputs: int
    values: tuple[str, ...]


@torch.no_grad()
def fold(module: fx.GraphModule, outputs: list[str], values: list[str]) -> Folded:
    """Fold what can be folded, and give every value of `values` that survives as an output of its own.

    Args:
        module: a captured graph's module; it stays as it is.
        outputs: names of the network's output tensors, in order, perhaps with repetitions.
        values: names of inner values, without repetition.
    """
    folded = keep_needed(module)
    graph = folded.graph
    nodes = {node.name: node for node in graph.nodes}
    leaves = set(output_nodes(graph))
    for name, node in list(nodes.items()):
        conv = _convolution_of(node)
        if conv is not None and conv not in leaves:
            nodes[name] = _fold_pair(folded, conv, node)
            nodes.pop(conv.name)
    survivors = [name for name in values if name in nodes]
    (end,) = graph.find_nodes(op="output")
    flat: list[fx.Node] = []
    with graph.inserting_before(end):
        for name in outputs:
            node = nodes[name]
            is_repeated = node in flat or node.op in ("placeholder", "get_attr")
            flat.append(graph.call_function(torch.ops.aten.clone.default, (node,)) if is_repeated else node)
    extra = [name for name in survivors if nodes[name] not in flat]
    end.args = (tuple(flat + [nodes[name] for name in extra]),)
    names = tuple(outputs) + tuple(extra)
    return Folded(keep_needed(folded), len(outputs), names)


def _convolution_of(node: fx.Node) -> fx.Node | None:
    """The convolution that feeds this batch normalisation and nothing else; None: there is no such pair."""
    if node.target is not torch.ops.aten.batch_norm.default or node.args[5] is not False:
        return None
    conv = node.args[0]
    if not isinstance(conv, fx.Node) or conv.target not in _CONVOLUTIONS or len(conv.users) != 1:
        return None
    constants = [*node.args[1:5], *conv.args[1:3]]
    known = all(c is None or isinstance(c, fx.Node) and c.op == "get_attr" for c in constants)
    return conv if known and node.args[3] is not None and node.args[4] is not None else None


def _fold_pair(module: fx.GraphModule, conv: fx.Node, norm: fx.Node) -> fx.Node:
    """Put one convolution in the place of the pair; gives the new node."""
    weight = _constant(module, conv.args[1])
    assert weight is not None
    gamma, beta, mean, var = (_constant(module, arg) for arg in norm.args[1:5])
    assert mean is not None and var is not None
    eps = norm.args[7]
    assert isinstance(eps, float)
    scale = (var.double() + eps).rsqrt() * (1.0 if gamma is None else gamma.double())
    bias = _constant(module, conv.args[2]) if len(conv.args) > 2 else None
    offset = (0.0 if bias is None else bias.double()) - mean.double()
    offset = offset * scale + (0.0 if beta is None else beta.double())
    new_weight = weight.double() * scale.reshape(-1, *[1] * (weight.ndim - 1))
    graph = module.graph
    with graph.inserting_before(conv):
        held = []
        for part, tensor in (("weight", new_weight), ("bias", offset)):
            name = f"folded_{norm.name}_{part}"
            module.register_buffer(name, tensor.to(weight.dtype))
            held.append(graph.get_attr(name))
    with graph.inserting_before(norm):
        new = graph.call_function(conv.target, (conv.args[0], *held, *conv.args[3:]), dict(conv.kwargs))  # type: ignore[arg-type]
    norm.replace_all_uses_with(new)
    graph.erase_node(norm)
    graph.erase_node(conv)
    return new


def _constant(module: fx.GraphModule, arg: object) -> Tensor | None:
    if arg is None:
        return None
    assert isinstance(arg, fx.Node)
    value: object = module
    for part in str(arg.target).split("."):
        value = getattr(value, part)
    assert isinstance(value, Tensor)
    return value
