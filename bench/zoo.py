"""The parts of zoo/README.md that are tables: what each file is, measured anew.

python -m bench.zoo [units] [exits] [trained] [pruned]      (all of them where none is named)
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from coinfer.build.workshop import safe_name
from coinfer.compress.batches import Views, seen_by
from coinfer.compress.exit_file import load_exits
from coinfer.compress.pruned_file import load_pruned
from coinfer.compress.recipes import top1
from coinfer.compress.train import load_tensors
from coinfer.compress.unit_file import load_unit
from coinfer.compress.unit_training import rates_of
from coinfer.data import load_source
from coinfer.files import write_atomically
from coinfer.model.cut import split
from coinfer.model.zoo import ZOO, build_model, weights_digest
from coinfer.report.table import TextTable, markdown

from . import exits
from .bottleneck import UNITS, path_of
from .exits import EXITS
from .packed import unpack
from .pruning import KEPT, PRUNED
from .trainees import network

README = Path("zoo/README.md")


class Part(NamedTuple):
    """A section of the page: its heading, its table's columns and rows, what is said below."""

    heading: str
    columns: tuple[str, ...]
    rows: Callable[[], tuple[tuple[str, ...], ...]]
    note: str

    def text(self) -> str:
        """The section, measured now; nothing where there is no file."""
        rows = self.rows()
        table = markdown(TextTable(title="", columns=self.columns, rows=rows))
        return f"# {self.heading}\n\n{table}\n{self.note}" if rows else ""


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
    """One pruned network's line; its file's name begins with the `safe_name` of the network of the zoo."""
    name = next(name for name in ZOO if safe_name(name) == path.name.partition(".")[0])
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


def trained_row(path: Path) -> tuple[str, ...]:
    """One network's line, as it is kept; its file's name is that of the network of the zoo."""
    model = build_model(path.stem)
    model.module.load_state_dict(unpack(load_tensors(path, "trained network")[0]))
    found = []
    for part in ("validation", "test"):
        images = load_source("cifar10").images(part)
        found.append(f"{100 * top1(model.module, images.pixels, images.labels, model.preprocess):.2f}")
    return (
        f"trained/{path.name}",
        f"`{path.stem}`",
        f"{sum(weight.numel() for weight in model.module.parameters()):,}",
        *found,
        str(path.stat().st_size),
        f"`{hashlib.sha256(path.read_bytes()).hexdigest()}`",
    )


PARTS = {
    "units": Part(
        "Units trained around a cut",
        (
            *("file", "network", "cut", "made by", "unit", "B by its prior, 2,000 validation pictures"),
            *("top-1 % there (the network)", "bytes", "sha256"),
        ),
        lambda: tuple(row(name) for name, order in UNITS.items() if order.is_kept and path_of(name).is_file()),
        """
Made by `python -m bench.bottleneck train NAME` with torch 2.13.0 (CPU build, bfloat16), seed 0, on the training
pictures of the network's data: as they are, mirrored (not the digits), and mixed with another. Networks
for CIFAR-10 have the given weights. A job uses a unit by `[bottleneck] units = ["zoo/units/FILE"]`; `make demo` has
those of `scene-resnet`. This table: `python -m bench.zoo`.
""",
    ),
    "exits": Part(
        "Exits",
        (
            *("file", "network", "cuts", "classifier", "top-1 % there, 2,000 validation pictures (the network)"),
            *("bytes", "sha256"),
        ),
        lambda: tuple(exit_row(name) for name in EXITS if exits.path_of(name).is_file()),
        """
Made by `python -m bench.exits NETWORK` with torch 2.13.0 (CPU build), seed 0, the network frozen, on the training
pictures as they are and mirrored. A job uses them by `[exits] files = ["zoo/exits/FILE"]`.
""",
    ),
    "trained": Part(
        "Networks trained on",
        (
            *("file", "network", "parameters", "top-1 %, 2,000 validation pictures", "top-1 %, 8,000 test pictures"),
            *("bytes", "sha256"),
        ),
        lambda: tuple(map(trained_row, sorted(KEPT.glob("*.safetensors")))),
        """
Made by `python -m bench.pruning train NAME`, seed 0, bfloat16, from warm starts, on CIFAR-10's labels and the answers
of the ResNet-56 that is given: vgg16 with torch 2.13.0 on two CPU cores (`python -m bench.winograd`); resnet18-half
with torch 2.11.0 on one H200, in the end on the answers of a ResNet-18 of full width, which learnt in the same way and
is too large to be kept. Weights are kept with 8 bits each and a scale for each output channel (`bench/packed.py`), and
what is measured and pruned is the network of just these: `python -m bench.pruning train NAME` writes it to out/pruning.
""",
    ),
    "pruned": Part(
        "Pruned networks",
        (
            *("file", "network", "pruned to", "parameters", "top-1 % there, 2,000 validation pictures", "bytes"),
            "sha256",
        ),
        lambda: tuple(map(pruned_row, sorted(PRUNED.glob("*.safetensors")))),
        """
Made by `python -m bench.winograd bench.pruning build JOB`, with torch 2.13.0 (CPU build, bfloat16), seed 0, on CIFAR-10
(those of ResNet-20 by torch's own convolutions; so, in float32, the last 34 of resnet18_half.k0.345's 60 epochs, those
before on one H200), and kept in 16 bits by `python -m bench.pruning keep JOB NETWORK`; vgg16.k0.165 is the file of the
build itself, in 32 bits. Each file has all weights of its network, and in its header every recipe and what was removed
(those of ResNet-20, made last, also what they were trained on):
`load_pruned(file, build_model(NETWORK).module, (example,), network=None)` gives the network (docs/pruning.md).
""",
    ),
}


def main(words: list[str]) -> None:
    """Write parts anew; the others, and what is before them, stay."""
    if not set(words) <= set(PARTS):
        raise SystemExit(f"usage: python -m bench.zoo {' '.join(f'[{name}]' for name in PARTS)}")
    intro, *sections = README.read_text().split("\n# ")
    known = {section.partition("\n")[0]: f"# {section}" for section in sections}
    texts = [
        part.text() if not words or name in words else known.get(part.heading, "") for name, part in PARTS.items()
    ]
    page = "\n\n".join(text.strip() for text in (intro, *texts) if text)
    write_atomically(README, f"{page}\n".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
