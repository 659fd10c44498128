"""Pictures of results, as PNG: latency over rate, the regime map, bytes against accuracy.

Colours are Okabe and Ito's, which the colour-blind tell apart, and no picture relies on colour alone: lines
have markers of their own, cells carry text. Figures are built without pyplot, so nothing here
keeps state or opens a window, and equal input gives an equal file.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from numpy.typing import NDArray

from ..errors import DataError
from ..files import write_atomically
from ..plan import Candidate, Kind, Value, Way
from ..search.menu import Cell, RegimeMap
from ..units import format_bytes, format_duration, format_rate
from .table import ratio_text

ROLE_COLOURS = {"chosen": "#000000", "device": "#0072B2", "upload": "#E69F00", "split": "#009E73", "unit": "#D55E00"}
ROLE_MARKERS = {"chosen": "o", "device": "s", "upload": "^", "split": "D", "unit": "P"}
ROLE_NAMES = {
    "chosen": "chosen plan",
    "device": "best on the device alone",
    "upload": "best image upload",
    "split": "best plain split",
    "unit": "best split with a unit",
}
GREY = "#666666"
_EMPTY = "#eeeeee"
# The gain at which a cell of the regime map has its kind's full colour.
_DEEPEST_RATIO = 8.0

Floats = NDArray[np.float64]


class Curve(Value, frozen=True, kw_only=True):
    """Latency over rate of one line of a plot.

    `role` is "chosen" or a way of running and gives the line its colour. A measured curve has markers, and
    bars from `low_s` to `high_s` (say the 5th and 95th percentile) where given; an estimated one is dashed.
    """

    role: str
    rates_bps: tuple[float, ...]
    latencies_s: tuple[float, ...]
    low_s: tuple[float, ...] = ()
    high_s: tuple[float, ...] = ()
    is_measured: bool = True


def plot_latency(path: Path, curves: Sequence[Curve], *, title: str, note: str = "") -> None:
    """Draw latency over link rate, both logarithmic; `note` says on what it was measured.

    Raises:
        DataError: no curves, a role without a colour, or a curve whose lengths differ.
    """
    _check_curves(curves)
    figure, axes = new_figure(8.6, 4.8, title, note)
    for curve in sorted(curves, key=lambda curve: curve.role == "chosen"):
        _draw_curve(axes, curve)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("link rate")
    axes.set_ylabel("latency of one request")
    unit_axis(axes.xaxis, format_rate, axes.get_xlim())
    unit_axis(axes.yaxis, format_duration, axes.get_ylim())
    axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    handles = [
        Line2D([], [], label=name, **_line_style(role))
        for role, name in ROLE_NAMES.items()
        if any(curve.role == role and curve.is_measured for curve in curves)
    ]
    handles += [
        Line2D([], [], color=ROLE_COLOURS[role], linestyle="--", label=f"{name}, estimated")
        for role, name in ROLE_NAMES.items()
        if any(curve.role == role and not curve.is_measured for curve in curves)
    ]
    if any(curve.low_s for curve in curves):
        handles.append(
            Line2D([], [], color=GREY, marker="|", markersize=9, linestyle="none", label="5th to 95th percentile")
        )
    legend_outside(axes, handles)
    save(figure, path)


def _check_curves(curves: Sequence[Curve]) -> None:
    if not curves:
        raise DataError("a latency plot needs at least one curve, got none")
    for curve in curves:
        if curve.role not in ROLE_NAMES:
            raise DataError(f'a curve\'s role must be one of {", ".join(ROLE_NAMES)}, got "{curve.role}"')
        lengths = {len(curve.latencies_s), len(curve.low_s or curve.rates_bps), len(curve.high_s or curve.rates_bps)}
        if lengths != {len(curve.rates_bps)} or bool(curve.low_s) != bool(curve.high_s):
            raise DataError(f'a curve needs as many latencies as rates, and both percentiles (curve "{curve.role}")')


def _line_style(role: str) -> dict[str, Any]:
    """How a measured line looks.

    The chosen plan always lies on one of the others: rings without a line let that one show through.
    """
    style: dict[str, Any] = {"color": ROLE_COLOURS[role], "marker": ROLE_MARKERS[role]}
    if role == "chosen":
        return {**style, "markersize": 11, "markerfacecolor": "none", "markeredgewidth": 1.6, "linestyle": "none"}
    return {**style, "markersize": 5.5, "linewidth": 1.8}


def _draw_curve(axes: Axes, curve: Curve) -> None:
    x, y = np.array(curve.rates_bps), np.array(curve.latencies_s)
    if not curve.is_measured:
        axes.plot(x, y, color=ROLE_COLOURS[curve.role], linestyle="--", linewidth=1.2)
        return
    if curve.low_s:
        low, high = np.array(curve.low_s), np.array(curve.high_s)
        axes.vlines(x, low, high, color=ROLE_COLOURS[curve.role], linewidth=1.2, alpha=0.6)
    axes.plot(x, y, **_line_style(curve.role))


def plot_regimes(
    path: Path,
    regimes: RegimeMap,
    *,
    title: str,
    note: str = "",
    measured: Sequence[tuple[float, float]] = (),
) -> None:
    """Draw which kind of plan wins over rate and slowdown, with its gain over the best of another kind.

    Each cell has its kind's colour, the deeper the larger the gain, and the gain as text where
    the map is coarse enough to read it. A dot marks each `measured` (rate in bit/s, slowdown).
    """
    figure, axes = new_figure(9.8, 5.0, title, note)
    x, y = _borders(regimes.rates_bps), _borders(regimes.slowdowns)
    picture = np.array([[_shade(cell) for cell in row] for row in regimes.cells])
    axes.pcolormesh(x, y, picture)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(x[0], x[-1])
    axes.set_ylim(y[0], y[-1])
    _draw_borders(axes, regimes, x, y)
    _write_ratios(axes, regimes, measured)
    for rate_bps, slowdown in measured:
        axes.plot(rate_bps, slowdown, "o", color="black", markeredgecolor="white", markersize=6)
    axes.set_xlabel("link rate")
    axes.set_ylabel("device slowdown (fp32)")
    unit_axis(axes.xaxis, format_rate, axes.get_xlim())
    unit_axis(axes.yaxis, lambda factor: f"{factor:g}x", axes.get_ylim())
    kinds = {cell.kind for row in regimes.cells for cell in row}
    names: dict[Kind, str] = {"device": "device alone", "upload": "image upload", "split": "split"}
    handles: list[Line2D | Patch] = [
        Patch(color=ROLE_COLOURS[kind], label=f"{name} wins") for kind, name in names.items() if kind in kinds
    ]
    if None in kinds:
        handles.append(Patch(facecolor=_EMPTY, edgecolor=GREY, label="nothing is feasible"))
    if measured:
        dot: dict[str, Any] = {"marker": "o", "color": "black", "markeredgecolor": "white", "linestyle": "none"}
        handles.append(Line2D([], [], label="measured as well", **dot))
    legend_outside(axes, handles, title="2.3x: winner over the best\nplan of another kind")
    save(figure, path)


def _draw_borders(axes: Axes, regimes: RegimeMap, x: Floats, y: Floats) -> None:
    """A dark line wherever neighbouring cells have winners of different kinds."""
    kinds = [[cell.kind for cell in row] for row in regimes.cells]
    lines: list[list[tuple[float, float]]] = []
    for j, row in enumerate(kinds):
        for i, kind in enumerate(row):
            if i + 1 < len(row) and row[i + 1] != kind:
                lines.append([(x[i + 1], y[j]), (x[i + 1], y[j + 1])])
            if j + 1 < len(kinds) and kinds[j + 1][i] != kind:
                lines.append([(x[i], y[j + 1]), (x[i + 1], y[j + 1])])
    axes.add_collection(LineCollection(lines, colors="#222222", linewidths=1.4, capstyle="projecting"))


def _write_ratios(axes: Axes, regimes: RegimeMap, measured: Sequence[tuple[float, float]]) -> None:
    """The gains as text: above each measured dot, and elsewhere where there is room within one kind."""
    width, height = 0.072, 0.062  # of a text, as shares of the axes
    x, y = _shares(regimes.rates_bps, axes.get_xlim()), _shares(regimes.slowdowns, axes.get_ylim())
    dots_x = _shares([rate_bps for rate_bps, _ in measured], axes.get_xlim())
    dots_y = _shares([slowdown for _, slowdown in measured], axes.get_ylim())
    for u, v in zip(dots_x, dots_y, strict=True):
        cell = regimes.cells[int(np.argmin(abs(y - v)))][int(np.argmin(abs(x - u)))]
        _write_ratio(axes, cell, u, v, raised_pt=3.5)
    for j in _spaced(len(y), 14):
        for i in _spaced(len(x), 12):
            if ((abs(dots_x - x[i]) < width) & (abs(dots_y - y[j]) < height)).any():
                continue
            rows, columns = np.flatnonzero(abs(y - y[j]) < height / 2), np.flatnonzero(abs(x - x[i]) < width / 2)
            if len({regimes.cells[m][n].kind for m in rows for n in columns}) == 1:
                _write_ratio(axes, regimes.cells[j][i], x[i], y[j], raised_pt=0)


def _shares(values: Sequence[float], limits: tuple[float, float]) -> Floats:
    """Where values lie on a log axis, from 0 to 1."""
    low, high = np.log(limits)
    return np.asarray((np.log(np.array(values, dtype=np.float64)) - low) / (high - low))


def _write_ratio(axes: Axes, cell: Cell, x: float, y: float, *, raised_pt: float) -> None:
    if cell.ratio is None:
        return
    axes.annotate(
        ratio_text(cell.ratio),
        (x, y),
        xycoords="axes fraction",
        xytext=(0, raised_pt),
        textcoords="offset points",
        ha="center",
        va="bottom" if raised_pt else "center_baseline",
        fontsize=8,
        color=_ink(_shade(cell)),
    )


def _spaced(count: int, most: int) -> range:
    """About `most` evenly spaced places of `count`, off both ends where some are left out."""
    step = math.ceil(count / most)
    return range(step // 2, count, step)


def _ink(background: tuple[float, float, float]) -> str:
    """Black or white, whichever is easier to read on a colour."""
    red, green, blue = background
    return "white" if 0.299 * red + 0.587 * green + 0.114 * blue < 0.52 else "black"


def _shade(cell: Cell) -> tuple[float, float, float]:
    """The kind's colour, mixed with white where the gain over the runner-up is small."""
    if cell.kind is None:
        return to_rgb(_EMPTY)
    gain = _DEEPEST_RATIO if cell.ratio is None else cell.ratio
    strength = 0.3 + 0.7 * min(1.0, math.log(max(gain, 1.0)) / math.log(_DEEPEST_RATIO))
    red, green, blue = (1.0 - strength * (1.0 - part) for part in to_rgb(ROLE_COLOURS[cell.kind]))
    return red, green, blue


def _borders(centres: Sequence[float]) -> Floats:
    """Cell borders on a log axis: geometric means of neighbours, the outer ones mirrored."""
    x = np.array(centres, dtype=np.float64)
    if x.size == 1:
        return np.array([x[0] / 1.5, x[0] * 1.5])
    middle = np.sqrt(x[1:] * x[:-1])
    return np.concatenate([[x[0] ** 2 / middle[0]], middle, [x[-1] ** 2 / middle[-1]]])


def plot_accuracy(
    path: Path,
    candidates: Sequence[Candidate],
    *,
    title: str,
    note: str = "",
    reference: float | None = None,
    is_agreement: bool = False,
) -> None:
    """Draw accuracy over payload bytes (log): every measured candidate that sends, and each way's frontier.

    Device-only plans send nothing: their best is a line across, as is `reference`, the accuracy of the
    unmodified network in percent.

    Raises:
        DataError: no candidate has a measured accuracy.
    """
    known = [c for c in candidates if c.evidence.accuracy is not None]
    if not known:
        raise DataError("an accuracy plot needs a candidate with a measured accuracy, got none")
    figure, axes = new_figure(8.6, 4.8, title, note)
    ways: tuple[Way, ...] = ("upload", "split", "unit")
    for way in ways:
        points = [(c.evidence.payload_bytes, (c.evidence.accuracy or 0.0)) for c in known if c.plan.way == way]
        if points:
            _draw_frontier(axes, points, way)
    best = max(((c.evidence.accuracy or 0.0) for c in known if c.plan.kind == "device"), default=None)
    if reference is not None:
        axes.axhline(reference, color=GREY, linestyle="--", linewidth=1.2, label="unmodified network")
    if best is not None:
        axes.axhline(best, color=ROLE_COLOURS["device"], linewidth=1.4, label="best on the device alone")
    axes.set_xscale("log")
    axes.set_xlabel("payload of one request")
    axes.set_ylabel("agreement with the unmodified network (%)" if is_agreement else "top-1 accuracy (%)")
    unit_axis(axes.xaxis, format_bytes, axes.get_xlim())
    axes.grid(True, which="major", color="#e2e2e2", linewidth=0.8)
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    legend_outside(axes, handles)
    save(figure, path)


def _draw_frontier(axes: Axes, points: Sequence[tuple[float, float]], way: Way) -> None:
    """All points faint; those that none beats in both bytes and accuracy joined by steps."""
    colour, marker = ROLE_COLOURS[way], ROLE_MARKERS[way]
    x, y = np.array(points).T
    axes.plot(x, y, marker, color=colour, markersize=4, alpha=0.25, markeredgewidth=0)
    frontier: list[tuple[float, float]] = []
    for point in sorted(points, key=lambda point: (point[0], -point[1])):
        if not frontier or point[1] > frontier[-1][1]:
            frontier.append(point)
    x, y = np.array(frontier).T
    axes.step(
        x, y, where="post", color=colour, marker=marker, markersize=5.5, linewidth=1.8, label=ROLE_NAMES[way]
    )


def new_figure(width_in: float, height_in: float, title: str, note: str) -> tuple[Figure, Axes]:
    """An empty picture with a title at the left and a note below it in small grey type."""
    figure = Figure(figsize=(width_in, height_in), dpi=140, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    lines = note.count("\n") + 1 if note else 0
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", pad=8 + 13 * lines)
    if note:
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        axes.annotate(note, (0, 1), xytext=(0, 6), va="bottom", fontsize=8.5, color=GREY, **place)
    return figure, axes


def unit_axis(axis: Axis, write: Callable[[float], str], limits: tuple[float, float]) -> None:
    """Ticks with units: every decade, and 2 and 5 between where the axis spans little."""
    decades = math.log10(limits[1] / limits[0])
    subs = (1.0,) if decades > 2.8 else (1.0, 2.0, 5.0) if decades > 0.8 else tuple(np.arange(1.0, 10.0, 1.0))
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: write(value)))
    axis.set_minor_formatter(NullFormatter())
    axis.set_tick_params(labelsize=9)


def legend_outside(axes: Axes, handles: Sequence[Artist], *, title: str | None = None) -> None:
    """A legend beside the axes, at the right."""
    legend = axes.legend(
        handles=list(handles),
        title=title,
        loc="upper left",
        bbox_to_anchor=(1.01, 1.0),
        frameon=False,
        fontsize=9,
        title_fontsize=9,
        alignment="left",
        borderaxespad=0.0,
        labelspacing=0.8,
    )
    legend.set_in_layout(True)


def save(figure: Figure, path: Path) -> None:
    """Write the PNG atomically, without the date or the version of the drawing library in it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
