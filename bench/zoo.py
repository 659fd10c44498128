"""The parts of zoo/README.md about units, exits and pruned networks: what each file is, measured anew.

python -m bench.zoo
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from coinfer.compress.batches import Views, seen_by
from coinfer.compress.exit_file import load_exits
from coinfer.compress.pruned_file import load_pruned
from coinfer.compress.recipes import top1
from coinfer.compress.unit_file import load_unit
from coinfer.compress.unit_training import rates_of
from coinfer.data import load_source
from coinfer.files import write_atomically
from coinfer.model.cut import split
from coinfer.model.zoo import build_model, weights_digest
from coinfer.report.table import TextTable, markdown

from . import exits
from .bottleneck import UNITS, path_of
from .exits import EXITS
from .trainees import network

README = Path("zoo/README.md")
HEADING = "# Units trained around a cut"
COLUMNS = ("file", "network", "cut", "made by", "unit", "B by its prior, 2,000 validation pictures")
COLUMNS += ("top-1 % there (the network)", "bytes", "sha256")
NOTE = """
Made by `python -m bench.bottleneck train NAME` with torch 2.13.0 (CPU build, bfloat16), seed 0, on the training
pictures of the network's data: as they are, mirrored (not the digits), and mixed with another. Networks
for CIFAR-10 have the given weights. A job uses a unit by `[bottleneck] units = ["zoo/units/FILE"]`; `make demo` has
those of `scene-resnet`. This table: `python -m bench.zoo`.
"""
EXIT_HEADING = "# Exits"
EXIT_COLUMNS = ("file", "network", "cuts", "classifier", "top-1 % there, 2,000 validation pictures (the network)")
EXIT_COLUMNS += ("bytes", "sha256")
EXIT_NOTE = """
Made by `python -m bench.exits NETWORK` with torch 2.13.0 (CPU build), seed 0, the network frozen, on the training
pictures as they are and mirrored. A job uses them by `[exits] files = ["zoo/exits/FILE"]`.
"""
PRUNED = Path("zoo/pruned")
PRUNED_HEADING = "# Pruned networks"
PRUNED_COLUMNS = ("file", "network", "pruned to", "parameters", "top-1 % there, 2,000 validation pictures", "bytes")
PRUNED_COLUMNS += ("sha256",)
PRUNED_NOTE = """
Of `BUNDLE.work/pruned` after `python -m bench.pruning build JOB`, with torch 2.13.0 (CPU build, bfloat16), seed 0, on
CIFAR-10. Each file has all weights of its network, and in its header every recipe and what was removed:
`load_pruned(file, build_model(NETWORK).module, (example,), network=None)` gives the network (docs/pruning.md).
"""


def row(name: str) -> tuple[str, ...]:
    """One unit's line."""
    order, path = UNITS[name], path_of(name)
    model, graph = network(order.trainee)
    unit = load_unit(path, graph, network=weights_digest(model.module))
    images = load_source(order.trainee.source).images("validation")
    points = rates_of(unit.divided, images, model.preprocess)
    own = 100 * top1(model.module, images.pixels, images.labels, model.preprocess)
    spec = unit.divided.unit.spec
    blocks = f", residual blocks before the code: {spec.prepare}" if spec.prepare else ""
    return (
        f"units/{path.name}",
        f"`{order.trainee.name}`",
        f"`{order.cut}`",
        f"`train {name}`",
        f"{spec.width} channels, stride {spec.stride}, {spec.bits} bits{blocks}",
        " / ".join(f"{point.num_bytes:.1f}" for point in points),
        " / ".join(f"{point.accuracy:.2f}" for point in points) + f" ({own:.2f})",
        str(path.stat().st_size),
        f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
    )


def exit_row(name: str) -> tuple[str, ...]:
    """One line of exits."""
    order, path = EXITS[name], exits.path_of(name)
    model, graph = network(order.trainee)
    trained = load_exits(path, graph, network=weights_digest(model.module))
    images = load_source(order.trainee.source).images("validation")
    found = []
    for cut, classifier in zip(trained.cuts, trained.heads, strict=True):
        (features,) = seen_by(split(graph, cut)[0], images.pixels, model.preprocess, Views(is_mirrored=False))
        with torch.no_grad():
            answers = torch.cat([classifier(part.float()).argmax(1) for part in features.split(250)])
        found.append(100 * float(np.mean(answers.numpy() == images.labels)))
    own = 100 * top1(model.module, images.pixels, images.labels, model.preprocess)
    return (
        f"exits/{path.name}",
        f"`{order.trainee.name}`",
        ", ".join(f"`{cut.name}`" for cut in trained.cuts),
        f"{trained.spec.width} channels, {trained.spec.depth} convolutions",
        " / ".join(f"{accuracy:.2f}" for accuracy in found) + f" ({own:.2f})",
        str(path.stat().st_size),
        f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
    )


def pruned_row(path: Path) -> tuple[str, ...]:
    """One pruned network's line; its file's name begins with that of the network of the zoo."""
    name = path.name.partition(".")[0]
    model = build_model(name)
    assert model.input_shape is not None
    module, lineage = load_pruned(path, model.module, (torch.zeros(1, *model.input_shape),), network=None)
    images = load_source("cifar10").images("validation")
    return (
        f"pruned/{path.name}",
        f"`{name}`",
        ", then ".join(f"{stage.recipe.keep:.3g} of its {stage.recipe.budget}" for stage in lineage),
        f"{sum(weight.numel() for weight in module.parameters()):,}",
        f"{100 * top1(module, images.pixels, images.labels, model.preprocess):.2f}",
        str(path.stat().st_size),
        f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
    )


def main() -> None:
    """Write the parts anew; what is before them stays."""
    rows = tuple(row(name) for name, order in UNITS.items() if order.is_kept and path_of(name).is_file())
    before = README.read_text().split(HEADING)[0]
    table = markdown(TextTable(title="", columns=COLUMNS, rows=rows))
    exit_rows = tuple(exit_row(name) for name in EXITS if exits.path_of(name).is_file())
    exit_table = markdown(TextTable(title="", columns=EXIT_COLUMNS, rows=exit_rows))
    text = f"{before}{HEADING}\n\n{table}\n{NOTE}\n{EXIT_HEADING}\n\n{exit_table}\n{EXIT_NOTE}"
    if pruned_rows := tuple(map(pruned_row, sorted(PRUNED.glob("*.safetensors")))):
        pruned_table = markdown(TextTable(title="", columns=PRUNED_COLUMNS, rows=pruned_rows))
        text += f"\n{PRUNED_HEADING}\n\n{pruned_table}\n{PRUNED_NOTE}"
    write_atomically(README, text.encode())


if __name__ == "__main__":
    main()
