"""docs/results/pipeline.{md,json}, from the raw logs alone; what has not been measured is left out.

python -m bench.pipeline_results      (what `make results` runs)
"""

from __future__ import annotations

import statistics
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.build.job import conditions_of
from coinfer.files import write_atomically
from coinfer.lab.cell import Cell
from coinfer.lab.record import CellLine, read_lines, read_log
from coinfer.lab.streams import Measured, by_contender, measured, read_runs
from coinfer.lab.summary import PlanRow, Summary, summarise, typical
from coinfer.profile import Link, Slowdown
from coinfer.report.results import Results, Row, read_raw, results_markdown, write_results
from coinfer.report.table import TextTable, markdown
from coinfer.search.published import SYSTEMS
from coinfer.stages import device_energy_j
from coinfer.units import format_duration, format_rate

from .cells import DELAY_S, job_of
from .pipeline import GRID_RATES_BPS, STREAM_CELL, Expected, Forecast
from .queueing import queueing_rows, queueing_table
from .solvers import RAW
from .tables import DOCS, measured_commit, spread

TITLES = {"resnet56-exits": "ResNet-56", "resnet20-exits": "ResNet-20"}
MAIN = "resnet56-exits"
EXIT_LOSS = 0.5
LONE, PIPELINED, ALL = "partition, one at a time", "partition, pipelined", "all, pipelined"


def solver_rows() -> Iterator[Row]:
    """Times of the solvers."""
    log = "solvers.jsonl.gz"
    lines = read_raw(RAW / log)

    def row(name: str, line: dict[str, Any], factor: float, unit: str, against: str) -> Row:
        return Row(
            name=name, value=factor * line["median_s"], unit=unit, how="measured", n=line["n"],
            against=f"{against}; at most {factor * line['most_s']:.3g} {unit}",
            spread=(factor * line["p5_s"], factor * line["p95_s"]), raw=log,
        )  # fmt: skip

    for line in lines:
        if line["what"] in ("light_load", "heavy_load"):
            kind = "mincut" if line["what"] == "light_load" else "max_of_stages"
            suffix = "" if line["reads"] == "near" else "_any"
            how = "each layer reads of the eight before it" if line["reads"] == "near" else "of any before it"
            gap = "" if kind == "mincut" else f"; worst gap to its bound {100 * line['gap']:.2g} %"
            yield row(f"{kind}_{line['layers']}{suffix}_ms", line, 1e3, "ms", f"random graphs, {how}{gap}")
        elif line["what"] == "plan_map":
            yield row("map_s", line, 1.0, "s", f"{line['points']} points, {line['candidates']} candidates")
        elif line["what"] == "look_up":
            yield row("map_look_up_ms", line, 1e3, "ms", f"one of {line['points']} points, {line['n']} times")
        else:
            how = f"{line['devices']} devices, {line['requests']} requests, an hour of {line['trace']}"
            yield row("simulate_fleet_s", line, 1.0, "s", how)


def streams_of(log: str, rate_bps: float) -> tuple[list[Measured], dict[str, Expected]]:
    """What came of each contender, and what was expected of it."""
    expected = {
        line.name: line
        for line in read_lines(RAW / f"{log}.expected.jsonl.gz", msgspec.json.Decoder(Expected))
    }
    slowdown = next(iter(expected.values())).slowdown
    cell = Cell(link=Link(rate_bps=rate_bps, delay_s=DELAY_S), slowdown=Slowdown(fp32=slowdown, int8=slowdown))
    return measured(read_runs(RAW / f"{log}.jsonl.gz"), cell), expected


def stream_rows(name: str) -> Iterator[Row]:
    """Efficiency and throughput of the streams in the fixed cell."""
    log = f"{name}.streams"
    found, expected = streams_of(log, STREAM_CELL[0])
    by_name = {row.contender.name: row for row in found}
    best = by_name[ALL]
    runs = by_contender(read_runs(RAW / f"{log}.jsonl.gz"))
    rates = {key: [len(run.requests) / run.makespan_s for run in these] for key, these in runs.items()}

    def row(key: str, value: float, unit: str, against: str, pairs: Sequence[float]) -> Row:
        return Row(
            name=key, value=value, unit=unit, how="measured", n=best.n, against=against, spread=spread(pairs),
            raw=f"{log}.jsonl.gz",
        )  # fmt: skip

    cell = f"{format_rate(STREAM_CELL[0])}, {STREAM_CELL[1]:g}x"
    how = f"{best.critical} busy; {expected[ALL].label}; {cell}"
    yield row("pipeline_efficiency", best.efficiency, "share of the time", how, [best.efficiency])
    for key, other in (
        ("pipeline_throughput_x", LONE), ("pipeline_over_partition", PIPELINED),
        ("pipeline_over_device_only", "device, pipelined"), ("pipeline_over_upload", "upload, pipelined"),
    ):  # fmt: skip
        pairs = [a / b for a, b in zip(rates[ALL], rates[other], strict=True)]
        ratio = best.throughput_hz / by_name[other].throughput_hz
        yield row(key, ratio, "x", f"{other}: {expected[other].label}", pairs)


def stream_table(name: str) -> TextTable:
    """Every contender of the streams."""
    found, expected = streams_of(f"{name}.streams", STREAM_CELL[0])
    return TextTable(
        title=f"{TITLES[name]}, {format_rate(STREAM_CELL[0])}, device {STREAM_CELL[1]:g}x: streams in turns",
        columns=(
            "stream", "plan", "a second", "expected", "busiest", "busy, % of the time", "latency alone (expected)",
            "latency p50", "p95", "n",
        ),
        rows=tuple(
            (
                row.contender.name,
                expected[row.contender.name].label,
                f"{row.throughput_hz:.2f}",
                f"{expected[row.contender.name].before.throughput_hz:.2f}",
                row.critical,
                f"{100 * row.efficiency:.1f}",
                format_duration(expected[row.contender.name].before.latency_s),
                *(format_duration(float(x)) for x in np.percentile(row.latencies_s, (50, 95))),
                str(row.n),
            )
            for row in found
        ),
    )  # fmt: skip


def grid_lines(name: str) -> list[tuple[Measured, Expected]]:
    """Every contender of the grid with what was expected of it."""
    found = []
    for rate_bps in GRID_RATES_BPS:
        if (RAW / f"{name}.grid.{rate_bps:g}.jsonl.gz").is_file():
            rows, expected = streams_of(f"{name}.grid.{rate_bps:g}", rate_bps)
            found += [(row, expected[row.contender.name]) for row in rows]
    return found


def errors_of(lines: Sequence[tuple[Measured, Expected]], times: str) -> dict[str, list[float]]:
    """Relative errors by what is compared; latencies where requests come slower than they can be served.

    `times`: "before" or "own", see `Expected`.
    """
    errors: dict[str, list[float]] = {"throughput": [], "latency": [], "simulated throughput": [], "simulated p95": []}
    for row, expected in lines:
        forecast: Forecast = getattr(expected, times)
        errors["throughput"].append(abs(row.throughput_hz / forecast.throughput_hz - 1))
        errors["simulated throughput"].append(abs(row.throughput_hz / forecast.simulated_throughput_hz - 1))
        if row.contender.period_s:
            typical_s, p95_s = _seen(row, expected)
            errors["latency"].append(abs(typical_s / forecast.latency_s - 1))
            errors["simulated p95"].append(abs(p95_s / forecast.simulated_p95_s - 1))
    return errors


def grid_rows(name: str) -> Iterator[Row]:
    """Errors of estimates and of simulations over the grid."""
    lines, raw = grid_lines(name), f"{name}.grid.*.jsonl.gz"
    for times, suffix, how in (
        ("before", "", "times right before"), ("own", "_by_own_times", "the runs' own times"),
    ):  # fmt: skip
        errors = errors_of(lines, times)
        for key, what, q in (
            ("latency_error_median", "latency", 50), ("latency_error_p95", "latency", 95),
            ("throughput_error_median", "throughput", 50), ("throughput_error_p95", "throughput", 95),
            ("simulate_error_p95", "simulated p95", 95), ("simulate_error_median", "simulated p95", 50),
            ("simulate_throughput_error_p95", "simulated throughput", 95),
        ):  # fmt: skip
            values = errors[what]
            yield Row(
                name=f"{key}{suffix}", value=float(np.percentile(values, q)), unit="share", how="measured",
                n=len(values), against=f"{what} by {how}, over {len(lines)} of (link rate, arrival rate, plan)",
                spread=spread(values), raw=raw,
            )  # fmt: skip


def grid_table(name: str) -> TextTable:
    """Measured, expected and simulated, a line for each."""
    return TextTable(
        title=f"{TITLES[name]}, device {STREAM_CELL[1]:g}x; arrivals: share of its highest rate (0: all at once)",
        columns=(
            "link", "plan", "arrivals", "a second", "expected", "simulated",
            "latency", "expected", "p95", "simulated",
        ),
        rows=tuple(
            (
                format_rate(expected.rate_bps),
                expected.label,
                row.contender.name.split(" at ")[1],
                *(f"{x:.2f}" for x in _rates_of(row, expected)),
                *_latencies(row, expected),
            )
            for row, expected in grid_lines(name)
        ),
    )  # fmt: skip


def _latencies(row: Measured, expected: Expected) -> tuple[str, ...]:
    if not row.contender.period_s:
        return ("", "", "", "")
    typical_s, p95_s = _seen(row, expected)
    return tuple(map(format_duration, (typical_s, expected.before.latency_s, p95_s, expected.before.simulated_p95_s)))


def _seen(row: Measured, expected: Expected) -> tuple[float, float]:
    """The latency that is compared with the estimate, and the p95."""
    return typical(row.latencies_s.tolist(), " exits " in expected.label), float(np.percentile(row.latencies_s, 95))


def _rates_of(row: Measured, expected: Expected) -> tuple[float, ...]:
    return (row.throughput_hz, expected.before.throughput_hz, expected.before.simulated_throughput_hz)


def exits_of(name: str) -> tuple[Summary, dict[int, dict[str, Any]]]:
    """Cells of a network with exits, and the accuracy of each of their plans on the test part."""
    accuracy = {line["plan"]: line for line in read_raw(RAW / f"{name}.accuracy.jsonl.gz")}
    return summarise(read_log(RAW / f"{name}.exits.jsonl.gz")), accuracy


def pairs_of(summary: Summary) -> Iterator[tuple[PlanRow, PlanRow]]:
    """Each plan with exits, and before it the same without, cell by cell."""
    for plan in summary.plans:
        for role in plan.roles:
            if role.startswith("exits of "):
                number = int(role.removeprefix("exits of "))
                plain = next(p for p in summary.plans if p.cell == plan.cell and p.plan == number)
                yield plain, plan


def exit_rows(name: str) -> Iterator[Row]:
    """Of the splits in the cell of the streams: bytes, latency and loss of the fastest within half a point.

    Within it on the images of choice and on the test images, both against the unmodified network.
    """
    summary, accuracy = exits_of(name)
    cells = {cell.cell: cell for cell in summary.cells}
    prefix = "" if name == MAIN else f"{name.removesuffix('-exits')}_"
    fine = [
        (plain, plan)
        for plain, plan in pairs_of(summary)
        if (cells[plan.cell].rate_bps, cells[plan.cell].slowdown) == STREAM_CELL and plan.kind == "split"
        if plan.loss_points is not None and max(plan.loss_points, accuracy[plan.plan]["loss_points"]) <= EXIT_LOSS
    ]
    if not fine:
        return
    plain, plan = max(fine, key=lambda pair: pair[0].typical_s / pair[1].typical_s)
    sent = accuracy[plan.plan]["payload_bytes"]
    loss = accuracy[plan.plan]["loss_points"]
    # Where every request is answered on the device there is no ratio of bytes.
    ratio = [accuracy[plain.plan]["payload_bytes"] / sent] if sent else []
    for key, value, unit, log, n in (
        *(("exit_bytes_x", bytes_x, "x, mean payload", "accuracy", accuracy[plan.plan]["n"]) for bytes_x in ratio),
        ("exit_latency_x", plain.typical_s / plan.typical_s, "x, mean latency", "exits", plan.latency_s.n),
        ("exit_loss", loss, "points of top-1", "accuracy", accuracy[plan.plan]["n"]),
    ):
        yield Row(
            name=f"{prefix}{key}", value=value, unit=unit, how="measured", n=n,
            against=f"{plan.label} against {plain.label}", raw=f"{name}.{log}.jsonl.gz",
        )  # fmt: skip


def exit_table(name: str) -> TextTable:
    """Every pair: who answers, bytes, latency, rate, energy, loss; with exits and without."""
    summary, accuracy = exits_of(name)
    cells = {cell.cell: cell for cell in summary.cells}
    prices = {
        (line.cell, found.plan): found.busy_s
        for line in read_log(RAW / f"{name}.exits.jsonl.gz") if isinstance(line, CellLine)
        for found in line.estimates
    }  # fmt: skip
    conditions = conditions_of(job_of(name), int8_ratio=1.0)
    rows, seen = [], set()
    for plain, plan in pairs_of(summary):
        both = [plan] if (plain.cell, plain.plan) in seen else [plain, plan]
        seen.add((plain.cell, plain.plan))
        for each in both:
            known, busy_s = accuracy[each.plan], prices[each.cell, each.plan]
            sides = zip(known["exits"], known["shares"], strict=True)
            crossing = 1.0 - sum(share for side, share in sides if side == "device") if each.kind != "device" else 0.0
            energy_j = device_energy_j(busy_s, crossing, conditions)
            rows.append(
                (
                    f"{cells[each.cell].slowdown:g}x",
                    each.label,
                    " / ".join(f"{100 * share:.1f}" for share in known["shares"]) or "-",
                    f"{known['payload_bytes']:.1f}",
                    format_duration(each.typical_s),
                    format_duration(each.latency_s.p95),
                    f"{plain.typical_s / each.typical_s:.2f}",
                    f"{1 / max(busy_s.values()):.1f}",
                    f"{1e3 * float(energy_j):.1f}",
                    f"{known['accuracy']:.2f} ± {known['accuracy_ci']:.2f}",
                    f"{known['loss_points']:.2f} ± {known['loss_ci_points']:.2f}",
                )
            )
    return TextTable(
        title=f"{TITLES[name]}, 1 Mbit/s: plans without exits, and the same with them (rate and energy: estimated)",
        columns=(
            "device", "plan", "exits answer %", "mean payload B", "latency", "p95", "faster by", "a second", "mJ",
            "top-1 %", "loss, points",
        ),
        rows=tuple(rows),
    )  # fmt: skip


def choice_rows(name: str) -> Iterator[Row]:
    """Share of the map where a pipelined split has the highest rate."""
    lines = [line for line in read_raw(RAW / f"{name}.choices.jsonl.gz") if "fastest" in line]
    cells: dict[tuple[float, float], dict[str, float]] = {}
    for line in lines:
        cells.setdefault((line["rate_bps"], line["slowdown"]), {})[line["fastest"]] = line["throughput_hz"]
    wins = [_wins(found) for found in cells.values()]
    yield Row(
        name="pipelined_split_share", value=statistics.fmean(wins), unit="share of the map", how="estimated",
        n=len(wins), against="the device alone and uploads, pipelined as well", raw=f"{name}.choices.jsonl.gz",
    )  # fmt: skip


def _wins(rates_hz: dict[str, float]) -> float:
    split = max(rates_hz.get("split", 0.0), rates_hz.get("unit", 0.0))
    return float(split > max(rates_hz.get("device", 0.0), rates_hz.get("upload", 0.0)))


def choice_table(name: str) -> TextTable:
    """What published systems would have chosen: latency over that of the whole search, and what they choose."""
    lines = [line for line in read_raw(RAW / f"{name}.choices.jsonl.gz") if "system" in line]
    cells: dict[tuple[float, float], dict[str, dict[str, Any]]] = {}
    for line in lines:
        cells.setdefault((line["rate_bps"], line["slowdown"]), {})[line["system"]] = line
    rows = []
    for system in SYSTEMS:
        mine = [found for found in cells.values() if system in found]
        ratios = [found[system]["latency_s"] / found["coinfer"]["latency_s"] for found in mine]
        splits = sum(found[system]["way"] in ("split", "unit") for found in mine)
        rows.append(
            (
                system,
                f"{float(np.exp(np.mean(np.log(ratios)))):.2f}",
                f"{max(ratios):.2f}",
                f"{100 * splits / len(mine):.1f}",
                str(len(mine)),
            )
        )
    return TextTable(
        title=f"{TITLES[name]}: each system as a restriction of the search, over the map (estimated)",
        columns=("system", "latency over the whole search's, geometric mean", "worst", "% splits", "cells"),
        rows=tuple(rows),
    )


def main() -> None:
    """The page, of what has been measured."""
    rows: list[Row] = []
    page = [(Path(__file__).parent / "pipeline.head.md").read_text()]
    body: list[str] = []
    logs: list[str] = []
    if (RAW / "solvers.jsonl.gz").is_file():
        rows += solver_rows()
        logs.append("solvers")
    for name in TITLES:
        for what, row_makers, table in (
            ("exits", exit_rows, exit_table), ("streams", stream_rows, stream_table),
            ("grid", grid_rows, grid_table), ("queueing", queueing_rows, queueing_table),
            ("choices", choice_rows, choice_table),
        ):  # fmt: skip
            first = f"{name}.grid.{GRID_RATES_BPS[0]:g}" if what == "grid" else f"{name}.{what}"
            if not (RAW / f"{first}.jsonl.gz").is_file():
                continue
            if name == MAIN or what == "exits":
                rows += row_makers(name)
            body += [markdown(table(name)), ""]
            logs.append(f"{name}.{what}")
    if not rows:
        print(f"streams and exits are not measured yet: there is no log in {RAW}")
        return
    known = read_raw(RAW / "machine.jsonl.gz")[0]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    results = Results(
        commit=measured_commit(commit, RAW, logs),
        date=known["date"],
        machine=known["machine"],
        command="make bench-pipeline",
        rows=tuple(
            msgspec.structs.replace(row, raw=None if row.raw is None else f"{RAW.name}/{row.raw}") for row in rows
        ),
    )
    write_results(DOCS / "pipeline.json", results)
    page += ["## Rows", "", results_markdown(results), "", *body]
    write_atomically(DOCS / "pipeline.md", ("\n".join(page).rstrip() + "\n").encode())
    print(f"{len(rows)} rows written to {DOCS / 'pipeline.json'}")


if __name__ == "__main__":
    main()
