"""`coinfer bench`: the chosen plan beside every baseline, over a shaped link."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import load_bundle
from ..errors import UsageError
from ..profile import Link
from ..profile import Slowdown as Factors
from ..units import parse_duration_s, parse_rate_bps
from .conditions import slowdown_of
from .options import (
    SOURCES,
    BundleFolder,
    DataFolder,
    EdgeLoad,
    GoalName,
    Int8Slowdown,
    Json,
    MaxLoss,
    RoundTrip,
    Slowdown,
)
from .output import note, print_json, print_table, progress_on_stderr

if TYPE_CHECKING:
    from ..lab.summary import CellRow, Summary
    from ..report.plots import Curve
    from ..report.table import TextTable


def bench(
    bundle: BundleFolder,
    rates: Annotated[
        str, typer.Option("--rates", help="Rates of the uplink, joined by commas.")
    ] = "100kbit/s,1Mbit/s,10Mbit/s",
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="A recorded bandwidth in place of the rates (sabre, mahimahi, G-NetTrack or seconds,bit/s).",
            show_default=False,
        ),
    ] = None,
    rtt: RoundTrip = "10ms",
    slowdown: Slowdown = None,
    int8_slowdown: Int8Slowdown = None,
    edge_load: EdgeLoad = 1.0,
    goal: GoalName = None,
    max_loss: MaxLoss = None,
    data: Annotated[
        str | None,
        typer.Option("--data", metavar="SOURCE", help=f"The bundle's own by default; {SOURCES}.", show_default=False),
    ] = None,
    number: Annotated[
        int, typer.Option("--requests", min=1, help="Requests of each plan at each rate, a third below 100 kbit/s.")
    ] = 30,
    stream: Annotated[int, typer.Option("--stream", min=0, help="Pictures of the stream at each rate.")] = 100,
    log: Annotated[
        Path | None,
        typer.Option("--log", metavar="FILE", help="Keep the raw log here (.jsonl.gz).", show_default=False),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw latency against rate (.png).", show_default=False),
    ] = None,
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Measure the chosen plan beside every baseline.

    Starts an edge and a device in processes of their own, joins them by an emulated link, and sends each
    picture through the chosen plan, the best of each way (device, upload, split, split with a unit) and some
    others, in a random order. Prints measured and estimated latency, bytes on the wire, accuracy, the
    throughput of a stream, and each baseline's latency over the chosen plan's.
    """
    from tempfile import TemporaryDirectory

    from ..lab.bench import run_cells
    from ..lab.cell import Cell, Effort
    from ..lab.trace import load_trace, mean_rate_bps
    from .pictures import test_images
    from .plan import goal_of

    loaded = load_bundle(bundle)
    if not edge_load >= 1:
        raise UsageError(f"--edge-load must be at least 1 where it is emulated, got {edge_load:g}")
    factors = slowdown_of(loaded, slowdown, int8_slowdown) or Factors()
    delay_s = parse_duration_s(rtt) / 2
    if trace is None:
        links = [Link(rate_bps=parse_rate_bps(rate), delay_s=delay_s) for rate in rates.split(",")]
    else:
        recorded = load_trace(trace)
        links = [Link(rate_bps=mean_rate_bps(recorded), delay_s=delay_s, trace=recorded)]
    cells = [Cell(link=link, slowdown=factors, load=edge_load) for link in links]
    wanted = goal_of(loaded, goal, max_loss)
    images = test_images(data or loaded.manifest.data, loaded, limit=2000, data_dir=data_dir)
    effort = Effort(requests=number, slow_requests=max(1, number // 3), stream=stream)
    with TemporaryDirectory(prefix="coinfer-bench-") as folder, progress_on_stderr() as progress:
        raw = log or Path(folder) / "bench.jsonl.gz"
        summary = run_cells(
            loaded, images.pixels, images.labels, cells, raw, goal=wanted, effort=effort, tell=progress
        )
    if plot is not None:
        draw(plot, summary)
        note(f"wrote {plot}")
    if json:
        print_json({"header": summary.header, "cells": summary.cells, "plans": summary.plans})
    else:
        print_table(table_of(summary, is_agreement=loaded.manifest.is_agreement))


def table_of(summary: Summary, *, is_agreement: bool = False) -> TextTable:
    """A row for each cell: the chosen plan, measured, and the baselines' latency over its own."""
    from ..report.table import BenchCell, bench_table

    cells = [
        BenchCell(
            rate_bps=cell.rate_bps,
            slowdown=cell.slowdown,
            kind=cell.chosen.kind,
            label=cell.chosen.label,
            latency_p50_s=cell.chosen.latency_s.p50,
            latency_p95_s=cell.chosen.latency_s.p95,
            estimated_s=cell.chosen.estimated_s,
            payload_bytes=cell.chosen.payload_bytes,
            wire_bytes=cell.chosen.wire_bytes,
            num_requests=cell.chosen.latency_s.n,
            accuracy=cell.chosen.accuracy,
            throughput_hz=None if cell.stream is None else cell.stream.throughput_hz,
            ratios=cell.ratios,
        )
        for cell in summary.cells
    ]
    header = summary.header
    return bench_table(
        cells,
        is_agreement=is_agreement,
        title=f"{header.model} on {header.data}, {summary.cells[0].device}",
        note=f"{header.machine.processor}, {header.date}. Columns 'over': that baseline's median over the chosen "
        "plan's, measured side by side. Emulated link and device.",
    )


def draw(path: Path, summary: Summary) -> None:
    """Measured latency against rate: the chosen plan, and the best of each way."""
    from ..report import plots
    from ..search.solve import WAYS

    cells = sorted(summary.cells, key=lambda cell: cell.rate_bps)
    curves = []
    for way in WAYS:
        having = [cell for cell in cells if way in cell.ratios]
        if having:
            rates_bps = tuple(cell.rate_bps for cell in having)
            latencies_s = tuple(cell.ratios[way] * cell.chosen.typical_s for cell in having)
            curves.append(plots.Curve(role=way, rates_bps=rates_bps, latencies_s=latencies_s))
    curves.append(_chosen(cells))
    header = summary.header
    plots.plot_latency(
        path, curves, title=f"{header.model}, {header.data}", note=f"{header.machine.processor}, {cells[0].device}"
    )


def _chosen(cells: list[CellRow]) -> Curve:
    from ..report import plots

    return plots.Curve(
        role="chosen",
        rates_bps=tuple(cell.rate_bps for cell in cells),
        latencies_s=tuple(cell.chosen.typical_s for cell in cells),
        low_s=tuple(cell.chosen.latency_s.p5 for cell in cells),
        high_s=tuple(cell.chosen.latency_s.p95 for cell in cells),
    )
