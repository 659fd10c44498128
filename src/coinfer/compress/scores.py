"""How much a network needs each of its removable channels: one number a channel, comparable between groups.

    taylor       what the loss would change by, to first order (Molchanov et al., 2017, arXiv:1611.06440, eq. 8)
    slimming     scale of the batch norms behind a channel, after training with `slimmed` (Liu et al., 2017,
                 arXiv:1708.06519)
    magnitude    size of the weights that make it (Li et al., 2017, arXiv:1608.08710)

A channel that several layers make or read has one score: the changes of the loss add up, scales are averaged, and
the squares of weights add up.  Heads are scored like channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .channels import Channels
from .groups import LAYERS, NORMS, Group, Part, outputs_first
from .losses import Batch, Loss

Score = Literal["taylor", "slimming", "magnitude"]
Scores = Mapping[str, Tensor]


def scores_of(score: Score, channels: Channels, batches: Callable[[], Iterable[Batch]], loss: Loss) -> Scores:
    """(size,) float64 for each group of `channels`; `batches` and `loss` are for "taylor" alone.

    Raises:
        ModelError: "taylor" without labels, "slimming" of a network without batch norms.
    """
    if score == "taylor":
        return taylor(channels, batches(), loss)
    return slimming(channels) if score == "slimming" else magnitude(channels)


def taylor(channels: Channels, batches: Iterable[Batch], loss: Loss) -> Scores:
    """|activation x gradient| of each channel where it is read, summed over positions and readers, mean over samples.

    L2-normalised within each group, as the paper does within each layer.

    Raises:
        ModelError: the batches have no labels: against the network's own answers the gradient is zero.
    """
    module = channels.module
    device = next(module.parameters()).device
    sums = {group.name: torch.zeros(group.size, dtype=torch.float64, device=device) for group in channels.groups}
    changes: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_pre_hook(partial(_watch, group, part, changes), with_kwargs=True)
        for group in channels.groups
        for part in group.readers
        if isinstance(layer := module.get_submodule(part.name), LAYERS)
    ]
    module.eval()
    try:
        for batch in batches:
            if batch.labels is None:
                instead = 'take "slimming" or "magnitude"'
                raise ModelError(f'the score "taylor" needs labels, these pictures have none: {instead}')
            changes.clear()
            moved = Batch(batch.inputs.to(device).requires_grad_(), batch.labels.to(device))
            loss(module(moved.inputs), moved).backward()  # type: ignore[no-untyped-call]
            for name, change in changes.items():
                # The loss is a mean over the batch: each sample's own gradient is so many times as large.
                sums[name] += change.abs().sum(0) * len(change)
    finally:
        for hook in hooks:
            hook.remove()
        module.zero_grad(set_to_none=True)
    return {name: value.cpu() / value.norm().clamp_min(1e-300).cpu() for name, value in sums.items()}


def _watch(
    group: Group,
    part: Part,
    changes: dict[str, Tensor],
    layer: nn.Module,
    given: tuple[Any, ...],
    named: dict[str, Any],
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Add to `changes[group.name]` (N, size), once the gradient of what `layer` reads is known; gives what it reads."""
    read = given[0] if given else named["input"]
    # A view of its own: the gradient of the tensor itself would be that of all its readers.
    x: Tensor = read.view_as(read)
    # The hook may not hold what it hangs on: neither would be freed.
    value, axis = x.detach(), x.ndim - 1 if isinstance(layer, nn.Linear) else 1

    def add(gradient: Tensor) -> None:
        change = (value * gradient).double().movedim(axis, 1)
        each = change.reshape(*change.shape[:2], -1).sum(2)[:, part.places]
        own = torch.zeros(len(each), group.size, dtype=torch.float64, device=each.device)
        own.index_add_(1, part.roots.to(each.device), each)
        changes[group.name] = changes[group.name] + own if group.name in changes else own

    if x.requires_grad:
        x.register_hook(add)  # type: ignore[no-untyped-call]
    return ((x, *given[1:]), named) if given else ((), named | {"input": x})


def slimming(channels: Channels) -> Scores:
    """Mean |scale| of the batch norms that a group's channels go through; without one, no channel of a group may go.

    Raises:
        ModelError: no group has a batch norm.
    """
    scores = {}
    for group in channels.groups:
        norms = [part for part in group.makers if _has_scale(channels.module.get_submodule(part.name))]
        scores[group.name] = torch.full((group.size,), math.inf, dtype=torch.float64)
        if norms:
            total = torch.zeros(group.size, dtype=torch.float64)
            for part in norms:
                total.index_add_(0, part.roots, _weight(channels, part).abs()[part.places])
            scores[group.name] = total / len(norms)
    if all(value.isinf().all() for value in scores.values()):
        raise ModelError('the score "slimming" needs batch norms, no channel here goes through one: take "magnitude"')
    return scores


def magnitude(channels: Channels) -> Scores:
    """L2 norm of the weights that make a channel, over the mean of its group."""
    scores = {}
    for group in channels.groups:
        total = torch.zeros(group.size, dtype=torch.float64)
        for part in group.makers:
            if isinstance(channels.module.get_submodule(part.name), LAYERS):
                squares = _weight(channels, part).flatten(1).square().sum(1)
                total.index_add_(0, part.roots, squares[part.places])
        scores[group.name] = total.sqrt() / total.sqrt().mean().clamp_min(1e-300)
    return scores


def slimmed(loss: Loss, module: nn.Module, strength: float) -> Loss:
    """`loss` + strength x sum of |scale| over all batch norms of `module`: unneeded channels' scales go to zero.

    Raises:
        ModelError: the network has no batch norms with scales.
    """
    check_scales(module)

    def total(outputs: Any, batch: Batch) -> Tensor:
        norms = [layer for layer in module.modules() if isinstance(layer, NORMS)]
        scales = [layer.weight.abs().sum() for layer in norms if layer.weight is not None]
        return loss(outputs, batch) + strength * torch.stack(scales).sum()

    return total


def check_scales(module: nn.Module) -> None:
    """Refuse a network without scales of batch norms.

    Raises:
        ModelError: it has none.
    """
    if not any(_has_scale(layer) for layer in module.modules()):
        raise ModelError(f"a sparse phase needs batch norms with scales, {type(module).__name__} has none")


def _has_scale(layer: nn.Module) -> bool:
    return isinstance(layer, NORMS) and layer.weight is not None


def _weight(channels: Channels, part: Part) -> Tensor:
    weight = outputs_first(channels.module.get_submodule(part.name))
    assert weight is not None
    return weight.detach().double().cpu()
