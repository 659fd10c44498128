"""`coinfer demo`: the whole main job on one page, from a network to measured latencies."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import UsageError
from .bench import draw, table_of
from .options import DataFolder, Json
from .output import Progress, note, print_json, print_table, progress_on_stderr

if TYPE_CHECKING:
    from ..bundle import Bundle
    from ..lab.summary import Summary

SOURCES = ("scene-digits", "cifar10")
RATES_BPS = (100e3, 300e3, 1e6, 3e6, 10e6)
DELAY_S = 0.005
REQUESTS = 10
STREAM = 60


def demo(
    data: Annotated[
        str, typer.Option("--data", metavar="SOURCE", help=f"{' or '.join(SOURCES)}.")
    ] = "scene-digits",
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the bundle, the table and the picture.")
    ] = Path("out/demo"),
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Train the network anew instead of taking the given weights.")
    ] = False,
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Do the whole main job on one of two data sets.

    Captures a trained network, measures every candidate, writes a bundle, starts an edge in a process of its own,
    shapes a link to a few rates, slows a device 30 times, and sets the chosen plan beside every baseline: a
    table here and a picture of latency against rate.
    """
    if data not in SOURCES:
        raise UsageError(f'--data must be {" or ".join(SOURCES)}, got "{data}"')
    if retrain and data != "scene-digits":
        raise UsageError(f"--retrain is for scene-digits; the weights for {data} are given")
    from ..build.demo import demo as build_demo
    from ..runtime.exchange import measure_exchange

    with progress_on_stderr() as progress:
        bundle = build_demo(
            data=data,
            out=out / "bundle",
            retrain=retrain,
            data_dir=data_dir,
            progress=progress,
            exchange=measure_exchange,
        )
        summary = _measure(bundle, data, out, data_dir, progress)
    draw(out / "latency.png", summary)
    if json:
        print_json({"bundle": str(bundle.folder), "header": summary.header, "cells": summary.cells})
        return
    print_table(table_of(summary, is_agreement=bundle.manifest.is_agreement))
    note(f"the bundle is {out / 'bundle'}, the picture {out / 'latency.png'}, the raw log {out / 'bench.jsonl.gz'}")


def _measure(bundle: Bundle, data: str, out: Path, data_dir: Path | None, progress: Progress) -> Summary:
    from ..build.demo import SLOWDOWN
    from ..lab.bench import run_cells
    from ..lab.cell import Cell, Effort
    from ..lab.choose import pick_plans
    from ..profile import Link, Slowdown
    from .pictures import test_images
    from .plan import goal_of

    factors = Slowdown(fp32=SLOWDOWN, int8=SLOWDOWN * bundle.manifest.int8_slowdown_ratio)
    cells = [Cell(link=Link(rate_bps=rate_bps, delay_s=DELAY_S), slowdown=factors) for rate_bps in RATES_BPS]
    images = test_images(data, bundle, limit=500, data_dir=data_dir)
    return run_cells(
        bundle,
        images.pixels,
        images.labels,
        cells,
        out / "bench.jsonl.gz",
        goal=goal_of(bundle, None, None),
        pick=pick_plans(each=1, random=0),
        effort=Effort(requests=REQUESTS, slow_requests=REQUESTS, calibration=REQUESTS, stream=STREAM, finalists=False),
        tell=progress,
    )
