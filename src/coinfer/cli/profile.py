"""`coinfer profile`: the times of a bundle's segments and codecs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..bundle import load_bundle
from ..errors import UsageError
from ..files import write_atomically
from ..units import format_duration
from .options import BundleFolder, Json
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..profile import Profile
    from ..report.table import TextTable


def profile(
    bundle: BundleFolder,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--out", metavar="FILE", help="Write the profile here, for `coinfer plan`.", show_default=False
        ),
    ] = None,
    threads: Annotated[int, typer.Option("--threads", min=1, help="Threads of one segment.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Measured calls of each.")] = 30,
    core: Annotated[
        int | None, typer.Option("--core", help="Pin to this processor core.", show_default=False)
    ] = None,
    json: Json = False,
) -> None:
    """Time a bundle on this machine.

    Times every segment and codec as deployed, one picture at a time; it needs no torch. Run it on a
    real board and hand the file to `coinfer plan --device-profile`: measured times then take the place of
    an emulated slowdown.
    """
    import msgspec

    from ..engine.plans import profile_bundle

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise UsageError(f"--out must be a file in a folder that is there, got {out}")
    measured = profile_bundle(load_bundle(bundle), threads=threads, repeats=repeats, core=core)
    if out is not None:
        write_atomically(out, msgspec.json.format(msgspec.json.encode(measured), indent=1))
    if json:
        print_json(measured)
        return
    print_table(_table(measured))


def _table(measured: Profile) -> TextTable:
    from ..report.table import TextTable

    machine, threads = measured.machine, measured.threads
    timings = dict(measured.segments)
    for number, (encode, decode) in measured.codecs.items():
        timings |= {f"encode, plan {number}": encode, f"decode, plan {number}": decode}
    power = "not measured" if measured.power_w is None else f"{measured.power_w:.3g} W ({measured.power_sensor})"
    return TextTable(
        note=f"Power while computing: {power}.",
        title=f"{machine.name}: {machine.processor}, {threads} thread{'s' * (threads > 1)}, {measured.date}",
        columns=("", "median", "5 %", "95 %", "repeats"),
        right=("median", "5 %", "95 %", "repeats"),
        rows=tuple(
            (name, *map(format_duration, (t.median_s, t.p5_s, t.p95_s)), str(t.repeats))
            for name, t in timings.items()
        ),
    )
