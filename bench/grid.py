"""The grid of units without its cost: what `coinfer build` trains of it, beside every cell trained to its end.

    python -m bench.grid

Both begin from the same features, answers and recipe.  The papers' way starts each cell from principal components and
runs both phases; the build's starts it from the next wider one and drops what is dominated after the first phase.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from coinfer.build.bottlenecks import UnitTrainer
from coinfer.build.teachers import Teachers
from coinfer.build.wanted import wanted_units
from coinfer.compress.batches import Views, seen_by
from coinfer.compress.divided import Divided
from coinfer.compress.unit_training import Teacher, UnitTraining, rates_of, teacher_of
from coinfer.data import load_source
from coinfer.model.cut import split
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model, weights_digest
from coinfer.report.results import write_raw

from .cells import job_of, note_commit, show

JOB = "scenes-grid"
LOG = Path("docs/results/raw/bottleneck/grid.jsonl.gz")


def main() -> None:
    """Train the grid both ways and write what each unit sends and keeps on the images that choices are made on."""
    job = job_of(JOB)
    assert job.model.weights is not None
    model = build_model(job.model.source, weights=Path(job.model.weights))
    assert model.input_shape is not None
    graph = capture(model.module, torch.zeros(2, *model.input_shape))
    source = load_source(job.data.source)
    images, validation = source.images("train"), source.images("validation")
    lines: list[dict[str, Any]] = []

    def note(way: str, cut: str, divided: Divided) -> None:
        named = {"way": way, "cut": cut, "unit": divided.unit.spec.name}
        lines.extend({**named, **point._asdict()} for point in rates_of(divided, validation, model.preprocess))

    begun_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        choice = source.drawn("validation", job.build.rounds[-1])
        teachers = Teachers(model.module, graph, source, model.preprocess, choice, progress=show)
        grid = UnitTrainer(job, graph, weights_digest(model.module), teachers, Path(folder), progress=show)
        for task in grid.tasks():
            task.run()
    took_s = {"build": time.perf_counter() - begun_s}
    for trained in grid.units:
        note("build", trained.cut.name, trained.divided)

    begun_s = time.perf_counter()
    views = Views(is_mirrored=job.bottleneck.mirror, mixes=job.bottleneck.mixes)
    teacher: Teacher = teacher_of(graph, images, model.preprocess, views)
    seen: dict[str, torch.Tensor] = {}
    for cell in wanted_units(job.bottleneck, graph):
        name = cell.cut.name
        if name not in seen:
            head, _ = split(graph, cell.cut)
            seen = {name: seen_by(head, images.pixels, model.preprocess, views)}
        training = UnitTraining(graph, cell.cut, cell.spec, teacher, cell.recipe, features=seen[name])
        training.alone()
        training.together()
        note("every cell", name, training.divided)
        show("every cell", len(lines), 0, f"{name} {cell.spec.name}")
    took_s["every cell"] = time.perf_counter() - begun_s
    counts = {"num_cells": grid.num_cells, "num_begun": grid.num_begun, "num_finished": grid.num_finished}
    note_commit(LOG.parent, "grid")
    write_raw(LOG, [{"way": "counts", "took_s": took_s, **counts}, *lines])


if __name__ == "__main__":
    main()
