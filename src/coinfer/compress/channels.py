"""Channels and attention heads that can be removed from a network, and their removal.

    Channels(module, example)    .groups    what can go: a group's channels are made and read in several layers at once
                                 .refused   what cannot, by the name of a layer, with the reason
                                 .masked    a copy that has them all, the chosen ones made zero
                                 .remove    takes the chosen ones out, in place: smaller weights, less compute

Which layers belong together is found by Torch-Pruning (Fang et al., 2023, arXiv:2301.12900), from a trace of the
network's gradients.  It is not believed: with some of a group's channels removed the network must give what it gives
with the same channels masked to zero, up to the order of sums, or the group is refused.  So fall the classes of a
classifier, sums whose shortcut is padded, streams that a layer norm averages over, and whatever a module does with a
number of channels of its own; each is named.

Heads are groups of their own: of modules with `num_heads`, one linear layer `qkv` and one behind it, `out` or `proj`.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch_pruning
from torch import Tensor, nn

from ..errors import ModelError
from ..model.graph import tensors_in
from ..model.nets_resnet import PadShortcut
from ..model.trace import TRACE_ERRORS, first_line
from ..plan import Value

LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
# Relative to the largest output, of what is masked against what is removed.
TOLERANCE = 1e-4


class Removal(Value, frozen=True, kw_only=True):
    """Channels (or heads) of one group, by their places before this removal."""

    group: str
    places: tuple[int, ...]


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


class Channels:
    """The removable channels of `module`, which `remove` changes in place.

    Args:
        module: in evaluation mode.
        example: what it is called with; a batch of 1 will do.
        region: shell patterns of layers' names: a group is kept whose makers all fit one of them.
        ignore: patterns of layers that stay as they are: a group with one of them as a maker is left out.
        sound: names of groups that were found sound before: these alone, and they are not checked again.

    Raises:
        ModelError: the module cannot be traced, or nothing in the region can be removed (names what was refused).
    """

    def __init__(
        self,
        module: nn.Module,
        example: Sequence[Tensor],
        *,
        region: Sequence[str] = ("*",),
        ignore: Sequence[str] = (),
        sound: Collection[str] | None = None,
    ) -> None:
        self.module, self._example = module, tuple(example)
        self._region, self._ignore, self.refused = tuple(region), tuple(ignore), dict[str, str]()
        self._trace()
        self.groups = tuple(group for group in self._found() if self._fits(group))
        if sound is None:
            self._refuse_unsound()
        else:
            self.groups = tuple(group for group in self.groups if group.name in sound)
        if not self.groups:
            why = "".join(f'; "{name}": {reason}' for name, reason in self.refused.items())
            left_out = f" without {list(ignore)}" if ignore else ""
            raise ModelError(f"no channel can be removed in the region {list(region)}{left_out}{why}")

    def group(self, name: str) -> Group:
        """The group of that name.

        Raises:
            ModelError: there is none, or it was refused.
        """
        for group in self.groups:
            if group.name == name:
                return group
        why = self.refused.get(name, f"the groups are {', '.join(group.name for group in self.groups)}")
        raise ModelError(f'"{name}" is no group of channels that can be removed: {why}')

    @torch.no_grad()
    def masked(self, removals: Sequence[Removal]) -> nn.Module:
        """A copy of the module with the weights that make these channels set to zero."""
        module = copy.deepcopy(self.module)
        for removal in removals:
            self._check(removal)
            group = self.group(removal.group)
            for part in group.makers:
                _zero(module, part, removal.places)
            if group.kind == "heads":
                for part in group.readers:
                    weight = module.get_submodule(part.name).weight
                    assert isinstance(weight, Tensor)
                    weight[:, part.places[_is_gone(part, removal.places)]] = 0
        return module

    def remove(self, removals: Sequence[Removal]) -> None:
        """Take these channels out, all of them counted before; groups and parts are found anew.

        Raises:
            ModelError: no such group, a place it does not have, or all of a group's channels.
        """
        for removal in removals:
            self._check(removal)
        _take_out(self.module, self._graph, [(self.group(r.group), r.places) for r in removals])
        kept = {group.name for group in self.groups}
        self._trace()
        self.groups = tuple(group for group in self._found() if group.name in kept)

    def _check(self, removal: Removal) -> None:
        size = self.group(removal.group).size
        places = set(removal.places)
        if not places <= set(range(size)) or len(places) != len(removal.places):
            raise ModelError(f'group "{removal.group}" has places 0 to {size - 1}, each once, got {removal.places}')
        if len(places) == size:
            raise ModelError(f'all {size} channels of "{removal.group}" would go: at least one must stay')

    def _trace(self) -> None:
        self._graph = _traced(self.module, self._example)

    def _found(self) -> list[Group]:
        """Every group of the network as it is now."""
        names = {layer: name for name, layer in self.module.named_modules()}
        heads = [group for name, layer in self.module.named_modules() if (group := _heads(name, layer)) is not None]
        taken = {part.name for group in heads for part in group.makers}
        found = []
        for item in self._graph.get_all_groups(root_module_types=LAYERS):
            group = _group_of(item, names, self._graph)
            if group is None:
                # Such as a depthwise convolution of the picture itself.
                made = next(names[member.dep.target.module] for member in item)
                self.refused[made] = "no layer makes its channels: they are the input's own"
            elif group.name not in taken:
                found.append(group)
        return [*found, *heads]

    def _fits(self, group: Group) -> bool:
        names = [part.name for part in group.makers]
        return all(_fits(name, self._region) for name in names) and not any(_fits(name, self._ignore) for name in names)

    def _refuse_unsound(self) -> None:
        """Keep the groups that can be removed: all at once where that goes well, else by halves."""
        sound: list[Group] = []
        waiting = [list(self.groups)]
        while waiting:
            some = waiting.pop()
            if not some:
                continue
            why = self._why_unsound(some)
            if why is None:
                sound += some
            elif len(some) == 1:
                self.refused[some[0].name] = why
            else:
                middle = len(some) // 2
                waiting += [some[:middle], some[middle:]]
        names = {group.name for group in sound}
        self.groups = tuple(group for group in self.groups if group.name in names)

    @torch.no_grad()
    def _why_unsound(self, groups: Sequence[Group]) -> str | None:
        """Why the network without some channels of each group is not what it is with them masked; None: it is.

        Tried without the first of each, which leaves parts of a group uneven, and without some at random.
        """
        several = [group for group in groups if group.size > 1]
        if len(several) < len(groups):
            return "it has one channel"
        draw = np.random.default_rng(0)
        random = {g.name: draw.permutation(g.size)[: max(1, g.size // 3)] for g in groups}
        for places in ({g.name: [0] for g in groups}, random):
            why = self._change([Removal(group=name, places=tuple(map(int, some))) for name, some in places.items()])
            if why is not None:
                return why
        return None

    def _change(self, removals: Sequence[Removal]) -> str | None:
        """What is wrong with the network without these channels; None: it gives what it gives with them masked."""
        smaller = copy.deepcopy(self.module)
        try:
            graph = _traced(smaller, self._example)
            _take_out(smaller, graph, [(self.group(r.group), r.places) for r in removals])
            wanted, got = (list(tensors_in(module(*self._example))) for module in (self.masked(removals), smaller))
        except TRACE_ERRORS as error:
            return f"without some of its channels the network fails: {first_line(error)}"
        if [value.shape for value in wanted] != [value.shape for value in got]:
            return "the network's output has its channels"
        pairs = zip(wanted, got, strict=True)
        change = max(float((a - b).abs().max() / a.abs().max().clamp_min(1e-6)) for a, b in pairs)
        return None if change <= TOLERANCE else "without a channel the network gives something else than with it masked"


def _fits(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def replay(module: nn.Module, example: Sequence[Tensor], removals: Sequence[Sequence[Removal]]) -> None:
    """Remove in place what was removed before, round by round.

    Raises:
        ModelError: the network has no such channels.
    """
    sound = {removal.group for some in removals for removal in some}
    if sound:
        channels = Channels(module, example, sound=sound)
        for some in removals:
            channels.remove(some)


def _traced(module: nn.Module, example: tuple[Tensor, ...]) -> torch_pruning.DependencyGraph:
    graph = torch_pruning.DependencyGraph()
    running: list[str] = []
    named = [(name, layer) for name, layer in module.named_modules() if name]
    hooks = [layer.register_forward_pre_hook(partial(_enter, running, name)) for name, layer in named]
    try:
        # What fails here fails there as well, where its reason is lost.
        with torch.no_grad():
            module(*example)
        running.clear()
        # Parameters outside of layers are said to be pruned along their last axis; the check finds out.
        with torch.enable_grad():
            graph.build_dependency(module, example, verbose=False, customized_pruners={PadShortcut: _PadPruner()})
    except TRACE_ERRORS as error:
        where = f' (last in "{running[-1]}")' if running else ""
        raise ModelError(
            f"the channels of {type(module).__name__} cannot be traced: {first_line(error)}{where}"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    return graph


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


def _group_of(
    item: torch_pruning.Group, names: Mapping[nn.Module, str], graph: torch_pruning.DependencyGraph
) -> Group | None:
    """The group as its first layer counts it, by the order in which the network holds its layers; None: it has none."""
    order = {name: place for place, name in enumerate(names.values())}
    members = [member.dep.target.module for member in item if graph.is_out_channel_pruning_fn(member.dep.handler)]
    full = [layer for layer in members if isinstance(layer, LAYERS) and not _is_depthwise(layer)]
    if not full:
        return None
    first = min(full, key=lambda layer: order[names[layer]])
    count = graph.get_out_channels(first)
    prune = graph.get_pruner_of_module(first).prune_out_channels
    makers: list[Part] = []
    readers: list[Part] = []
    for member in graph.get_pruning_group(first, prune, list(range(count))):
        layer = member.dep.target.module
        if not isinstance(layer, (*LAYERS, *NORMS, PadShortcut)):
            continue
        part = Part(names[layer], torch.tensor(member.idxs), torch.tensor(member.root_idxs))
        if graph.is_out_channel_pruning_fn(member.dep.handler):
            makers.append(part)
        else:
            readers.append(part)
    return Group(names[first], "channels", count, tuple(makers), tuple(readers))


def _is_depthwise(layer: nn.Module) -> bool:
    return isinstance(layer, LAYERS[:-1]) and layer.groups == layer.out_channels > 1


def _heads(name: str, layer: nn.Module) -> Group | None:
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


def _take_out(
    module: nn.Module, graph: torch_pruning.DependencyGraph, chosen: Sequence[tuple[Group, Sequence[int]]]
) -> None:
    for group, places in chosen:
        if not places:
            continue
        if group.kind == "heads":
            _take_out_heads(module, group, places)
            continue
        layer = module.get_submodule(group.name)
        pruner = graph.get_pruner_of_module(layer)
        graph.get_pruning_group(layer, pruner.prune_out_channels, sorted(places)).prune(record_history=False)


@torch.no_grad()
def _take_out_heads(module: nn.Module, group: Group, places: Sequence[int]) -> None:
    for part, axis in ((group.makers[0], 0), (group.readers[0], 1)):
        layer = module.get_submodule(part.name)
        assert isinstance(layer, nn.Linear)
        stay = part.places[~_is_gone(part, places)].to(layer.weight.device)
        layer.weight = nn.Parameter(layer.weight.index_select(axis, stay))
        if axis == 0:
            layer.out_features = len(stay)
            if layer.bias is not None:
                layer.bias = nn.Parameter(layer.bias[stay])
        else:
            layer.in_features = len(stay)
    attention = module.get_submodule(group.name)
    attention.num_heads = group.size - len(places)  # type: ignore[assignment]


def _is_gone(part: Part, places: Sequence[int]) -> Tensor:
    return torch.isin(part.roots, torch.tensor(places, dtype=part.roots.dtype))


def _zero(module: nn.Module, part: Part, places: Sequence[int]) -> None:
    layer = module.get_submodule(part.name)
    gone = part.places[_is_gone(part, places)]
    if isinstance(layer, PadShortcut):
        layer.mask(gone)
        return
    for value in (layer.weight, layer.bias):
        if isinstance(value, Tensor):
            value[gone] = 0
