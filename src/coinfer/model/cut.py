"""Where a network is divided, and the division itself: a head and a tail that are ordinary modules.

    head(x)            always a tuple: the crossing values in the order of `cut.specs`
    tail(*head(x))     the model's own output, equal to model(x) bit for bit

Both are made by copying nodes: the head has what the crossing values need, the tail what the output needs
down to the crossing values.  The tail asks the first crossing value for the batch size.  Tensors
(parameters, constants) are shared with the graph's module, not copied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx

from ..errors import CutError
from ..plan import TensorSpec
from .trace import BATCH_NODE, STACK

if TYPE_CHECKING:
    from .graph import Graph


@dataclass(frozen=True)
class Cut:
    """A set of values that cross from head to tail.

    `name` is module path and call (`layer2.1#0`), the same at every width of a network; `aliases` are other names
    of it.  `specs` are the crossing values without batch, in the order in which they are made; their names are
    the graph's own.  `compute_share` is the share of the multiply-accumulates that lies before the cut.
    """

    name: str
    specs: tuple[TensorSpec, ...]
    compute_share: float
    aliases: tuple[str, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Bytes of one sample's crossing values, as they lie in memory."""
        return sum(spec.num_bytes for spec in self.specs)


def split(graph: Graph, cut: Cut) -> tuple[fx.GraphModule, fx.GraphModule]:
    """Head and tail of `graph` at `cut`.

    Raises:
        CutError: the cut is of another graph.
    """
    if cut not in graph.cuts():
        raise CutError(f'"{cut.name}" is none of the {len(graph.cuts())} cuts of this graph: it is of another one')
    nodes = {node.name: node for node in graph.module.graph.nodes}
    crossing = [nodes[spec.name] for spec in cut.specs]
    inputs = graph.module.graph.find_nodes(op="placeholder")
    (end,) = graph.module.graph.find_nodes(op="output")
    head = _copy(graph.module, inputs, tuple(crossing), "Head")
    tail = _copy(graph.module, crossing, end.args[0], "Tail")
    return head, tail


def _copy(module: fx.GraphModule, given: list[fx.Node], wanted: Any, name: str) -> fx.GraphModule:
    """A module that computes `wanted` (a structure of nodes) from the values of `given`."""
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {node: graph.placeholder(node.name) for node in given}
    batch_source = next(iter(new.values()))
    needed = _needed(wanted, set(given))
    for node in module.graph.nodes:
        if node not in needed:
            continue
        if is_batch_size(node):
            new[node] = graph.call_function(node.target, (batch_source, 0))
        elif node.op == "placeholder":
            raise CutError(f'input "{node.name}" is needed by the {name.lower()} and does not cross')
        else:
            new[node] = graph.node_copy(node, lambda n: new[n])
            new[node].meta = {STACK: node.meta.get(STACK, {})}
    graph.output(fx.node.map_arg(wanted, lambda n: new[n]))
    return fx.GraphModule(module, graph, class_name=name).eval()


def _needed(wanted: Any, given: set[fx.Node]) -> set[fx.Node]:
    """The nodes to copy for `wanted`, not going beyond `given` nor, for the batch size, to the input."""
    stack: list[fx.Node] = []
    fx.node.map_arg(wanted, lambda n: stack.append(n) or n)  # type: ignore[func-returns-value]
    needed: set[fx.Node] = set()
    while stack:
        node = stack.pop()
        if node in needed or node in given:
            continue
        needed.add(node)
        if not is_batch_size(node):
            stack.extend(node.all_input_nodes)
    return needed


def is_batch_size(node: fx.Node) -> bool:
    """Is this the one node that asks the first input for the batch size?"""
    return BATCH_NODE in node.meta
