"""From an nn.Module to a plain fx graph: torch.export first, torch.fx where that fails.

Whatever was used, what comes back has one form, so that the rest of `model` need not know:

    placeholders (the inputs) -> get_attr (parameters, constants) and calls -> output (the model's own structure)

without guards, without writes into tensors (`add_` becomes `add`), without nodes that nothing uses, and with
one node alone that asks for the batch size, `sym_size(first input, 0)`.  Each node keeps its module stack.
"""

from __future__ import annotations

import inspect
import io
import logging
import operator
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..errors import CaptureError

How = Literal["export", "fx"]
BATCH_NODE = "batch_size"
# What torch.export and torch.fx raise for a model they cannot follow; their own types derive from these.
TRACE_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, AttributeError, LookupError, NameError)
STACK = "nn_module_stack"
_HERE = str(Path(__file__).parent)
_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True)
class Traced:
    """A plain graph, how it was made, and why its batch is fixed (None: it is dynamic)."""

    module: fx.GraphModule
    how: How
    why_fixed_batch: str | None


def trace(model: nn.Module, inputs: Sequence[Tensor], output: object, *, dynamic: bool) -> Traced:
    """The plain graph of `model`, which is in eval mode and already a copy.

    Args:
        model: the module; its activations are told not to write in place.
        inputs: example inputs, with a batch of 2 or more where `dynamic`.
        output: what the model gives for them: only its structure is used.
        dynamic: try to leave the size of the batch open.

    Raises:
        CaptureError: neither way could follow the model; names the line and the module.
    """
    for module in model.modules():
        if getattr(module, "inplace", False) is True:
            setattr(module, "inplace", False)  # noqa: B010  (mypy knows no such attribute)
    if not dynamic:
        return Traced(_fixed(model, inputs, output), "export", "the model takes one batch size alone")
    try:
        return Traced(_by_export(model, inputs, output, dynamic=True), "export", None)
    except TRACE_ERRORS as error:
        why = _where(model, error)
    try:
        return Traced(_by_fx(model, inputs), "fx", None)
    except TRACE_ERRORS:
        pass
    return Traced(_fixed(model, [x[:1] for x in inputs], output), "export", why)


def _fixed(model: nn.Module, inputs: Sequence[Tensor], output: object) -> fx.GraphModule:
    try:
        return _by_export(model, inputs, output, dynamic=False)
    except TRACE_ERRORS as error:
        raise CaptureError(f"cannot capture {type(model).__name__}: {_where(model, error)}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what torch logs and prints while it exports off the terminal: what matters is in its exceptions."""
    disabled = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(disabled)


def first_line(error: BaseException) -> str:
    """The first line of a foreign error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def _where(model: nn.Module, error: BaseException) -> str:
    """`line 12 of net.py, "if x.sum() > 0:", in module "block.1": what torch said`, in one line."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    tb = error.__traceback__
    while tb is not None:
        code, held = tb.tb_frame.f_code, tb.tb_frame.f_locals
        file = code.co_filename
        owner = held.get(code.co_varnames[0]) if code.co_varnames else None
        if isinstance(owner, nn.Module) and id(owner) in names and not file.startswith((_TORCH, _HERE)):
            (summary,) = traceback.extract_tb(tb, limit=1)
            found = f'line {tb.tb_lineno} of {Path(file).name}, "{summary.line}", in module "{names[id(owner)]}": '
        tb = tb.tb_next
    return found + first_line(error)


def _by_export(model: nn.Module, inputs: Sequence[Tensor], output: object, *, dynamic: bool) -> fx.GraphModule:
    names = list(inspect.signature(model.forward).parameters)
    shape = {0: torch.export.Dim.DYNAMIC} if dynamic else None
    variadic = any(p.kind is p.VAR_POSITIONAL for p in inspect.signature(model.forward).parameters.values())
    if variadic:
        dynamic_shapes: Any = (tuple(shape for _ in inputs),)
    else:
        dynamic_shapes = {name: shape for name, _ in zip(names, inputs, strict=False)}
    with quiet():
        program = torch.export.export(model, tuple(inputs), dynamic_shapes=dynamic_shapes)
    if _writes_into_views(program.graph):
        program = decompose(program)
    module = program.module()
    assert isinstance(module, fx.GraphModule)
    (end,) = module.graph.find_nodes(op="output")
    leaves = iter(end.args[0] if isinstance(end.args[0], tuple | list) else (end.args[0],))
    structure = _fill(output, leaves)
    return _plain(module, structure)


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with every write into a tensor made a new value."""
    share_call_specs(program)
    functional: torch.export.ExportedProgram = program.run_decompositions({})
    return functional


class _SharedEntry:
    """A module call entry that a deepcopy shares: copying torch's own tree specs warns of their own deprecation."""

    def __init__(self, entry: torch.export.ModuleCallEntry) -> None:
        self.fqn = entry.fqn
        self.signature = entry.signature

    def __deepcopy__(self, memo: dict[int, object]) -> _SharedEntry:
        return self


def share_call_specs(program: torch.export.ExportedProgram) -> None:
    """Keep of the program's call entries the root's alone, and let copies share it (specs are never changed)."""
    entries: list[Any] = program.module_call_graph
    entries[:] = [_SharedEntry(entry) for entry in entries if entry.fqn == ""]


def _fill(structure: object, leaves: Any) -> Any:
    """`structure` with its leaves, in torch's pytree order, replaced by the next of `leaves`."""
    if isinstance(structure, tuple) and hasattr(structure, "_fields"):
        return type(structure)(*(_fill(part, leaves) for part in structure))
    if isinstance(structure, tuple | list):
        return type(structure)(_fill(part, leaves) for part in structure)
    if isinstance(structure, dict):
        return {key: _fill(part, leaves) for key, part in structure.items()}
    return next(leaves)


def _by_fx(model: nn.Module, inputs: Sequence[Tensor]) -> fx.GraphModule:
    parameters = list(inspect.signature(model.forward).parameters.values())
    rest = {p.name: p.default for p in parameters[len(inputs) :] if p.default is not p.empty}
    module = fx.symbolic_trace(model, concrete_args=rest or None)
    graph = module.graph
    holders = graph.find_nodes(op="placeholder")
    for holder in holders[len(inputs) :]:
        if not holder.users:
            graph.erase_node(holder)
    for node in graph.nodes:
        if node.op == "call_function" and node.kwargs.get("inplace") is True:
            node.kwargs = {**node.kwargs, "inplace": False}
    (end,) = graph.find_nodes(op="output")
    return _plain(module, end.args[0])


def _plain(module: fx.GraphModule, structure: Any) -> fx.GraphModule:
    """A module with what `structure` (of the module's own nodes) needs, in order, and nothing else."""
    (end,) = module.graph.find_nodes(op="output")
    end.args = (structure,)
    _functionalise(module.graph)
    return keep_needed(module)


def keep_needed(module: fx.GraphModule) -> fx.GraphModule:
    """A copy of the module (sharing its tensors) with its inputs and the nodes that its output needs."""
    (end,) = module.graph.find_nodes(op="output")
    wanted = ancestors(end)
    graph = fx.Graph()
    new: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            new[node] = graph.node_copy(node, lambda n: new[n])
            new[node].meta = {key: node.meta[key] for key in (STACK, BATCH_NODE) if key in node.meta}
    graph.output(fx.node.map_arg(end.args[0], lambda n: new[n]))
    return fx.GraphModule(module, graph, class_name="Plain").eval()


def ancestors(end: fx.Node) -> set[fx.Node]:
    """Every node that `end` depends on."""
    seen: set[fx.Node] = set()
    stack = [end]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def _is_view(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def _writes_into_views(graph: fx.Graph) -> bool:
    """Does a node write into a tensor that shares its memory with another value?"""
    for node in graph.nodes:
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            written = node.args[0]
            if not target._schema.name.endswith("_") or not isinstance(written, fx.Node):
                return True
            if _is_view(written) or any(_is_view(user) for user in written.users if user < node):
                return True
    return False


_FX_WRITES = {"iadd": "add", "imul": "mul", "isub": "sub", "itruediv": "truediv"}


def _functionalise(graph: fx.Graph) -> None:
    """Turn `add_` into `add`, and let later nodes use the new value where they used the written one."""
    for node in list(graph.nodes):
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable:
            packet = getattr(torch.ops.aten, target._schema.name.split("::")[1].removesuffix("_"))
            node.target = getattr(packet, target._overloadname)
        elif node.op == "call_method" and str(target).endswith("_") and not str(target).endswith("__"):
            node.target = str(target).removesuffix("_")
        elif node.op == "call_function" and getattr(target, "__name__", "") in _FX_WRITES:
            node.target = getattr(operator, _FX_WRITES[target.__name__])
        else:
            continue
        written = node.args[0]
        if isinstance(written, fx.Node):
            for user in list(written.users):
                if user is not node and node < user:
                    user.replace_input_with(written, node)
