"""A pruned network as one file: its weights, and how to come to its shape from the unmodified network.

NAME.safetensors    all weights, as small as they are now
                    metadata: format, sha256 of the unmodified network's weights, lineage: each pruning in order, its
                    recipe and what its rounds removed
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from torch import Tensor, nn

from ..errors import ModelError, WeightsError
from ..plan import Value
from .channels import Removal, replay
from .pruning import PruneRecipe, Taught
from .train import load_tensors, save_tensors

FORMAT = "coinfer-pruned-1"
# In which weights may be kept, of whatever type they are in the network.
_HALVES = (torch.float16, torch.bfloat16)


class Stage(Value, frozen=True, kw_only=True):
    """One pruning: its recipe, the channels that each round removed, and what it was trained on (older files: None)."""

    recipe: PruneRecipe
    rounds: tuple[tuple[Removal, ...], ...]
    taught: Taught | None = None


class PrunedNetwork(NamedTuple):
    """A pruned network in evaluation mode, and its lineage."""

    module: nn.Module
    lineage: tuple[Stage, ...]


def save_pruned(module: nn.Module, path: Path, *, network: str, lineage: Sequence[Stage]) -> None:
    """Write a pruned network; `network` is the sha256 of the unmodified network's weights."""
    metadata = {"format": FORMAT, "network": network, "lineage": msgspec.json.encode(list(lineage)).decode()}
    save_tensors(module.state_dict(), path, metadata=metadata)


def load_pruned(path: Path, module: nn.Module, example: Sequence[Tensor], *, network: str | None) -> PrunedNetwork:
    """The network of a file that `save_pruned` wrote, which holds all of its weights; they may be kept in 16 bits each.

    Args:
        path: the file.
        module: the unmodified network; it is left as it is.
        example: what it is called with, a batch of 1.
        network: sha256 of its weights; None takes a file of whatever weights, since only the shape is needed.

    Raises:
        WeightsError: no such file, not a pruned network, or one of another network or version.
    """
    state, metadata = load_tensors(path, "pruned network")
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"pruned network {path} must be of format {FORMAT}, got {metadata.get('format')}")
    if network is not None and metadata.get("network") != network:
        have, want = (str(text)[:12] for text in (metadata.get("network"), network))
        raise WeightsError(f"pruned network {path} was made of another network: weights {have}, these are {want}")
    smaller = copy.deepcopy(module)
    try:
        lineage = msgspec.json.decode(metadata["lineage"], type=tuple[Stage, ...])
        for stage in lineage:
            replay(smaller, example, stage.rounds, ignore=stage.recipe.ignore)
        for name, value in smaller.state_dict().items():
            given = state.get(name, value).dtype
            if given != value.dtype and not (value.is_floating_point() and given in _HALVES):
                raise ModelError(f'"{name}" must be {value.dtype}, got {given}')
        smaller.load_state_dict(state)
    except (KeyError, msgspec.MsgspecError, ModelError, RuntimeError) as error:
        raise WeightsError(f"pruned network {path} does not fit: {error}") from error
    for name, value in state.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise WeightsError(f'pruned network {path} holds weights that are no numbers: "{name}"')
        if name.endswith("running_var") and bool((value < 0).any()):
            raise WeightsError(f'pruned network {path} holds variances below 0: "{name}"')
    return PrunedNetwork(smaller.eval(), lineage)
