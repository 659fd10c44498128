"""The picture of bytes and accuracy: several ways of sending, each a line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import DataError
from ..plan import Value
from ..units import format_bytes
from .plots import GREY, legend_outside, new_figure, save, unit_axis


class RateCurve(Value, frozen=True, kw_only=True):
    """Bytes and accuracy of one way of sending: `points` of payload bytes and accuracy in percent.

    `group`: curves of one group share colour and marker, each name is its own where none is given.  `is_plain`: drawn
    thin and dashed, for what others of the group are compared with.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    group: str = ""
    is_plain: bool = False


_SERIES_COLOURS = ("#E69F00", "#CC79A7", "#56B4E9", "#0072B2", "#009E73", "#D55E00", "#000000", "#999999")
_SERIES_MARKERS = ("^", "v", "o", "s", "D", "P", "X", "*")


def plot_rates(
    path: Path, curves: Sequence[RateCurve], *, title: str, reference: float | None = None, note: str = ""
) -> None:
    """Draw accuracy over payload bytes (log) of several ways of sending, each a line, each group in its own colour.

    `reference`: accuracy of the unmodified network in percent, a line across.  Curves without a point are left out.

    Raises:
        DataError: no curve has a point.
    """
    drawn = [curve for curve in curves if curve.points]
    if not drawn:
        raise DataError("a plot of bytes and accuracy needs a curve with a point, got none")
    figure, axes = new_figure(9.4, 5.4, title, note)
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle="--", linewidth=1.2, label="unmodified network")
    groups = list(dict.fromkeys(curve.group or curve.name for curve in drawn))
    for curve in drawn:
        index = groups.index(curve.group or curve.name)
        x, y = np.array(sorted(curve.points)).T
        style: dict[str, Any] = {"linewidth": 1.8, "markersize": 6}
        if curve.is_plain:
            style = {"linewidth": 1.0, "markersize": 4, "linestyle": ":"}
        colour = _SERIES_COLOURS[index % len(_SERIES_COLOURS)]
        axes.plot(x, y, color=colour, marker=_SERIES_MARKERS[index % len(_SERIES_MARKERS)], label=curve.name, **style)
    best = max(accuracy for curve in drawn for _, accuracy in curve.points)
    top = max(best, reference or 0.0)
    worst = min(accuracy for curve in drawn for _, accuracy in curve.points)
    # What has lost all says nothing, and would press the rest together.
    axes.set_ylim(max(worst, top - 12) - 0.4, top + 0.8)
    axes.set_xscale("log")
    axes.set_xlabel("payload of one request")
    axes.set_ylabel("top-1 accuracy (%)")
    unit_axis(axes.xaxis, format_bytes, axes.get_xlim())
    axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    legend_outside(axes, axes.get_legend_handles_labels()[0])
    save(figure, path)
