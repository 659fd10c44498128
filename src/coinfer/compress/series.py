"""Step 2 of two-step pruning: from one network, for one cut, a series of ever fewer channels that cross.

Shi et al., 2019 (arXiv:1903.03472) prune only the layer before each cut, to log-spaced counts.  Here those are the
groups of channels that some layer before the cut makes and some layer behind it reads: of a residual sum all its makers
go together.  Each count begins with the network of the one before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from torch import Tensor, fx, nn

from ..errors import CutError
from ..model.cut import Cut, split
from ..model.graph import Graph
from ..model.naming import calls_of
from .channels import Channels
from .groups import Group
from .pruned_file import Stage
from .pruning import Pruned, PruneRecipe, Pruning
from .train import Step
from .unit_training import Teacher

COUNTS = 8


class Member(NamedTuple):
    """One network of a series: channels that cross, the network, what was done since the first, top-1 in percent."""

    num_channels: int
    pruned: Pruned
    lineage: tuple[Stage, ...]
    accuracy: float


def crossing_groups(channels: Channels, graph: Graph, cut: Cut) -> tuple[Group, ...]:
    """The groups whose channels cross at `cut`; `graph` is of the same network.

    Raises:
        CutError: none of them can be removed (says what was refused).
    """
    head, tail = (_layers(part) for part in split(graph, cut))
    found = tuple(
        group
        for group in channels.groups
        if any(part.name in head for part in group.makers) and any(part.name in tail for part in group.readers)
    )
    if not found:
        why = "".join(f'; "{name}": {reason}' for name, reason in channels.refused.items() if name in head)
        raise CutError(f'no channel that crosses at "{cut.name}" can be removed{why}')
    return found


def _layers(part: fx.GraphModule) -> set[str]:
    """The modules that run in a part of a network."""
    return {path for node in part.graph.nodes for path, _ in calls_of(node)}


def counts_below(size: int, counts: int | Sequence[int] = COUNTS) -> tuple[int, ...]:
    """So many log-spaced counts below `size`, down to 1, each once; or those given that are below.

    >>> counts_below(64, 3), counts_below(64, (80, 20, 10))
    ((16, 4, 1), (20, 10))
    """
    if isinstance(counts, int):
        spaced = np.geomspace(size, 1, counts + 1)[1:].round().astype(int)
        counts = tuple(dict.fromkeys(int(count) for count in spaced))
    return tuple(count for count in counts if count < size)


def series(
    module: nn.Module,
    example: Sequence[Tensor],
    graph: Graph,
    cut: Cut,
    teacher: Teacher,
    recipe: PruneRecipe,
    *,
    accuracy_of: Callable[[nn.Module], float],
    least_accuracy: float,
    counts: int | Sequence[int] = COUNTS,
    folder: Path | None = None,
    progress: Callable[[str, Step], None] | None = None,
) -> Iterator[Member]:
    """Networks of fewer and fewer channels at `cut`, until one is less accurate than `least_accuracy` percent.

    Args:
        module: the network to begin with, of which `graph` is the capture.
        example: what it is called with, a batch of 1.
        cut: where they cross.
        teacher: pictures with the unmodified network's logits.
        recipe: of each count, by its score and epochs; of its region what crosses goes, to these counts exactly.
        accuracy_of: a network's top-1 in percent, on images that choices are made on.
        least_accuracy: the series ends with the first network below it.
        counts: so many log-spaced ones, or which, falling.
        folder, progress: as for `Pruning`.

    Raises:
        CutError: no channel that crosses can be removed.
    """
    channels = Channels(module, example, region=recipe.region, ignore=recipe.ignore)
    groups = crossing_groups(channels, graph, cut)
    region = tuple({part.name: None for group in groups for part in group.makers})
    have = sum(group.size for group in groups)
    lineage: tuple[Stage, ...] = ()
    for count in counts_below(have, counts):
        if count < len(groups) * recipe.least:
            return
        step = msgspec.structs.replace(
            recipe, region=region, budget="channels", keep=count / have, multiple=1, rounds=1, epochs=0
        )
        pruned = Pruning(module, example, teacher, step, folder=folder, progress=progress).run()
        module, have = pruned.module, count
        lineage = (*lineage, Stage(recipe=step, rounds=pruned.rounds, taught=pruned.taught))
        member = Member(count, pruned, lineage, accuracy_of(module))
        yield member
        if member.accuracy < least_accuracy:
            return
