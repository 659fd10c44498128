"""What the values of a plain graph are: found by running it with a batch of 1 and one of 3.

shape (1, 8, 4, 4) and (3, 8, 4, 4)   a tensor with a leading batch, (8, 4, 4) a sample
shape (8, 4) and (8, 4)               a tensor without one
shape (17, 1, 8) and (17, 3, 8)       a tensor whose batch is elsewhere: nothing can be cut there
1 and 3                               the batch size
7 and 7                               a number that is the same for every batch
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from .trace import BATCH_NODE, keep_needed

_QUERIES = ("size", "shape", "dim", "ndim", "dtype", "device", "sym_size")
_NUMBERS = (int, float, torch.dtype, torch.device)


@dataclass(frozen=True)
class Fact:
    """One value: `shape` is a sample's where `has_batch`, the whole tensor's at batch 1 elsewhere; None: no tensor."""

    shape: tuple[int, ...] | None
    dtype: str = ""
    has_batch: bool = False


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps what each node's value is like, not the value."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.seen: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.seen[n.name] = (tuple(value.shape), str(value.dtype).removeprefix("torch."))
        elif isinstance(value, tuple | list) and all(isinstance(v, _NUMBERS) for v in value):
            self.seen[n.name] = list(value)
        else:
            self.seen[n.name] = value if isinstance(value, _NUMBERS) else None
        return value


@torch.no_grad()
def record(module: fx.GraphModule, inputs: Sequence[Tensor]) -> tuple[dict[str, Any], Any]:
    """Each node's (shape, dtype), number, list of numbers or None; and the output."""
    recorder = _Recorder(module)
    output = recorder.run(*inputs)
    return recorder.seen, output


class _Picker(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes."""

    def __init__(self, module: fx.GraphModule, names: set[str]) -> None:
        super().__init__(module)
        self.names = names
        self.kept: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.names:
            self.kept[n.name] = value
        return value


@torch.no_grad()
def values_of(module: fx.GraphModule, inputs: Sequence[Tensor], names: set[str]) -> dict[str, Tensor]:
    """The values of the named nodes for one batch."""
    picker = _Picker(module, names)
    picker.run(*inputs)
    return picker.kept


def facts_of(one: dict[str, Any], many: dict[str, Any], sizes: tuple[int, int]) -> dict[str, Fact]:
    """Facts from the records of two runs with batches of `sizes` (equal sizes: the batch is fixed)."""
    facts: dict[str, Fact] = {}
    for name, first in one.items():
        if not isinstance(first, tuple):
            facts[name] = Fact(None)
            continue
        (shape, dtype), (other, _) = first, many[name]
        leads = bool(shape) and (shape[0], other[0]) == sizes and shape[1:] == other[1:]
        facts[name] = Fact(shape[1:] if leads else shape, dtype, leads)
    return facts


def settle_numbers(
    module: fx.GraphModule, one: dict[str, Any], many: dict[str, Any], sizes: tuple[int, int]
) -> fx.GraphModule:
    """Write numbers that follow from shapes into the graph; those that are the batch size come from one node."""
    graph = module.graph
    settled: set[fx.Node] = set()
    batch: fx.Node | None = None
    first_call = next(n for n in graph.nodes if n.op not in ("placeholder", "get_attr"))
    for node in list(graph.nodes):
        if not _asks_shapes(node, settled) or isinstance(one[node.name], tuple | None):
            continue
        now, then = (r if isinstance(r, list) else [r] for r in (one[node.name], many[node.name]))
        is_batch = [sizes[0] != sizes[1] and pair == sizes for pair in zip(now, then, strict=True)]
        if any(not same and a != b for a, b, same in zip(now, then, is_batch, strict=True)):
            continue
        if any(is_batch) and batch is None:
            with graph.inserting_before(first_call):
                (holder, *_) = graph.find_nodes(op="placeholder")
                batch = graph.call_function(torch.ops.aten.sym_size.int, (holder, 0))
                batch.meta[BATCH_NODE] = True
        values = [batch if same else value for value, same in zip(now, is_batch, strict=True)]
        _replace(node, tuple(values) if isinstance(one[node.name], list) else values[0])
        settled.add(node)
    return keep_needed(module)


def _asks_shapes(node: fx.Node, settled: set[fx.Node]) -> bool:
    if node.op in ("placeholder", "get_attr", "output"):
        return False
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    if node.op == "call_function" and name == "getattr":
        name = str(node.args[1])
    return name.split(".")[0] in _QUERIES or (
        bool(node.all_input_nodes) and all(n in settled for n in node.all_input_nodes)
    )


def _replace(node: fx.Node, value: Any) -> None:
    def new(n: fx.Node) -> Any:
        return value if n is node else n

    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, new)
        user.kwargs = fx.node.map_arg(user.kwargs, new)


def macs_of(node: fx.Node, module: fx.GraphModule, whole: dict[str, Any]) -> int:
    """Multiply-accumulates of one node for one sample: convolutions, linear maps, matrix products, attention.

    Args:
        node: any node of `module`.
        module: the graph's module.
        whole: the record of a run with a batch of 1, whose shapes are those of one sample.
    """
    out = whole[node.name]
    if not isinstance(out, tuple):
        return 0
    size = math.prod(out[0])
    if node.op == "call_module":
        return _module_macs(module.get_submodule(str(node.target)), size, node, whole)
    shapes = [whole[a.name][0] for a in node.args if isinstance(a, fx.Node) and isinstance(whole[a.name], tuple)]
    target = node.target
    name = target if isinstance(target, str) else getattr(target, "__name__", "")
    rule = _MACS.get(name.split(".")[0].removesuffix("_"))
    return rule(size, shapes) if rule is not None and len(shapes) >= 2 else 0


def _module_macs(module: nn.Module, size: int, node: fx.Node, whole: dict[str, Any]) -> int:
    if isinstance(module, nn.Linear):
        return size * module.in_features
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.transposed:
            size = math.prod(whole[node.all_input_nodes[0].name][0])
        return size * math.prod(module.weight.shape[1:])
    return 0


Shapes = list[tuple[int, ...]]


def _conv(size: int, shapes: Shapes) -> int:
    return size * math.prod(shapes[1][1:])


def _conv_transpose(size: int, shapes: Shapes) -> int:
    return math.prod(shapes[0]) * math.prod(shapes[1][1:])


def _product(size: int, shapes: Shapes) -> int:
    return size * shapes[0][-1]


def _added_product(size: int, shapes: Shapes) -> int:
    return size * shapes[1][-1]


def _attention(size: int, shapes: Shapes) -> int:
    query, key = shapes[0], shapes[1]
    return math.prod(query) * key[-2] + size * key[-2]


_MACS: dict[str, Callable[[int, Shapes], int]] = {
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "convolution": _conv,
    "conv_transpose1d": _conv_transpose,
    "conv_transpose2d": _conv_transpose,
    "conv_transpose3d": _conv_transpose,
    "linear": _product,
    "matmul": _product,
    "mm": _product,
    "bmm": _product,
    "addmm": _added_product,
    "baddbmm": _added_product,
    "scaled_dot_product_attention": _attention,
}
