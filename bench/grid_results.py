"""The part of docs/results/bottleneck about the grid of units: how many were trained, and what that lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coinfer.report.results import Row, read_raw
from coinfer.report.table import TextTable, markdown

from .grid import LOG

# Points of top-1 below the best unit of either way at a cut.
LOSSES = (0.25, 0.5, 1.0, 2.0)


def rows() -> list[Row]:
    """Trainings of the whole grid, those begun and those ended."""
    if not LOG.is_file():
        return []
    counts = read_raw(LOG)[0]
    whole = counts["num_cells"]
    texts = {"begun": "first phase only or to its end", "finished": "both phases"}
    return [
        Row(
            name=f"grid_share_{key}", value=counts[f"num_{key}"] / whole, unit="share", how="measured", n=whole,
            against=f"the papers' grid of {whole} trainings; {text}", raw=LOG.name,
        )
        for key, text in texts.items()
    ]  # fmt: skip


def text() -> list[str]:
    """Fewest bytes within some points of loss at each cut, by the build's way and by the papers'."""
    if not LOG.is_file():
        return []
    counts, *lines = read_raw(LOG)
    found = []
    for cut in dict.fromkeys(line["cut"] for line in lines):
        here = [line for line in lines if line["cut"] == cut]
        best = max(line["accuracy"] for line in here)
        for loss in LOSSES:
            sizes = [_fewest([c for c in here if c["way"] == way], best - loss) for way in ("build", "every cell")]
            found.append((cut, f"{best - loss:.2f}", *sizes))
    took_s = counts["took_s"]
    title = (
        f"scene-resnet, {counts['num_cells']} cells: the build began {counts['num_begun']} and ended "
        f"{counts['num_finished']} ({took_s['build']:.0f} s); every cell to its end took {took_s['every cell']:.0f} s; "
        "bytes by the prior on the images that choices are made on"
    )
    columns = ("cut", "top-1 % at least", "B, the build's way", "B, every cell")
    return ["## The grid", "", markdown(TextTable(columns=columns, rows=tuple(found), title=title)), ""]


def _fewest(lines: Sequence[dict[str, Any]], accuracy: float) -> str:
    fine = [line for line in lines if line["accuracy"] >= accuracy]
    if not fine:
        return "none"
    best = min(fine, key=lambda line: line["num_bytes"])
    return f"{best['num_bytes']:.1f} ({best['unit']})"
