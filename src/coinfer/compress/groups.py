"""Which channels of a network go together, as Torch-Pruning finds them (Fang et al., 2023, arXiv:2301.12900).

    traced(module, example)      its graph, from a trace of the network's gradients
    group_of(layer, ...)         everything that goes with one layer's outputs
    heads_of(name, layer)        the heads of an attention of the known form: `num_heads`, one linear layer `qkv` and
                                 one behind it, `out` or `proj`
    take_out(...)                removes them, in place
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
import torch_pruning
from torch import Tensor, nn

from ..errors import ModelError
from ..model.graph import tensors_in
from ..model.nets_resnet import PadShortcut
from ..model.trace import TRACE_ERRORS, first_line

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear, *TRANSPOSED)
# Those that scale each channel alone.
NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


class Part(NamedTuple):
    """A layer's share in a group: its channel `places[i]` belongs to the group's channel `roots[i]`."""

    name: str
    places: Tensor
    roots: Tensor


class Group(NamedTuple):
    """Channels that go together; `makers` give them (norms behind a layer among these), `readers` take them in."""

    name: str
    kind: Literal["channels", "heads"]
    size: int
    makers: tuple[Part, ...]
    readers: tuple[Part, ...]


def traced(
    module: nn.Module, example: tuple[Tensor, ...], *, ignore: Sequence[str] = ()
) -> torch_pruning.DependencyGraph:
    """What depends on what in a module, called with `example`.

    Where the trace fails, it is taken anew without the modules whose names fit a pattern of `ignore`.

    Raises:
        ModelError: it cannot be traced (names the layer that ran last).
    """
    named = {name: layer for name, layer in module.named_modules() if name}
    running: list[str] = []
    offer = ""
    hooks = [layer.register_forward_pre_hook(partial(_enter, running, name)) for name, layer in named.items()]
    # What is frozen has channels as well.
    frozen = [weight for weight in module.parameters() if weight.is_floating_point() and not weight.requires_grad]
    try:
        # What fails here is not the trace's own.
        with torch.no_grad():
            module(*example)
        running.clear()
        offer = "; a module that this is about may be left out by ignore"
        for weight in frozen:
            weight.requires_grad_(True)
        try:
            return _built(module, example)
        except TRACE_ERRORS:
            left_out = [layer for name, layer in named.items() if fits(name, ignore)]
            if not left_out:
                raise
            running.clear()
            with _without_gradients(left_out):
                return _built(module, example)
    except TRACE_ERRORS as error:
        where = f' (last in "{running[-1]}")' if running else ""
        raise ModelError(
            f"the channels of {type(module).__name__} cannot be traced: {first_line(error)}{where}{offer}"
        ) from error
    finally:
        for weight in frozen:
            weight.requires_grad_(False)
        for hook in hooks:
            hook.remove()


def fits(name: str, patterns: Sequence[str]) -> bool:
    """Whether a layer's name fits one of these shell patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _built(module: nn.Module, example: tuple[Tensor, ...]) -> torch_pruning.DependencyGraph:
    graph = torch_pruning.DependencyGraph()
    noting = module.register_forward_hook(_check_gradients)
    try:
        # Parameters outside of layers are said to be pruned along their last axis; the check finds out.
        with torch.enable_grad():
            graph.build_dependency(
                module, example, forward_fn=lambda network, inputs: network(*inputs), verbose=False,
                customized_pruners={PadShortcut: _PadPruner()},
            )  # fmt: skip
    finally:
        noting.remove()
    _bounded(graph)
    return graph


def _check_gradients(module: nn.Module, given: object, output: object) -> None:
    if not any(value.requires_grad for value in tensors_in(output)):
        why = "no gradient leads from its outputs to its weights, as under torch.no_grad()"
        raise ModelError(f"the channels of {type(module).__name__} cannot be traced: {why}")


@contextmanager
def _without_gradients(layers: Sequence[nn.Module]) -> Iterator[None]:
    """These compute as if nothing had made their outputs."""
    before = [vars(layer).get("forward") for layer in layers]
    for layer in layers:
        vars(layer)["forward"] = torch.no_grad()(layer.forward)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            del vars(layer)["forward"]
            if own is not None:
                vars(layer)["forward"] = own


def _bounded(graph: torch_pruning.DependencyGraph) -> None:
    """Mend what Torch-Pruning makes of slices that are counted from the end, and keep all pieces within their bounds.

    A piece that is broadcast (`x * x[:, -1:]`) is followed as if it were whole, from one place to the next without end.
    """
    for op, node in graph.module2node.items():
        if isinstance(op, torch_pruning.ops._SliceOp):
            size = op.grad_fn._saved_self_sym_sizes[op.dim] if op.dim < 2**63 else None
            # Autograd keeps both as unsigned numbers.
            op.start, op.end = (value - 2**64 if value >= 2**63 else value for value in (op.start, op.end))
            if size is not None:
                op.start, op.end = (min(max(v + size if v < 0 else v, 0), size) for v in (op.start, op.end))
        for dependency in node.dependencies:
            dependency.index_mapping = _Mappings(dependency.index_mapping)


class _Mappings(list[Any]):
    """The index mappings of a dependency, which Torch-Pruning exchanges as it goes; each is kept within its bounds."""

    def __setitem__(self, place: Any, mapping: Any) -> None:
        super().__setitem__(place, None if mapping is None else partial(_mapped, mapping))


def _mapped(mapping: Callable[[list[Any]], list[Any]], places: list[Any]) -> list[Any]:
    """What a mapping makes of places of a piece or of the whole.

    Raises:
        IndexError: the piece has no such place.
    """
    width, kind = None, type(mapping).__name__
    if kind == "_SliceIndexMapping" and mapping.reverse:  # type: ignore[attr-defined]
        width = -(-(mapping.end - mapping.start) // mapping.step)  # type: ignore[attr-defined]
    elif (kind == "_SplitIndexMapping" and mapping.reverse) or (  # type: ignore[attr-defined]
        kind == "_ConcatIndexMapping" and not mapping.reverse  # type: ignore[attr-defined]
    ):
        width = mapping.offset[1] - mapping.offset[0]  # type: ignore[attr-defined]
    if width is not None and any(place.idx >= width for place in places):
        raise IndexError(f"a piece of {width} channels is read as if it had more")
    return mapping(places)


def _enter(running: list[str], name: str, *given: object) -> None:
    """Note which module runs."""
    running.append(name)


class _PadPruner(torch_pruning.BasePruningFunc):  # type: ignore[misc]
    """Tells Torch-Pruning that a padded shortcut's inputs and outputs can go one without the other."""

    def prune_out_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.take_out(idxs, axis=0)
        return layer

    def prune_in_channels(self, layer: PadShortcut, idxs: Sequence[int]) -> nn.Module:
        layer.take_out(idxs, axis=1)
        return layer

    def get_out_channels(self, layer: PadShortcut) -> int:
        return layer.out_channels

    def get_in_channels(self, layer: PadShortcut) -> int:
        return layer.in_channels


def group_of(
    layer: nn.Module, names: Mapping[nn.Module, str], graph: torch_pruning.DependencyGraph
) -> tuple[set[str], Group | None]:
    """The layers whose outputs go with those of `layer`, and the group as the first of them counts it; None: has none.

    Raises:
        ModelError: a layer takes part that is not known to be counted right (names it).
    """
    members = [
        member.dep.target.module
        for member in _members(layer, graph)
        if graph.is_out_channel_pruning_fn(member.dep.handler)
    ]
    made = {names[member] for member in members if member in names}
    full = [member for member in members if isinstance(member, LAYERS) and not _is_depthwise(member)]
    if not full:
        return made, None
    order = {name: place for place, name in enumerate(names.values())}
    first = min(full, key=lambda member: order[names[member]])
    makers: list[Part] = []
    readers: list[Part] = []
    for member in _members(first, graph):
        taken, is_maker = member.dep.target.module, graph.is_out_channel_pruning_fn(member.dep.handler)
        if not isinstance(taken, (*LAYERS, *NORMS, PadShortcut)):
            if taken in names and not is_maker and next(taken.parameters(), None) is not None:
                raise ModelError(f'"{names[taken]}" reads them, a {type(taken).__name__}')
            continue
        if isinstance(taken, TRANSPOSED) and taken.groups > 1:
            raise ModelError(f'"{names[taken]}" is a transposed convolution in groups')
        part = Part(names[taken], torch.tensor(member.idxs), torch.tensor(member.root_idxs))
        (makers if is_maker else readers).append(part)
    return made, Group(names[first], "channels", graph.get_out_channels(first), tuple(makers), tuple(readers))


def _members(layer: nn.Module, graph: torch_pruning.DependencyGraph) -> torch_pruning.Group:
    """What goes with all outputs of a layer."""
    prune = graph.get_pruner_of_module(layer).prune_out_channels
    return graph.get_pruning_group(layer, prune, list(range(graph.get_out_channels(layer))))


def _is_depthwise(layer: nn.Module) -> bool:
    if not isinstance(layer, nn.modules.conv._ConvNd) or layer.transposed:
        return False
    return layer.groups == layer.out_channels > 1


def heads_of(name: str, layer: nn.Module) -> Group | None:
    """The heads of an attention of the known form."""
    count, qkv = getattr(layer, "num_heads", None), getattr(layer, "qkv", None)
    behind = next((part for part in ("out", "proj") if isinstance(getattr(layer, part, None), nn.Linear)), None)
    if not isinstance(count, int) or not isinstance(qkv, nn.Linear) or behind is None:
        return None
    width = qkv.out_features // 3
    if qkv.out_features % 3 or width % count or layer.get_submodule(behind).in_features != width:
        return None
    roots = torch.arange(count).repeat_interleave(width // count)
    prefix = f"{name}." if name else ""
    maker = Part(f"{prefix}qkv", torch.arange(3 * width), roots.repeat(3))
    return Group(name, "heads", count, (maker,), (Part(f"{prefix}{behind}", torch.arange(width), roots),))


def take_out(
    module: nn.Module, graph: torch_pruning.DependencyGraph, chosen: Sequence[tuple[Group, Sequence[int]]]
) -> None:
    """Remove these places of each group from a module that `graph` is of; what is frozen stays so."""
    frozen = {name for name, weight in module.named_parameters() if not weight.requires_grad}
    for group, places in chosen:
        if not places:
            continue
        if group.kind == "heads":
            _take_out_heads(module, group, places)
            continue
        layer = module.get_submodule(group.name)
        pruner = graph.get_pruner_of_module(layer)
        graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(places)).prune(record_history=False)
    for name, weight in module.named_parameters():
        weight.requires_grad_(name not in frozen)


@torch.no_grad()
def _take_out_heads(module: nn.Module, group: Group, places: Sequence[int]) -> None:
    for part, axis in ((group.makers[0], 0), (group.readers[0], 1)):
        layer = module.get_submodule(part.name)
        assert isinstance(layer, nn.Linear)
        stay = part.places[~is_gone(part, places)].to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.index_select(axis, stay))
        if axis == 0:
            layer.out_features = len(stay)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[stay])
        else:
            layer.in_features = len(stay)
    attention = module.get_submodule(group.name)
    attention.num_heads = group.size - len(places)  # type: ignore[assignment]


def is_gone(part: Part, places: Sequence[int]) -> Tensor:
    """(len(part.places),) bool: which of a layer's places go with these of the group."""
    return torch.isin(part.roots, torch.tensor(places, dtype=part.roots.dtype))


def outputs_first(layer: nn.Module) -> Tensor | None:
    """A layer's weight with its outputs on the first axis, as a view: they are the second of a transposed convolution.

    None: a norm without one.
    """
    weight = layer.weight
    if not isinstance(weight, Tensor):
        return None
    return weight.transpose(0, 1) if isinstance(layer, TRANSPOSED) else weight
