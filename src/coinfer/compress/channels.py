"""Channels and attention heads that can be removed from a network, and their removal.

    Channels(module, example)    .groups    what can go: a group's channels are made and read in several layers at once
                                 .refused   what cannot, by the name of a layer, with the reason
                                 .masked    a copy that has them all, the chosen ones made zero
                                 .remove    takes the chosen ones out, in place: smaller weights, less compute

Which layers belong together is found by Torch-Pruning (`groups`).  It is not believed: with some of a group's channels
removed the network, and each of its modules that keeps its channels, must give what it gives with the same channels
masked to zero, up to the order of sums, or the group is refused.  So fall the classes of a classifier, sums whose
shortcut is padded, streams that a layer norm averages over, and whatever a module does with a number of channels of its
own; each is named.  Heads are groups of their own.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Collection, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ModelError
from ..model.graph import tensors_in
from ..model.nets_resnet import PadShortcut
from ..model.trace import TRACE_ERRORS, first_line
from ..plan import Value
from .groups import LAYERS, NORMS, Group, Part, fits, group_of, heads_of, is_gone, outputs_first, take_out, traced

# Relative to the largest value of a tensor, of what is masked against what is removed.
TOLERANCE = 1e-4


class Removal(Value, frozen=True, kw_only=True):
    """Channels (or heads) of one group, by their places before this removal."""

    group: str
    places: tuple[int, ...]


class Channels:
    """The removable channels of `module`, which `remove` changes in place.

    Args:
        module: in evaluation mode.
        example: what it is called with; a batch of 1 will do.
        region: shell patterns of layers' names: a group is kept whose makers all fit one of them; batch norms and
            padded shortcuts need not.
        ignore: patterns of layers that stay as they are: a group with one of them as a maker is left out.  Of a module
            that cannot be traced: what only it reads stays as well.
        sound: names of groups that were found sound before: these alone, and they are not checked again.

    Raises:
        ModelError: a pattern fits no layer, the module cannot be traced, or nothing in the region can be removed (names
            what was refused).
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
        self._check_patterns()
        self._trace()
        self.groups = tuple(group for group in self._found() if self._fits(group))
        self._name_unreached()
        if sound is None:
            self._refuse_unsound()
        else:
            self.groups = tuple(group for group in self.groups if group.name in sound)
        if not self.groups:
            near = {name: why for name, why in self.refused.items() if fits(name, region)} or self.refused
            why = "".join(f'; "{name}": {reason}' for name, reason in near.items())
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
                    weight[:, part.places[is_gone(part, removal.places)]] = 0
        return module

    def remove(self, removals: Sequence[Removal]) -> None:
        """Take these channels out, all of them counted before; groups and parts are found anew.

        Raises:
            ModelError: no such group, a place it does not have, or all of a group's channels.
        """
        for removal in removals:
            self._check(removal)
        take_out(self.module, self._graph, [(self.group(r.group), r.places) for r in removals])
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

    def _check_patterns(self) -> None:
        """Refuse a pattern that fits no layer: a misspelt one would protect nothing."""
        names = [name for name, _ in self.module.named_modules() if name]
        for what, patterns in (("region", self._region), ("ignore", self._ignore)):
            for pattern in patterns:
                if pattern != "*" and not any(fits(name, (pattern,)) for name in names):
                    near = ", ".join(difflib.get_close_matches(pattern, names, n=3, cutoff=0.0))
                    network = type(self.module).__name__
                    raise ModelError(f'{what} "{pattern}" fits no layer of {network}; near are {near}')

    def _trace(self) -> None:
        self._graph = traced(self.module, self._example, ignore=self._ignore)

    def _found(self) -> list[Group]:
        """Every group of the network as it is now."""
        names = {layer: name for name, layer in self.module.named_modules()}
        heads = [group for name, layer in self.module.named_modules() if (group := heads_of(name, layer)) is not None]
        taken = {part.name for group in heads for part in group.makers}
        found: list[Group] = []
        seen: set[str] = set()
        for layer in [layer for layer in self._graph.module2node if isinstance(layer, LAYERS)]:
            name = names[layer]
            if name in seen:
                continue
            try:
                made, group = group_of(layer, names, self._graph)
            except (ModelError, *TRACE_ERRORS) as error:
                self.refused[name] = f"what depends on its channels cannot be followed: {first_line(error)}"
                continue
            seen |= made
            if group is None:
                # Such as a depthwise convolution of the picture itself.
                self.refused[name] = "no layer makes its channels: they are the input's own"
            elif group.name not in taken:
                found.append(group)
        return [*found, *heads]

    def _fits(self, group: Group) -> bool:
        """Whether its channels may go; noted where the region has some of those that make them."""
        names = [part.name for part in group.makers]
        if any(fits(name, self._ignore) for name in names):
            return False
        makers = [name for name in names if not isinstance(self.module.get_submodule(name), (*NORMS, PadShortcut))]
        outside = [name for name in makers if not fits(name, self._region)]
        if outside and len(outside) < len(makers):
            self.refused[group.name] = f'"{outside[0]}" makes these channels as well, and is not in the region'
        return not outside

    def _name_unreached(self) -> None:
        """Name the layers that the trace did not come to."""
        for name, layer in self.module.named_modules():
            if isinstance(layer, LAYERS) and layer not in self._graph.module2node and not fits(name, self._ignore):
                self.refused.setdefault(name, "no gradient leads from the outputs to it, or it is not called itself")

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

    def refuse(self, removals: Sequence[Removal]) -> bool:
        """Whether the network without these channels is not what it is with them masked; its groups are then refused.

        Raises:
            ModelError: each of them alone is sound, or no group is left.
        """
        if (why := self._change(removals)) is None:
            return False
        alone = {removal.group: self._change([removal]) for removal in removals}
        unsound = {name: reason for name, reason in alone.items() if reason is not None}
        if not unsound or len(unsound) == len(self.groups):
            raise ModelError(f"without channels of {', '.join(alone)}: {why}; leave some of these out by ignore")
        self.refused |= unsound
        self.groups = tuple(group for group in self.groups if group.name not in unsound)
        return True

    @torch.no_grad()
    def _change(self, removals: Sequence[Removal]) -> str | None:
        """What is wrong with the network without these channels; None: it gives what it gives with them masked."""
        # Not on an accelerator, which may round more coarsely.
        wanted, smaller = self.masked(removals).cpu(), copy.deepcopy(self.module).cpu()
        example = tuple(value.cpu() for value in self._example)
        try:
            graph = traced(smaller, example, ignore=self._ignore)
            take_out(smaller, graph, [(self.group(r.group), r.places) for r in removals])
            for inputs in (example, _noise(example)):
                (got, inside), (whole, within) = (_given(module, inputs) for module in (smaller, wanted))
                if [value.shape for value in whole] != [value.shape for value in got]:
                    return "the network's output has its channels"
                if not _is_alike(whole, got):
                    return "without a channel the network gives something else than with it masked"
                for name in within.keys() & inside.keys():
                    # What differs in shape has fewer channels.
                    if within[name].shape == inside[name].shape and not _is_alike([within[name]], [inside[name]]):
                        return f'without a channel "{name}" gives something else than with it masked'
        except (ModelError, *TRACE_ERRORS) as error:
            return f"without some of its channels the network fails: {first_line(error)}"
        return None


def _noise(example: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Other inputs of the example's shapes: noise; whole numbers stay as they are."""
    draw = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(value.shape, generator=draw, dtype=value.dtype) if value.is_floating_point() else value
        for value in example
    )


def _given(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """A network's outputs, and the last output of each module of it that gives one tensor."""
    inside: dict[str, Tensor] = {}

    def note(name: str, layer: nn.Module, given: object, output: object) -> None:
        if isinstance(output, Tensor):
            # What follows may change it in place.
            inside[name] = output.clone()

    hooks = [layer.register_forward_hook(partial(note, name)) for name, layer in module.named_modules() if name]
    try:
        return list(tensors_in(module(*inputs))), inside
    finally:
        for hook in hooks:
            hook.remove()


def _is_alike(wanted: Sequence[Tensor], got: Sequence[Tensor]) -> bool:
    return all(
        float((a - b).abs().max()) <= TOLERANCE * max(float(a.abs().max()), 1e-6)
        for a, b in zip(wanted, got, strict=True)
        if a.numel()
    )


def replay(
    module: nn.Module,
    example: Sequence[Tensor],
    removals: Sequence[Sequence[Removal]],
    *,
    ignore: Sequence[str] = (),
) -> None:
    """Remove in place what was removed before, round by round, with the same layers left as they are.

    Raises:
        ModelError: the network has no such channels.
    """
    sound = {removal.group for some in removals for removal in some}
    if sound:
        channels = Channels(module, example, ignore=ignore, sound=sound)
        for some in filter(None, removals):
            channels.remove(some)


def _zero(module: nn.Module, part: Part, places: Sequence[int]) -> None:
    layer = module.get_submodule(part.name)
    gone = part.places[is_gone(part, places)]
    if isinstance(layer, PadShortcut):
        layer.mask(gone)
        return
    for value in (outputs_first(layer), layer.bias):
        if isinstance(value, Tensor):
            value[gone] = 0
