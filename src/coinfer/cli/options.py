"""Arguments and options that several commands share, each with its one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

BundleFolder = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Folder that `coinfer build` wrote.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
DataFolder = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        envvar="DATA_DIR",
        help="Folder that holds downloaded data sets; ../shared/data where it exists.",
        show_default=False,
    ),
]
SOURCES = "scene-digits, digits, cifar10, imagenette, folder:PATH, a .npy file, or package.module:factory"
# What comes as it comes, for `run` alone.
LIVE = ("stdin:mjpeg", "stdin:raw", "stdin:paths", "mjpeg:FILE", "watch:PATH")
DataSource = Annotated[
    str,
    typer.Option(
        "--data", metavar="SOURCE", help=f"Pictures: {SOURCES}; for `run` also {', '.join(LIVE)}.", show_default=False
    ),
]
Rate = Annotated[str, typer.Option("--rate", help="Rate of the uplink, such as 300kbit/s.")]
RoundTrip = Annotated[str, typer.Option("--rtt", help="Round trip of the link, twice its one-way delay.")]
Slowdown = Annotated[
    float | None,
    typer.Option(
        "--slowdown",
        help="Emulate a device this many times slower than this machine (fp32, codecs, everything but int8).",
        show_default=False,
    ),
]
Int8Slowdown = Annotated[
    float | None,
    typer.Option(
        "--int8-slowdown",
        help="The same factor for int8 segments; by default so that int8 gains no more than the bundle assumes.",
        show_default=False,
    ),
]
EdgeLoad = Annotated[float, typer.Option("--edge-load", help="Factor on the edge's times, 1 for idle.")]
GoalName = Annotated[
    str | None,
    typer.Option(
        "--goal",
        help="latency, throughput, bytes, energy or accuracy; the bundle's own by default.",
        show_default=False,
    ),
]
MaxLatency = Annotated[
    str | None, typer.Option(
        "--deadline", "--max-latency", help="The longest latency allowed, such as 50ms; with exits the mean one.",
        show_default=False,
    ),
]
MinRate = Annotated[
    float | None,
    typer.Option("--min-rate", help="Requests a second that a stream must sustain.", show_default=False),
]
MaxBytes = Annotated[
    float | None, typer.Option("--max-bytes", help="Bytes on the wire of one request, at most.", show_default=False)
]
MaxSize = Annotated[
    float | None,
    typer.Option("--max-size", help="Bytes of the files that the device needs, at most.", show_default=False),
]
MaxMemory = Annotated[
    float | None,
    typer.Option(
        "--max-device-memory", help="Bytes of memory that the device's segments need, at most.", show_default=False
    ),
]
MaxLoss = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        help="Top-1 points that may be lost; the bundle's own by default.",
        show_default=False,
    ),
]
# Where a device's token stands that no file holds.
TOKEN = "COINFER_TOKEN"
TokenFile = Annotated[
    Path | None,
    typer.Option("--token-file", help=f"File with this device's token; else {TOKEN}.", show_default=False),
]
EdgeCa = Annotated[
    Path | None, typer.Option("--ca", help="CA that the edge's certificate must be of.", show_default=False)
]
DeviceCert = Annotated[
    Path | None, typer.Option("--cert", help="This device's certificate, with --key.", show_default=False)
]
DeviceKey = Annotated[Path | None, typer.Option("--key", help="Its key.", show_default=False)]
