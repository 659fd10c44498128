"""A trained unit as one file: what training changed, and of which network, cut and shape it is.

NAME.safetensors    the unit's weights, those of the head and the tail that training moved, a light head's
                    metadata: format, sha256 of the unmodified network's weights, cut, spec, recipe, the recipes before
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch

from ..errors import ModelError, WeightsError
from ..model.cut import Cut
from ..model.graph import Graph
from .bottleneck import UnitSpec
from .divided import Divided, insert_unit
from .train import load_tensors, save_tensors
from .unit_training import UnitRecipe

FORMAT = "coinfer-unit-2"


class Trained(NamedTuple):
    """A unit with its head and tail, where it belongs, and the metadata of its file."""

    divided: Divided
    cut: Cut
    metadata: dict[str, str]

    @property
    def recipes(self) -> tuple[UnitRecipe, ...]:
        """How it was trained, one after the other."""
        before = msgspec.json.decode(self.metadata.get("before", "[]"), type=tuple[UnitRecipe, ...])
        return *before, msgspec.json.decode(self.metadata["recipe"], type=UnitRecipe)


def save_unit(
    divided: Divided,
    graph: Graph,
    cut: Cut,
    path: Path,
    *,
    network: str,
    recipes: Sequence[UnitRecipe],
) -> None:
    """Write what training changed to `path`.

    Args:
        divided, graph, cut: what was trained, and where.
        path: the file.
        network: the sha256 of the unmodified network's weights.
        recipes: how it was trained, one after the other.
    """
    spec = divided.unit.spec
    before = insert_unit(graph, cut, spec).state_dict()
    needed = _needed(spec)
    changed = {
        name: tensor
        for name, tensor in divided.state_dict().items()
        if name.startswith(needed) or not torch.equal(tensor.cpu(), before[name])
    }
    metadata = {
        "format": FORMAT,
        "network": network,
        "cut": cut.name,
        "spec": msgspec.json.encode(spec).decode(),
        "recipe": msgspec.json.encode(recipes[-1]).decode(),
        "before": msgspec.json.encode(recipes[:-1]).decode(),
    }
    save_tensors(changed, path, metadata=metadata)


def network_of(path: Path) -> str:
    """The sha256 of the network's weights that the unit in a file was trained for.

    Raises:
        WeightsError: no such file, or not a unit.
    """
    metadata = load_tensors(path, "unit")[1]
    _check_format(path, metadata)
    return metadata.get("network", "")


def _check_format(path: Path, metadata: dict[str, str]) -> None:
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"unit {path} must be of format {FORMAT}, got {metadata.get('format')}")


def load_unit(path: Path, graph: Graph, *, network: str) -> Trained:
    """The unit in a file that `save_unit` wrote.

    Raises:
        WeightsError: no such file, not a unit, or one of another network or version.
        CutError: the graph has no such cut.
    """
    tensors, metadata = load_tensors(path, "unit")
    _check_format(path, metadata)
    if metadata.get("network") != network:
        have, want = (str(text)[:12] for text in (metadata.get("network"), network))
        raise WeightsError(f"unit {path} was trained for another network: weights {have}, these are {want}")
    try:
        spec = msgspec.json.decode(metadata["spec"], type=UnitSpec)
        cut = graph.cut(metadata["cut"])
        divided = insert_unit(graph, cut, spec)
        unknown = divided.load_state_dict(tensors, strict=False).unexpected_keys
    except (KeyError, msgspec.MsgspecError, ModelError, RuntimeError) as error:
        raise WeightsError(f"unit {path} does not fit: {error}") from error
    trained = Trained(divided.eval(), cut, metadata)
    try:
        trained.recipes  # noqa: B018 - read once, so that it can be read ever after
    except (KeyError, msgspec.MsgspecError, ModelError) as error:
        raise WeightsError(f"unit {path} does not say how it was trained: {error}") from error
    needed = _needed(spec)
    missing = [name for name in divided.state_dict() if name.startswith(needed) and name not in tensors]
    if unknown or missing:
        raise WeightsError(f"unit {path} does not fit: unknown {unknown[:3]}, missing {missing[:3]}")
    for name, tensor in tensors.items():
        is_prior = name.endswith("quantiser.shares")
        if not tensor.is_floating_point() and not name.endswith("num_batches_tracked"):
            raise WeightsError(f'unit {path} does not fit: "{name}" is {tensor.dtype}, not floating')
        if tensor.is_floating_point() and not tensor.isfinite().all() or is_prior and not (tensor > 0).all():
            raise WeightsError(f'unit {path} does not fit: "{name}" holds values that no training leaves')
    for rate in range(len(spec.gains)):
        low, step = divided.unit.quantiser.grid(rate)
        if not (low.isfinite().all() and step.isfinite().all() and (step > 0).all()):
            raise WeightsError(f"unit {path} does not fit: the steps of rate {rate} are no numbers above 0")
    return trained


def _needed(spec: UnitSpec) -> tuple[str, ...]:
    """Where the names of weights begin that no unmodified network has."""
    return ("unit.", "head.") if spec.head_width else ("unit.",)
