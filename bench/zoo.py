"""The part of zoo/README.md about units: each file's cut, shape, bytes, accuracy and hash, measured anew.

python -m bench.zoo
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from coinfer.compress.recipes import top1
from coinfer.compress.unit_file import load_unit
from coinfer.compress.unit_training import rates_of
from coinfer.data import load_source
from coinfer.files import write_atomically
from coinfer.model.zoo import weights_digest
from coinfer.report.table import TextTable, markdown

from .bottleneck import UNITS, path_of
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


def main() -> None:
    """Write the part anew; what is before it stays."""
    rows = tuple(row(name) for name, order in UNITS.items() if order.is_kept and path_of(name).is_file())
    before = README.read_text().split(HEADING)[0]
    table = markdown(TextTable(title="", columns=COLUMNS, rows=rows))
    write_atomically(README, f"{before}{HEADING}\n\n{table}\n{NOTE}".encode())


if __name__ == "__main__":
    main()
