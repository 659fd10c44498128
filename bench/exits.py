"""Exits of networks on CIFAR-10: classifiers trained with the network frozen, kept in zoo/exits.

python -m bench.exits NETWORK...    minutes each; one that is there already is left
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

from coinfer.compress.batches import Views
from coinfer.compress.exit_file import TrainedExits, save_exits
from coinfer.compress.exits import ExitRecipe, ExitSpec, train_exits
from coinfer.data import load_source
from coinfer.model.zoo import weights_digest

from .epochs import Epochs, say
from .trainees import CHECKPOINTS, RESNET20, RESNET56, Trainee, network, taught

FOLDER = Path("zoo/exits")


class ExitOrder(NamedTuple):
    """Exits to train: of which network, where, of what shape, how."""

    trainee: Trainee
    cuts: tuple[str, ...]
    spec: ExitSpec = ExitSpec(width=128, depth=2)
    recipe: ExitRecipe = ExitRecipe(epochs=20)


# With labels, which mixed pictures have not; the same cuts as units have, where there are any.
VIEWS = Views(is_mirrored=True)
EXITS = {
    "resnet56": ExitOrder(RESNET56._replace(views=VIEWS), ("layer2.8#0", "layer3.3#0")),
    "resnet20": ExitOrder(RESNET20._replace(views=VIEWS), ("layer2.2#0", "layer3.1#0")),
}


def path_of(name: str) -> Path:
    """Where the exits of a network lie."""
    return FOLDER / f"{name}.safetensors"


def train(name: str) -> None:
    """Train the exits of one network and keep them."""
    path, order = path_of(name), EXITS[name]
    if path.is_file():
        say(f"{path} is there already")
        return
    model, graph = network(order.trainee)
    teacher = taught(order.trainee, graph, load_source(order.trainee.source), model)
    cuts = tuple(graph.cut(cut) for cut in order.cuts)
    folder = CHECKPOINTS / f"{name}.exits"
    heads = train_exits(graph, cuts, order.spec, teacher, order.recipe, checkpoints=folder, progress=Epochs())
    path.parent.mkdir(parents=True, exist_ok=True)
    save_exits(TrainedExits(cuts, heads, order.spec, order.recipe, {}), path, network=weights_digest(model.module))


def main(names: list[str]) -> None:
    """Train those of each name."""
    if not names or not set(names) <= set(EXITS):
        raise SystemExit(f"usage: python -m bench.exits {'|'.join(EXITS)}...")
    for name in names:
        train(name)


if __name__ == "__main__":
    main(sys.argv[1:])
