"""What a network costs without some of its channels, and which channels to remove for a budget.

    costs = Costs(channels, example)           one forward pass: each layer's channels and positions
    costs.of({"conv1": 3})                     multiply-accumulates and parameters without 3 channels of that group
    choose(channels, scores, ...)              the least needed channels that bring the cost down to a target

The counts are those of the layers with weights (convolutions, linear layers); norms and activations are left out of the
multiply-accumulates, norms count as parameters.
"""

from __future__ import annotations

from collections import Counter
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

    `why` is that; `layer` would be empty first ("": none was found); `removals` are the most that can go.
    """

    def __init__(self, why: str, layer: str, removals: list[Removal]) -> None:
        super().__init__(f'{why}; keep more of it, widen the region, or set unreachable = "nearest"')
        self.why, self.layer, self.removals = why, layer, removals


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
        in_layers = sum(_size(channels.module.get_submodule(name)) for name in self._layers)
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
    multiple: int = 1,
    unit: str = "multiply-accumulates",
) -> list[Removal]:
    """The channels of the lowest scores that bring `cost` down to `target`; each group keeps at least `least`.

    Args:
        channels: what can be removed.
        scores: (size,) for each group; infinite: this channel stays.
        cost: of the network without so many channels of each group.
        target: what it may be afterwards.
        least: channels that stay in every group, at least one.
        multiple: a group (not one of heads) that loses some keeps a multiple of it, the nearest.
        unit: of the cost, for messages.

    Raises:
        Unreachable: the target needs empty groups (names the first, and the smallest cost).
        ModelError: nothing shall stay of a group.
    """
    if least < 1:
        raise ModelError(f"a group keeps at least 1 channel, got least = {least}: without any its layers are empty")
    ranked: dict[str, list[tuple[float, int]]] = {}
    order: list[tuple[float, str]] = []
    for group in channels.groups:
        places = sorted((float(score), place) for place, score in enumerate(scores[group.name]))
        able = [item for item in places[: max(0, group.size - least)] if item[0] != float("inf")]
        ranked[group.name] = able
        order += [(score, group.name) for score, _ in able]
    order.sort()
    steps = {group.name: multiple if group.kind == "channels" else 1 for group in channels.groups}

    def gone(length: int) -> dict[str, int]:
        """How many channels of each group go for the first so many of all."""
        counts = Counter(name for _, name in order[:length])
        return {
            name: _rounded(count, channels.group(name).size, len(ranked[name]), steps[name])
            for name, count in counts.items()
        }

    low, high = 0, len(order)
    if cost(gone(high)) > target:
        first = min(channels.groups, key=lambda group: float(scores[group.name].max()))
        left = f"{least} channel{'s' * (least > 1)}"
        left += f" or more, a multiple of {multiple}," if multiple > 1 else ""
        total, least_cost = cost({}), cost(gone(high))
        raise Unreachable(
            f'{target / total:.4g} of the {unit} ({target:.4g}) would empty layers, "{first.name}" first: '
            f"with {left} left in each {least_cost / total:.4g} stays ({least_cost:.4g})",
            first.name,
            _removals(gone(high), ranked),
        )
    while low < high:
        middle = (low + high) // 2
        if cost(gone(middle)) <= target:
            high = middle
        else:
            low = middle + 1
    counts = gone(low)
    if multiple > 1:
        # What went too far by rounding comes back where it fits, the most needed first.
        for name in sorted(counts, key=lambda name: ranked[name][max(counts[name], 1) - 1], reverse=True):
            while counts[name] and cost(counts | {name: max(0, counts[name] - steps[name])}) <= target:
                counts[name] = max(0, counts[name] - steps[name])
    return _removals(counts, ranked)


def _removals(counts: Mapping[str, int], ranked: Mapping[str, Sequence[tuple[float, int]]]) -> list[Removal]:
    """The first so many of each group."""
    return [
        Removal(group=name, places=tuple(sorted(place for _, place in ranked[name][:count])))
        for name, count in counts.items()
        if count
    ]


def _rounded(gone: int, size: int, most: int, multiple: int) -> int:
    """How many of `size` channels go so that a multiple stays, the nearest to `size - gone` that `most` allows.

    >>> [_rounded(gone, 64, 63, 16) for gone in (7, 8, 9, 63)], _rounded(1, 10, 9, 16), _rounded(30, 64, 20, 16)
    ([0, 0, 16, 48], 0, 16)
    """
    kept = max(1, (size - gone + multiple // 2) // multiple) * multiple
    while size - kept > most:
        kept += multiple
    return max(0, size - kept)
