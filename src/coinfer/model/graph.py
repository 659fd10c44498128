"""A captured model: its nodes, the values between them, and every place where it can be cut.

    capture(model, example)      Graph
    graph.cuts()                 one Cut for each prefix of the compute nodes, in the order in which the model runs

A prefix is what the device would compute.  What crosses is every value made (or given) before its end and used
after it:

    x --conv--> a --relu--> b --conv--> c --add(b)--> d --pool--> e          cuts: {a} {b} {b, c} {d}

The two ends are no cuts: where only inputs cross (that is an upload), and where nothing is left to compute.
Nodes that compute nothing of their own never cross and are done again where they are needed: parameters and
what follows from them alone, the batch size and what follows from it alone (a class token repeated for each
image), and nodes that pass a value on as it is (dropout, a slice of everything).
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError, CutError
from ..plan import SEVERAL, TensorSpec
from .cut import Cut, is_batch_size
from .facts import Fact, facts_of, macs_of, record, settle_numbers
from .naming import name_values, op_of
from .trace import TRACE_ERRORS, How, first_line, trace

TOLERANCE = 1e-4
_MANY = 3


@dataclass(frozen=True, eq=False)
class Graph:
    """A captured model.

    `module` runs it: the model's own inputs and outputs, in eval mode, without Python of the model's.
    `inputs` and `outputs` are tensors without their batch; `how` says what captured it.
    `why_fixed_batch` is None where the batch is dynamic, else what forbids that; `example` is a batch that it takes.
    """

    module: fx.GraphModule
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    how: How
    why_fixed_batch: str | None
    example: tuple[Tensor, ...] = field(repr=False)
    facts: dict[str, Fact] = field(repr=False)
    macs: dict[str, int] = field(repr=False)
    more_cuts: tuple[Cut, ...] = ()

    @property
    def num_macs(self) -> int:
        """Multiply-accumulates of one sample: convolutions, linear maps, matrix products, attention."""
        return sum(self.macs.values())

    @cached_property
    def roles(self) -> Roles:
        """What each node is: see `Roles`."""
        return find_roles(self.module.graph, self.facts)

    @cached_property
    def _cuts(self) -> tuple[Cut, ...]:
        return (*_enumerate(self), *self.more_cuts)

    def cuts(self) -> tuple[Cut, ...]:
        """Every cut, in the order in which the model runs; behind them those that `with_cuts` added."""
        return self._cuts

    def cut_of(self, on_device: Collection[str]) -> Cut:
        """The cut behind just these compute nodes, be they a prefix or not.

        One that no prefix has is named by its crossing values: `inception.b1#0 + inception.b2.0#0`.

        Args:
            on_device: names of compute nodes (`roles.compute`).

        Raises:
            CutError: a node of the device needs one that is not, nothing is left for one side, or a value that cannot
                cross would have to; names it.
        """
        return cut_behind(self, on_device)

    def with_cuts(self, cuts: Sequence[Cut]) -> Graph:
        """The same graph with more cuts, such as those of `cut_of`; those that it has already are left out."""
        known = {cut.specs for cut in self.cuts()}
        fresh = {cut.specs: cut for cut in cuts if cut.specs not in known}
        return dataclasses.replace(self, more_cuts=(*self.more_cuts, *fresh.values()))

    def cut(self, name: str) -> Cut:
        """The cut of that name, or with that alias.

        Raises:
            CutError: there is none; names the nearest.
        """
        known: dict[str, Cut] = {}
        for cut in self.cuts():
            for text in (cut.name, *cut.aliases):
                known.setdefault(text, cut)
        if name in known:
            return known[name]
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.0)
        raise CutError(f'no cut "{name}" among {len(self.cuts())} cuts; the nearest: {", ".join(near) or "none"}')


@dataclass(frozen=True)
class Roles:
    """Compute nodes in order; nodes that pass on a value (with it); nodes that follow from no input's data."""

    compute: tuple[fx.Node, ...]
    same: dict[fx.Node, fx.Node]
    free: frozenset[fx.Node]


def capture(model: nn.Module, example: Tensor | Sequence[Tensor]) -> Graph:
    """The graph of `model` for inputs like `example`, its batch dynamic wherever the model allows it.

    Args:
        model: any module; it is copied, put into eval mode and left as it was.
        example: one input or several, each with a leading batch dimension.

    Raises:
        CaptureError: the model does not run on the example, or does something that a graph cannot hold, such as
            an `if` on data; names the line and module, or the node.
    """
    given = (example,) if isinstance(example, Tensor) else tuple(example)
    for k, x in enumerate(given):
        if x.ndim == 0 or x.shape[0] == 0:
            raise CaptureError(f"input {k} must have a leading batch of at least 1, got shape {tuple(x.shape)}")
    try:
        copied = copy.deepcopy(model).eval()
    except TRACE_ERRORS as error:
        # Such as tensors that a forward pass left in a module, as torch.nn.utils.weight_norm does.
        raise CaptureError(f"{type(model).__name__} cannot be copied: {first_line(error)}") from error
    batches = {size: tuple(_batch_of(x, size) for x in given) for size in (1, 2, _MANY)}
    dynamic, output = _run(copied, batches[2], batches[1])
    traced = trace(copied, batches[2 if dynamic else 1], output, dynamic=dynamic)
    sizes = (1, _MANY) if traced.why_fixed_batch is None else (1, 1)
    name = type(model).__name__
    one, many = (_checked(copied, traced.module, batches[size], name) for size in sizes)
    module = settle_numbers(traced.module, one, many, sizes)
    macs = {n.name: macs_of(n, module, one) for n in module.graph.nodes if n.name in one}
    one, many = (record(module, batches[size])[0] for size in sizes)
    facts = facts_of(one, many, sizes)
    return Graph(
        module=module,
        inputs=tuple(_spec(n, facts, name) for n in module.graph.find_nodes(op="placeholder")),
        outputs=tuple(_spec(n, facts, name) for n in output_nodes(module.graph) if facts[n.name].shape is not None),
        how=traced.how,
        why_fixed_batch=traced.why_fixed_batch,
        example=batches[sizes[1]],
        facts=facts,
        macs=macs,
    )


def output_nodes(graph: fx.Graph) -> list[fx.Node]:
    """The values the model returns, in order, as often as it returns them."""
    (end,) = graph.find_nodes(op="output")
    nodes: list[fx.Node] = []
    fx.node.map_arg(end.args, lambda n: nodes.append(n) or n)  # type: ignore[func-returns-value]
    return nodes


def _batch_of(x: Tensor, size: int) -> Tensor:
    """`size` samples like those of `x`, with noise from a fixed seed on floats, so that samples differ."""
    repeated = x.detach().cpu().repeat(-(-size // x.shape[0]), *[1] * (x.ndim - 1))[:size]
    if not x.is_floating_point():
        return repeated
    generator = torch.Generator().manual_seed(0)
    return repeated + torch.randn(repeated.shape, generator=generator, dtype=x.dtype)


@torch.no_grad()
def _run(model: nn.Module, batch: Sequence[Tensor], one: Sequence[Tensor]) -> tuple[bool, object]:
    """Does the model take a batch of 2, and its own output for that or, where it does not, for 1."""
    try:
        return True, model(*batch)
    except TRACE_ERRORS as error:
        first = error
    try:
        return False, model(*one)
    except TRACE_ERRORS:
        shapes = ", ".join(str(tuple(x.shape)) for x in one)
        name = type(model).__name__
        raise CaptureError(f"{name} does not run on an input of {shapes}: {first_line(first)}") from first


def _checked(model: nn.Module, module: fx.GraphModule, inputs: Sequence[Tensor], name: str) -> dict[str, object]:
    """What `record` gives, after a comparison of the captured module's outputs with the model's."""
    with torch.no_grad():
        wanted = model(*inputs)
    seen, output = record(module, inputs)
    nodes = output_nodes(module.graph)
    for node, want, got in zip(nodes, tensors_in(wanted), tensors_in(output), strict=False):
        # What is no number says nothing of the scale, and must be none in both.
        scale = float(want.nan_to_num(posinf=0.0, neginf=0.0).abs().max()) if want.numel() else 0.0
        if want.shape != got.shape or not torch.allclose(want, got, rtol=0.0, atol=TOLERANCE * scale, equal_nan=True):
            raise CaptureError(
                f'the captured {name} gives another output "{node.name}" than the model for a batch of '
                f"{inputs[0].shape[0]}: it depends on something that a graph does not hold, such as random numbers"
            )
    return seen


def tensors_in(structure: object) -> Iterator[Tensor]:
    """The tensors of nested tuples, lists and dicts, in order."""
    if isinstance(structure, Tensor):
        yield structure
    elif isinstance(structure, tuple | list):
        for part in structure:
            yield from tensors_in(part)
    elif isinstance(structure, dict):
        for part in structure.values():
            yield from tensors_in(part)


def first_of(given: object) -> Tensor:
    """The first tensor of what a module gives: a head gives a tuple, a network perhaps a dict of several."""
    return next(tensors_in(given))


def _spec(node: fx.Node, facts: dict[str, Fact], model: str) -> TensorSpec:
    fact = facts[node.name]
    if fact.shape is None or not fact.has_batch:
        raise CaptureError(
            f'"{node.name}" of {model} has no leading batch dimension: inputs and outputs must be tensors with one'
        )
    return TensorSpec(name=node.name, shape=fact.shape, dtype=fact.dtype)


def find_roles(graph: fx.Graph, facts: dict[str, Fact]) -> Roles:
    """Tell the nodes that compute from those that are done again wherever they are needed."""
    free: set[fx.Node] = set()
    same: dict[fx.Node, fx.Node] = {}
    compute: list[fx.Node] = []
    for node in graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr" or is_batch_size(node):
            free.add(node)
        elif all(n in free for n in node.all_input_nodes):
            free.add(node)
        elif _passes_on(node, facts, graph.owning_module):
            source = node.all_input_nodes[0]
            same[node] = same.get(source, source)
        else:
            compute.append(node)
    return Roles(tuple(compute), same, frozenset(free))


def _passes_on(node: fx.Node, facts: dict[str, Fact], module: nn.Module | None) -> bool:
    """Is the node's value its first input's, bit for bit, in eval mode?"""
    if node.op == "call_module" and module is not None:
        kinds = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
        return isinstance(module.get_submodule(str(node.target)), kinds)
    op = op_of(node)
    if op in ("dropout", "feature_dropout", "alpha_dropout", "dropout2d", "alias", "detach"):
        return len(node.all_input_nodes) == 1
    if op == "slice" and len(node.all_input_nodes) == 1:
        start, end, step = (*node.args[2:5], None, None, None)[:3]
        return start in (0, None) and end in (None, sys.maxsize) and step in (1, None)
    return False


def _enumerate(graph: Graph) -> Iterator[Cut]:
    roles, facts = graph.roles, graph.facts
    place = {node: k for k, node in enumerate(roles.compute)}
    inputs = graph.module.graph.find_nodes(op="placeholder")
    last = {value: _last_use(value, place, roles) for value in (*inputs, *roles.compute)}
    names = name_values([n for n in roles.compute if facts[n.name].shape is not None], roles.same)
    seen: set[tuple[fx.Node, ...]] = set()
    done = 0
    alive: list[fx.Node] = list(inputs)
    for k, node in enumerate(roles.compute):
        done += graph.macs.get(node.name, 0)
        alive = [value for value in (*alive, node) if last[value] > k]
        crossing = tuple(alive)
        only_inputs = all(value.op == "placeholder" for value in crossing)
        if only_inputs or k == len(place) - 1 or crossing in seen or not all(facts[v.name].has_batch for v in crossing):
            continue
        seen.add(crossing)
        name, aliases = names[node]
        yield Cut(
            name=name,
            specs=tuple(_sample_spec(v, facts) for v in crossing),
            compute_share=done / graph.num_macs if graph.num_macs else 0.0,
            aliases=aliases,
        )


def cut_behind(graph: Graph, on_device: Collection[str]) -> Cut:
    """See `Graph.cut_of`."""
    roles, facts = graph.roles, graph.facts
    unknown = set(on_device) - {node.name for node in roles.compute}
    if unknown:
        raise CutError(f'"{min(unknown)}" is no compute node of this graph')
    here = {node for node in roles.compute if node.name in on_device}
    for node in roles.compute:
        for source in node.all_input_nodes if node in here else ():
            made = roles.same.get(source, source)
            if made.op != "placeholder" and made not in roles.free and made not in here:
                raise CutError(f'"{node.name}" on the device needs "{made.name}" of the edge: nothing comes back')
    inputs = graph.module.graph.find_nodes(op="placeholder")
    crossing = [value for value in (*inputs, *roles.compute) if _crosses(value, here, roles)]
    if not crossing or all(value.op == "placeholder" for value in crossing) or len(here) == len(roles.compute):
        raise CutError("a cut leaves something to compute on either side")
    for value in crossing:
        if not facts[value.name].has_batch:
            raise CutError(f'"{value.name}" would have to cross and cannot: it is no tensor with a leading batch')
    specs = tuple(_sample_spec(value, facts) for value in crossing)
    known = next((cut for cut in graph.cuts() if cut.specs == specs), None)
    if known is not None:
        return known
    names = name_values([node for node in roles.compute if facts[node.name].shape is not None], roles.same)
    parts = [value.name if value.op == "placeholder" else names[value][0] for value in crossing]
    done = sum(graph.macs.get(node.name, 0) for node in here)
    return Cut(name=SEVERAL.join(parts), specs=specs, compute_share=done / graph.num_macs if graph.num_macs else 0.0)


def _crosses(value: fx.Node, here: set[fx.Node], roles: Roles) -> bool:
    """Whether a value made on the device, or given, is used on the edge, also through nodes that pass it on."""
    if value.op != "placeholder" and value not in here:
        return False
    users = list(value.users)
    while users:
        user = users.pop()
        if user in roles.same:
            users += user.users
        elif user.op == "output" or (user in roles.compute and user not in here):
            return True
    return False


def _sample_spec(node: fx.Node, facts: dict[str, Fact]) -> TensorSpec:
    fact = facts[node.name]
    assert fact.shape is not None
    return TensorSpec(name=node.name, shape=fact.shape, dtype=fact.dtype)


def _last_use(value: fx.Node, place: dict[fx.Node, int], roles: Roles) -> int:
    """The place of the last compute node that uses the value, also through nodes that pass it on; -1: none."""
    last = -1
    for user in value.users:
        if user in roles.same:
            last = max(last, _last_use(user, place, roles))
        else:
            last = max(last, len(place) if user.op == "output" else place.get(user, -1))
    return last
