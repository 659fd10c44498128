"""The picture of a Pareto front: latency and loss of all plans that meet the constraints, those on the front joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ..search.solve import WAYS, Ranking
from ..units import format_duration
from .plots import GREY, ROLE_COLOURS, ROLE_MARKERS, legend_outside, new_figure, save, unit_axis

_NAMES = {"device": "device alone", "upload": "image upload", "split": "plain split", "unit": "split with a unit"}
_NUMBERED = 24


def plot_front(path: Path, ranking: Ranking, front: Sequence[int], *, title: str, note: str = "") -> None:
    """Draw loss over latency (log): every feasible plan faint, the front's with its number.

    The steps are the least loss within each latency; plans of the front off them are there for bytes, rate or energy.
    """
    figure, axes = new_figure(9.4, 5.4, title, note)
    table, latency_s = ranking.table, ranking.priced.latency_s
    rows = ranking.order[: ranking.num_feasible]
    on_front = np.array(front, dtype=np.int64)
    for way in WAYS:
        colour, marker = ROLE_COLOURS[way], ROLE_MARKERS[way]
        faint = [row for row in rows if table.ways[row] == way and row not in front]
        bold = [row for row in on_front if table.ways[row] == way]
        axes.plot(latency_s[faint], table.loss_points[faint], marker, color=colour, alpha=0.25, markersize=4)
        if bold:
            axes.plot(latency_s[bold], table.loss_points[bold], marker, color=colour, markersize=8, label=_NAMES[way])
    best, steps = np.inf, []
    for row in on_front[np.argsort(latency_s[on_front], kind="stable")]:
        if table.loss_points[row] < best:
            best = float(table.loss_points[row])
            steps.append((float(latency_s[row]), best))
    x, y = np.array(steps).T
    axes.step(x, y, where="post", color=GREY, linewidth=1.2, zorder=0)
    for row in on_front[:_NUMBERED]:
        place = (float(latency_s[row]), float(table.loss_points[row]))
        axes.annotate(
            str(int(table.numbers[row])), place, xytext=(5, 5), textcoords="offset points", fontsize=8, color=GREY
        )
    axes.set_xscale("log")
    axes.set_xlabel("latency of one request, estimated")
    axes.set_ylabel("loss (points)")
    unit_axis(axes.xaxis, format_duration, axes.get_xlim())
    axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    legend_outside(axes, axes.get_legend_handles_labels()[0])
    save(figure, path)
