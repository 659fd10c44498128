"""Where a network is divided, and the division itself: a head and a tail that are ordinary modules.

    head(x)            always a tuple: the crossing values in the order of `cut.specs`
    tail(*head(x))     the model's own output, equal to model(x) bit for bit

Both are made by copying nodes: the head has what the crossing values need, the tail what the output needs
down to the crossing values.  The tail asks the first crossing value for the batch size.  Tensors
(parameters, constants) are shared with the graph's module, not copied.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    head, tail = parts_of(graph, (cut,))
    return head, tail


def parts_of(graph: Graph, cuts: Sequence[Cut]) -> list[fx.GraphModule]:
    """`graph` divided at several cuts: the first part takes its inputs, each further one what crosses before it.

    All but the last give a tuple of what crosses behind them.

    Raises:
        CutError: a cut is of another graph, or the cuts are not in the order in which the network runs.
    """
    known = graph.cuts()
    for cut in cuts:
        if cut not in known:
            raise CutError(f'"{cut.name}" is none of the {len(known)} cuts of this graph: it is of another one')
    order = [known.index(cut) for cut in cuts]
    if order != sorted(set(order)):
        raise CutError(f"cuts must be in the order in which the network runs, got {[cut.name for cut in cuts]}")
    nodes = {node.name: node for node in graph.module.graph.nodes}
    (end,) = graph.module.graph.find_nodes(op="output")
    given: list[fx.Node] = list(graph.module.graph.find_nodes(op="placeholder"))
    parts = []
    for place, cut in enumerate(cuts):
        crossing = [nodes[spec.name] for spec in cut.specs]
        parts.append(_copy(graph.module, given, tuple(crossing), "Head" if place == 0 else "Middle"))
        given = crossing
    return [*parts, _copy(graph.module, given, end.args[0], "Tail")]


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
