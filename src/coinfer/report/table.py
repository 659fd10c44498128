"""Text tables: one plain value, `TextTable`, and three ways to show it (terminal, text, Markdown).

Each function here turns one result into a `TextTable`; none computes a figure. Ratios are written so
that above 1 means "the chosen plan is better", as `2.1x`.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table as RichTable
from rich.text import Text

from ..plan import Candidate, Kind, Value, Way
from ..search.menu import Cell, RegimeMap
from ..search.solve import WAYS, Ranking, RankingRow
from ..units import format_bytes, format_duration, format_rate

KIND_STYLES = {"device": "blue", "upload": "yellow", "split": "green", "unit": "green"}


class TextTable(Value, frozen=True, kw_only=True):
    """A title, columns, and rows of text; `right` names the columns that are aligned right."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    right: tuple[str, ...] = ()
    note: str = ""


class BenchCell(Value, frozen=True, kw_only=True):
    """The chosen plan at one rate and slowdown, measured, beside the baselines.

    `latency_p50_s` and `latency_p95_s` were measured over `num_requests` requests, `estimated_s` is the
    price of the same plan; `ratios` maps each way to that baseline's median over the chosen plan's.
    None where it was not measured.
    """

    rate_bps: float
    slowdown: float
    kind: Kind
    label: str
    latency_p50_s: float
    latency_p95_s: float
    estimated_s: float
    payload_bytes: float
    wire_bytes: float
    num_requests: int
    accuracy: float | None = None
    throughput_hz: float | None = None
    ratios: dict[Way, float] = {}


def rich_table(table: TextTable) -> RichTable:
    """The table for a terminal; a cell that is a kind of plan has that kind's colour."""
    shown = RichTable(
        title=table.title or None,
        caption=table.note or None,
        box=box.SIMPLE_HEAD,
        title_justify="left",
        caption_justify="left",
    )
    for column in table.columns:
        shown.add_column(column, justify="right" if column in table.right else "left", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(cell, style=KIND_STYLES.get(cell.split(" ")[0], "")) for cell in row))
    return shown


def plain_text(table: TextTable) -> str:
    """The table in columns of spaces, one line a row."""
    widths = [max(len(line[k]) for line in (table.columns, *table.rows)) for k in range(len(table.columns))]
    is_right = [column in table.right for column in table.columns]
    lines = [
        "  ".join(
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, is_right, strict=True)
        ).rstrip()
        for row in (table.columns, tuple("-" * width for width in widths), *table.rows)
    ]
    return "\n".join([*([table.title] if table.title else []), *lines, *([table.note] if table.note else [])])


def markdown(table: TextTable) -> str:
    """The table in Markdown, title above and note below."""
    rules = ("---:" if column in table.right else "---" for column in table.columns)
    lines = [
        "| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |"
        for row in (table.columns, tuple(rules), *table.rows)
    ]
    parts = [f"**{table.title}**"] if table.title else []
    parts.append("\n".join(lines))
    if table.note:
        parts.append(table.note)
    return "\n\n".join(parts) + "\n"


def ranking_table(ranking: Ranking, *, limit: int = 10, rejected: int = 5) -> TextTable:
    """The best `limit` feasible plans, the best of each way, and `rejected` rejected ones with the reason."""
    rows = ranking.rows
    feasible = rows[: ranking.num_feasible]
    shown = list(feasible[:limit])
    for way in WAYS:
        first = next((row for row in feasible if ranking.table.ways[row.index] == way), None)
        if first is not None and first not in shown:
            shown.append(first)
    has_energy = rows[0].energy_j is not None
    place = {row.index: str(k + 1) for k, row in enumerate(feasible)}
    columns = ("#", "plan", "kind", "network", "cut", "codec", "bytes", "loss", "latency", "rate")
    return TextTable(
        title=_ranking_title(ranking),
        columns=(*columns, *(("energy",) if has_energy else ()), "verdict"),
        right=("#", "plan", "bytes", "loss", "latency", "rate", "energy"),
        rows=tuple(
            _ranking_cells(ranking.table.candidates[row.index], row, place.get(row.index, "-"), has_energy)
            for row in [*shown, *rows[ranking.num_feasible :][:rejected]]
        ),
        note=_ranking_note(ranking, len(shown), rejected),
    )


def front_table(ranking: Ranking, front: Sequence[int]) -> TextTable:
    """The plans of a Pareto front, the fastest first; the one that the goal chooses is marked."""
    by_index = {row.index: row for row in ranking.rows}
    has_energy = ranking.rows[0].energy_j is not None
    columns = ("#", "plan", "kind", "network", "cut", "codec", "bytes", "loss", "latency", "rate")
    place = {row.index: str(k + 1) for k, row in enumerate(ranking.rows)}
    return TextTable(
        title=f"Pareto front, {_ranking_title(ranking)}",
        columns=(*columns, *(("energy",) if has_energy else ()), "verdict"),
        right=("#", "plan", "bytes", "loss", "latency", "rate", "energy"),
        rows=tuple(
            _ranking_cells(ranking.table.candidates[index], by_index[index], place[index], has_energy)
            for index in front
        ),
        note=f"{len(front)} of {ranking.num_feasible} plans that meet the constraints; none is better in everything.",
    )


def _ranking_title(ranking: Ranking) -> str:
    link, device = ranking.conditions.link, ranking.conditions.device
    wanted = ranking.goal.minimise
    aim = f"{'highest' if wanted in ('throughput', 'accuracy') else 'least'} {wanted}"
    return (
        f"{aim} at {format_rate(link.rate_bps)}, {format_duration(link.delay_s)} one way, "
        f"device slowed {device.fp32:g}x (int8 {device.int8:g}x), edge load {ranking.conditions.edge_load:g}"
    )


def _ranking_note(ranking: Ranking, num_shown: int, rejected: int) -> str:
    num_rejected = len(ranking.rows) - ranking.num_feasible
    return (
        f"{num_shown} of {ranking.num_feasible} plans that meet the constraints, "
        f"{min(rejected, num_rejected)} of {num_rejected} rejected. Figures are estimates from measured parts."
    )


def _ranking_cells(candidate: Candidate, row: RankingRow, place: str, has_energy: bool) -> tuple[str, ...]:
    energy = (f"{row.energy_j:.3g} J",) if has_energy and row.energy_j is not None else ()
    return (
        place,
        *_plan_cells(candidate),
        _loss(row.loss_points),
        format_duration(row.latency_s),
        f"{row.throughput_hz:.3g}/s",
        *energy,
        row.rejected or ("chosen" if place == "1" else ""),
    )


def _plan_cells(candidate: Candidate) -> tuple[str, ...]:
    """Plan number, way, network, cut, codec, payload bytes."""
    plan = candidate.plan
    return (
        str(plan.number),
        plan.way,
        plan.variant if plan.precision == "fp32" else f"{plan.variant} {plan.precision}",
        plan.cut or "",
        "" if plan.codec is None else plan.codec.name,
        "" if plan.kind == "device" else format_bytes(candidate.evidence.payload_bytes),
    )


def _loss(loss_points: float | None) -> str:
    return "-" if loss_points is None else f"{loss_points:.2f}"


def bench_table(
    cells: Sequence[BenchCell], *, title: str = "", note: str = "", is_agreement: bool = False
) -> TextTable:
    """Measured cells, one a row: the chosen plan and how much it gains over each baseline."""
    word = "agreement" if is_agreement else "accuracy"
    ways = [way for way in WAYS if way != "unit" or any(way in cell.ratios for cell in cells)]
    over = [f"over {way}" for way in ways]
    return TextTable(
        title=title,
        columns=(
            *("slowdown", "rate", "chosen plan", "p50", "p95", "estimated", "payload", "wire", word),
            *("stream", *over, "n"),
        ),
        right=(
            *("slowdown", "rate", "p50", "p95", "estimated", "payload", "wire", word, "stream"),
            *(*over, "n"),
        ),
        rows=tuple(
            (
                f"{cell.slowdown:g}x",
                format_rate(cell.rate_bps),
                cell.label,
                format_duration(cell.latency_p50_s),
                format_duration(cell.latency_p95_s),
                format_duration(cell.estimated_s),
                format_bytes(cell.payload_bytes),
                format_bytes(cell.wire_bytes),
                "-" if cell.accuracy is None else f"{cell.accuracy:.2f} %",
                "-" if cell.throughput_hz is None else f"{cell.throughput_hz:.3g}/s",
                *(f"{cell.ratios[way]:.2f}x" if way in cell.ratios else "-" for way in ways),
                str(cell.num_requests),
            )
            for cell in cells
        ),
        note=note,
    )


def regime_table(regimes: RegimeMap, *, title: str = "") -> TextTable:
    """Slowdowns down, rates across; each cell the winner's kind and its gain over the runner-up kind."""
    return TextTable(
        title=title,
        columns=("device", *(format_rate(rate_bps) for rate_bps in regimes.rates_bps)),
        rows=tuple(
            (f"{slowdown:g}x", *(_regime_cell(cell) for cell in row))
            for slowdown, row in zip(regimes.slowdowns, regimes.cells, strict=True)
        ),
        note="Each cell: the kind of plan that wins, and the best plan of another kind over it. Estimated.",
    )


def _regime_cell(cell: Cell) -> str:
    if cell.kind is None:
        return "-"
    return cell.kind if cell.ratio is None else f"{cell.kind} {ratio_text(cell.ratio)}"


def ratio_text(ratio: float) -> str:
    """A ratio in few characters: `1.04x`, `2.3x`, `17x`, `>999x`.

    >>> ratio_text(1.042), ratio_text(2.34), ratio_text(17.2), ratio_text(5e4)
    ('1.04x', '2.3x', '17x', '>999x')
    """
    if ratio > 999:
        return ">999x"
    return f"{ratio:.2f}x" if ratio < 1.995 else f"{ratio:.1f}x" if ratio < 9.95 else f"{ratio:.0f}x"
