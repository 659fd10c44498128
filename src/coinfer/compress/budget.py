"""What a network costs without some of its channels, and which channels to remove for a budget.

    costs = Costs(channels, example)           one forward pass: each layer's channels and positions
    costs.of({"conv1": 3})                     multiply-accumulates and parameters without 3 channels of that group
    choose(channels, scores, ...)              the least needed channels that bring the cost down to a target

The counts are those of the layers with weights (convolutions, linear layers); norms and activations are left out of the
multiply-accumulates, norms count as parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ModelError
from .channels import Channels, Removal
from .groups import LAYERS, NORMS, TRANSPOSED
from .scores import Scores

Budget = Literal["macs", "parameters", "channels", "latency"]


class Unreachable(ModelError):
    """A target that the network cannot come down to.

    `layer` would be empty first ("": none was found); `removals` are the most that can go.
    """

    def __init__(self, message: str, layer: str, removals: list[Removal]) -> None:
        super().__init__(message)
        self.layer, self.removals = layer, removals


class Cost(NamedTuple):
    """Of one sample: multiply-accumulates; and parameters."""

    macs: float
    parameters: float


class _Layer(NamedTuple):
    """`inputs` and `outputs` channels, weights for each pair of them, positions, values of each output beside these.

    Positions are the output's, of a transposed convolution the input's.
    """

    inputs: int
    outputs: int
    per_pair: float
    positions: int
    per_output: int


class Costs:
    """Costs of a network as its channels go, without removing any."""

    def __init__(self, channels: Channels, example: Sequence[Tensor]) -> None:
        self._channels = channels
        self._layers = _layers(channels.module, example)
        in_layers = sum(_size(module) for module in channels.module.modules() if isinstance(module, (*LAYERS, *NORMS)))
        self._rest = sum(weight.numel() for weight in channels.module.parameters()) - in_layers

    def of(self, gone: Mapping[str, int]) -> Cost:
        """Without so many channels of each group named."""
        fewer_in: dict[str, float] = {}
        fewer_out: dict[str, float] = {}
        for group in self._channels.groups:
            for parts, fewer in ((group.readers, fewer_in), (group.makers, fewer_out)):
                for part in parts:
                    share = len(part.places) / group.size
                    fewer[part.name] = fewer.get(part.name, 0.0) + share * gone.get(group.name, 0)
        macs, parameters = 0.0, float(self._rest)
        for name, layer in self._layers.items():
            outputs = layer.outputs - fewer_out.get(name, 0.0)
            inputs = layer.inputs - fewer_in.get(name, 0.0)
            weights = layer.per_pair * inputs * outputs
            macs += weights * layer.positions
            parameters += weights + layer.per_output * outputs
        return Cost(macs, parameters)


@torch.no_grad()
def _layers(module: nn.Module, example: Sequence[Tensor]) -> dict[str, _Layer]:
    found: dict[str, _Layer] = {}

    def note(name: str, layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Tensor) -> None:
        before = found.get(name)
        if isinstance(layer, TRANSPOSED):
            positions = (*given, *named.values())[0][0].numel() // layer.in_channels
        else:
            positions = output[0].numel() // _outputs(layer)
        found[name] = _described(layer, positions + (0 if before is None else before.positions))

    hooks = [
        layer.register_forward_hook(partial(note, name), with_kwargs=True)
        for name, layer in module.named_modules()
        if isinstance(layer, (*LAYERS, *NORMS))
    ]
    try:
        module(*example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _described(layer: nn.Module, positions: int) -> _Layer:
    biases = int(getattr(layer, "bias", None) is not None)
    if isinstance(layer, NORMS):
        return _Layer(0, layer.num_features, 0, 0, int(layer.weight is not None) + biases)
    if isinstance(layer, nn.Linear):
        return _Layer(layer.in_features, layer.out_features, 1, positions, biases)
    assert isinstance(layer, nn.modules.conv._ConvNd)
    size = layer.weight[0, 0].numel()
    if layer.groups == layer.out_channels > 1 and not layer.transposed:
        # Each output has an input of its own: what goes is counted once, as outputs.
        return _Layer(1, layer.out_channels, layer.weight[0].numel(), positions, biases)
    return _Layer(layer.in_channels, layer.out_channels, size / layer.groups, positions, biases)


def _outputs(layer: nn.Module) -> int:
    if isinstance(layer, NORMS):
        return layer.num_features
    return layer.out_features if isinstance(layer, nn.Linear) else int(layer.out_channels)  # type: ignore[arg-type]


def _size(module: nn.Module) -> int:
    return sum(weight.numel() for weight in module.parameters(recurse=False))


def choose(
    channels: Channels,
    scores: Scores,
    cost: Callable[[Mapping[str, int]], float],
    target: float,
    *,
    least: int = 1,
    unit: str = "multiply-accumulates",
) -> list[Removal]:
    """The channels of the lowest scores that bring `cost` down to `target`; each group keeps at least `least`.

    Args:
        channels: what can be removed.
        scores: (size,) for each group; infinite: this channel stays.
        cost: of the network without so many channels of each group.
        target: what it may be afterwards.
        least: channels that stay in every group, at least one.
        unit: of the cost, for messages.

    Raises:
        Unreachable: the target needs empty groups (names the first, and the smallest cost).
        ModelError: nothing shall stay of a group.
    """
    if least < 1:
        raise ModelError(f"a group keeps at least 1 channel, got least = {least}: without any its layers are empty")
    order: list[tuple[float, str, int]] = []
    for group in channels.groups:
        ranked = sorted((float(score), place) for place, score in enumerate(scores[group.name]))
        order += [(score, group.name, place) for score, place in ranked[: max(0, group.size - least)]]
    order = sorted(item for item in order if item[0] != float("inf"))
    low, high = 0, len(order)
    if cost(_counted(order)) > target:
        first = min(channels.groups, key=lambda group: float(scores[group.name].max()))
        raise Unreachable(
            f'{target:.4g} {unit} would empty layers, "{first.name}" first: with {least} channels left in each '
            f"there are {cost(_counted(order)):.4g}; keep more of it, or widen the region",
            first.name,
            _removals(order),
        )
    while low < high:
        middle = (low + high) // 2
        if cost(_counted(order[:middle])) <= target:
            high = middle
        else:
            low = middle + 1
    return _removals(order[:low])


def _removals(order: Sequence[tuple[float, str, int]]) -> list[Removal]:
    gone: dict[str, list[int]] = {}
    for _, name, place in order:
        gone.setdefault(name, []).append(place)
    return [Removal(group=name, places=tuple(sorted(places))) for name, places in gone.items()]


def _counted(order: Sequence[tuple[float, str, int]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for _, name, _ in order:
        counts[name] = counts.get(name, 0) + 1
    return counts
