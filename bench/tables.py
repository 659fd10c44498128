"""Rows, tables and pictures of measured networks, from their raw logs: what several pages of results share."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from coinfer.lab.record import CellLine, read_log
from coinfer.lab.summary import CellRow, Summary, summarise
from coinfer.plan import Candidate
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.report.plots import Curve, plot_accuracy, plot_latency, plot_regimes
from coinfer.report.results import Row, read_raw
from coinfer.report.table import BenchCell, TextTable, bench_table, markdown, regime_table
from coinfer.search.estimate import estimate
from coinfer.search.goal import Goal
from coinfer.search.menu import RegimeMap, regime_map
from coinfer.search.solve import WAYS
from coinfer.units import format_rate

DOCS = Path("docs/results")
MAP_RATES = tuple(float(f"{r:.3g}") for r in np.geomspace(1e4, 1e9, 26))
MAP_SLOWDOWNS = tuple(float(f"{s:.3g}") for s in np.geomspace(1, 300, 14))


class Measured(NamedTuple):
    """A network whose cells were measured: its study's name and title, the folder of its raw logs."""

    name: str
    title: str
    raw: Path

    def lines(self, what: str) -> list[dict[str, Any]]:
        """The lines of one of its logs, such as "accuracy"."""
        return read_raw(self.raw / f"{self.name}.{what}.jsonl.gz")

    @property
    def log(self) -> Path:
        """The log of its cells."""
        return self.raw / f"{self.name}.cells.jsonl.gz"

    def summary(self) -> Summary:
        """What its cells amount to."""
        return summarise(read_log(self.log))


def spread(values: Sequence[float]) -> tuple[float, float]:
    """5th and 95th percentile."""
    return float(np.percentile(values, 5)), float(np.percentile(values, 95))


def row_of(name: str, value: float, unit: str, values: Sequence[float], *, raw: str, against: str | None = None) -> Row:
    """A row whose value stands for several that were measured, with their number and spread."""
    return Row(
        name=name,
        value=value,
        unit=unit,
        how="measured",
        n=len(values),
        against=against,
        spread=spread(values),
        raw=raw,
    )


def cell_name(net: str, cell: CellRow) -> str:
    """`NET/SLOWDOWN/RATE` of a row's name."""
    return f"{net}/{cell.slowdown:g}/{format_rate(cell.rate_bps).replace(' ', '')}"


def net_rows(net: Measured, summary: Summary) -> Iterable[Row]:
    """Regret, agreement and the speed-up of every cell of one network."""
    raw = net.log.name
    for cell in (cell for cell in summary.cells if cell.speedup is not None):
        yield Row(
            name=f"speedup_best_baseline@{cell_name(net.name, cell)}",
            value=cell.speedup,
            unit="ratio",
            how="measured",
            n=cell.chosen.latency_s.n,
            against=f"the best plan of another kind than the chosen one ({cell.chosen.kind})",
            raw=raw,
        )
    regrets = [cell.regret for cell in summary.cells]
    yield row_of(
        f"regret_max@{net.name}",
        max(regrets),
        "ratio",
        regrets,
        raw=raw,
        against="the best plan measured in the cell",
    )
    chosen = [abs(cell.chosen.estimate_error) for cell in summary.cells]
    every = [abs(plan.estimate_error) for plan in summary.plans if plan.latency_s.n]
    for name, errors in (
        (f"estimate_error_max@{net.name}", chosen),
        (f"estimate_error_max_any_plan@{net.name}", every),
    ):
        yield row_of(
            name,
            max(errors),
            "ratio - 1",
            errors,
            raw=raw,
            against="the estimate, from times between the requests",
        )


def stage_rows(net: Measured, summary: Summary) -> Iterable[Row]:
    """Which stages an estimate is off by: the link, or what one of the machines computed."""
    parts = {
        "link": ("exchange", ("send", "reply", "exchange")),
        "device": ("head encode", ("head", "encode")),
        "edge": ("decode tail", ("decode", "tail")),
    }
    for place, (measured, estimated) in parts.items():
        errors = []
        for plan in (p for p in summary.plans if p.latency_s.n and (place == "device" or p.kind != "device")):
            took_s = sum(plan.stages_s[name] for name in measured.split())
            expected_s = sum(plan.estimated_stages_s.get(name, 0.0) for name in estimated)
            if expected_s > 0:
                errors.append(abs(took_s / expected_s - 1))
        yield row_of(
            f"stage_error@{net.name}/{place}",
            statistics.median(errors),
            "ratio - 1, median",
            errors,
            raw=net.log.name,
            against="the estimate of these stages, over all plans and cells",
        )


def bundle_estimate_row(net: Measured, summary: Summary, exchange_s: float) -> Row:
    """How far the estimates from the bundle's own times are off, as `coinfer plan` makes them, chosen plans only."""
    lines = net.lines("candidates")
    known = {c.plan.number: c for c in (msgspec.convert(line, Candidate) for line in lines)}
    errors, ratio = [], int8_ratio_of(net)
    for cell in summary.cells:
        link = Link(rate_bps=cell.rate_bps, delay_s=cell.delay_s)
        device = Slowdown(fp32=cell.slowdown, int8=cell.slowdown * ratio)
        conditions = Conditions(link=link, device=device, edge_load=cell.load, exchange_s=exchange_s)
        expected_s = estimate(known[cell.chosen.plan], conditions).latency_s
        errors.append(abs(cell.chosen.typical_s / expected_s - 1))
    return row_of(
        f"estimate_error_max_uncalibrated@{net.name}",
        max(errors),
        "ratio - 1",
        errors,
        raw=f"{net.name}.candidates.jsonl.gz",
        against="the estimate from single stages' times, without the calibration over the link",
    )


def worst(name: str, rows: Sequence[Row], names: Sequence[str]) -> Row:
    """The largest of the rows of these names, under a name of its own."""
    mine = [row for row in rows if row.name in names]
    largest = max(mine, key=lambda row: row.value)
    return msgspec.structs.replace(largest, name=name, n=sum(row.n for row in mine))


def bench_cells(net: Measured, summary: Summary) -> list[BenchCell]:
    """The table's cells, with accuracy on the test part."""
    accuracy = {line["plan"]: line for line in net.lines("accuracy")}
    result = []
    for cell in summary.cells:
        plan = cell.chosen
        known = accuracy.get(plan.plan)
        result.append(
            BenchCell(
                rate_bps=cell.rate_bps,
                slowdown=cell.slowdown,
                kind=plan.kind,
                label=plan.label,
                latency_p50_s=plan.latency_s.p50,
                latency_p95_s=plan.latency_s.p95,
                estimated_s=plan.estimated_s,
                payload_bytes=plan.payload_bytes,
                wire_bytes=plan.wire_bytes,
                num_requests=plan.latency_s.n,
                accuracy=None if known is None else known["accuracy"],
                throughput_hz=None if cell.stream is None else cell.stream.throughput_hz,
                ratios=cell.ratios,
            )
        )
    return result


def is_agreement(net: Measured) -> bool:
    """Whether a network's accuracy is agreement with the unmodified network's own answers."""
    return bool(net.lines("accuracy")[0]["is_agreement"])


def accuracy_table(net: Measured) -> TextTable:
    """Accuracy of every plan that a cell chose or held as a baseline, on images that no choice has seen."""
    lines = net.lines("accuracy")
    word = "agreement" if is_agreement(net) else "top-1"
    return TextTable(
        columns=("plan", f"{word} %", "loss, points", "payload B (mean)", "p95", "images"),
        rows=tuple(
            (
                line["label"],
                f"{line['accuracy']:.2f} ± {line['accuracy_ci']:.2f}",
                f"{line['loss_points']:.2f} ± {line['loss_ci_points']:.2f}",
                f"{line['payload_bytes']:.0f}",
                f"{line['payload_bytes_p95']:.0f}",
                str(line["n"]),
            )
            for line in lines
        ),
        title=f"{net.title}: {word} on images that no choice has seen",
    )


def points_text(points: float) -> str:
    """`1 point`, `1.5 points`."""
    return f"{points:g} point{'' if points == 1 else 's'}"


def map_of(net: Measured, summary: Summary) -> RegimeMap:
    """The regime map of one network from its survivors' evidence."""
    candidates = [msgspec.convert(line, Candidate) for line in net.lines("candidates")]
    plot_accuracy(
        DOCS / f"rate-accuracy-{net.name}.png",
        candidates,
        title=f"{net.title}: bytes and accuracy (images that choices are made on)",
        is_agreement=is_agreement(net),
    )
    exchange_s = min(row.seconds.p50 for row in summary.overheads)
    base = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), exchange_s=exchange_s)
    goal = Goal(max_loss_points=summary.header.max_loss_points)
    return regime_map(candidates, MAP_RATES, MAP_SLOWDOWNS, goal, int8_ratio=int8_ratio_of(net), base=base)


def int8_ratio_of(net: Measured) -> float:
    """How much more int8 was slowed than fp32 in the measured cells."""
    lines = [line for line in read_log(net.log) if isinstance(line, CellLine)]
    return lines[0].slowdown.int8 / lines[0].slowdown.fp32


def pictures(net: Measured, summary: Summary, regimes: RegimeMap) -> list[str]:
    """Draw the regime map and latency over rate; the markdown that shows them."""
    machine = summary.header.machine.processor
    note = (
        f"device: one core of {machine}, slowed; edge: the other core; one-way delay 5 ms; {summary.header.date[:10]}"
    )
    measured = [(cell.rate_bps, cell.slowdown) for cell in summary.cells]
    points = summary.header.max_loss_points
    title = f"{net.title}: which kind of plan wins, at most {points_text(points)} of loss"
    plot_regimes(
        DOCS / f"regime-map-{net.name}.png",
        regimes,
        title=title,
        note=f"estimated; dots measured; {note}",
        measured=measured,
    )
    shown = [f"![{title}](regime-map-{net.name}.png)", f"![bytes and accuracy](rate-accuracy-{net.name}.png)"]
    for slowdown in sorted({cell.slowdown for cell in summary.cells}):
        cells = sorted((c for c in summary.cells if c.slowdown == slowdown), key=lambda c: c.rate_bps)
        if len(cells) < 3:
            continue
        curves = []
        for role in (*WAYS, "chosen"):
            points = [(c.rate_bps, _latency_of(c, role)) for c in cells if role == "chosen" or role in c.ratios]
            if points:
                rates, latencies = zip(*points, strict=True)
                curves.append(Curve(role=role, rates_bps=rates, latencies_s=latencies))
        title = f"{net.title}: latency over rate, device slowed {slowdown:g}x"
        path = DOCS / f"latency-{net.name}-{slowdown:g}x.png"
        plot_latency(path, curves, title=title, note=f"measured medians; {note}")
        shown.append(f"![{title}]({path.name})")
    return shown


def _latency_of(cell: CellRow, role: Any) -> float:
    return cell.chosen.typical_s * (1.0 if role == "chosen" else cell.ratios[role])


def section(net: Measured, summary: Summary, regimes: RegimeMap) -> list[str]:
    """A network's part of a page: its pictures, its cells, accuracy, the regime map; lines of markdown."""
    shown = [line for picture in pictures(net, summary, regimes) for line in (picture, "")]
    cells = markdown(bench_table(bench_cells(net, summary), is_agreement=is_agreement(net)))
    accuracy, regime = markdown(accuracy_table(net)), markdown(regime_table(regimes))
    return [f"## {net.title}", "", *shown, cells, "", accuracy, "", regime, ""]


def measured_commit(now: str, raw: Path, nets: Sequence[str], noted: Mapping[str, str] | None = None) -> str:
    """The commit that measured, as the benchmark noted it for each network; `now` where it did not.

    `noted` has those of parts that keep theirs elsewhere, by name.
    """
    path = raw / "commits.json"
    known = dict(json.loads(path.read_text())) if path.is_file() else {}
    commits = {net: str(known.get(net, now)) for net in nets} | dict(noted or {})
    if len(set(commits.values())) == 1:
        return next(iter(commits.values()))
    return ", ".join(f"{net} {commit}" for net, commit in commits.items())
