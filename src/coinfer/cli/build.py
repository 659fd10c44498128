"""`coinfer build`: a job file to a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bundle import check_target
from .options import DataFolder, Json
from .output import note, print_json, progress_on_stderr


def build(
    job: Annotated[Path, typer.Argument(metavar="JOB.toml", help="The job file.", show_default=False)],
    out: Annotated[
        Path, typer.Option("-o", "--out", metavar="DIR", help="Folder of the bundle.", show_default=False)
    ],
    work: Annotated[
        Path | None,
        typer.Option(
            "--work",
            metavar="DIR",
            help="Folder of exported networks and measured candidates, reused by the next build; DIR.work.",
            show_default=False,
        ),
    ] = None,
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Build a bundle from a job file.

    Measures every candidate of the job (device, upload, split) in its deployed form and writes a bundle: the
    menu of plans that win somewhere, their segments and tables, and the evidence of all candidates.

    The bundle appears at DIR when it is complete and not before; a build that is stopped leaves
    nothing there.
    """
    from ..build.job import load_job
    from ..build.make import build as build_bundle
    from ..runtime.exchange import measure_exchange

    # Said before the measuring, not after it; writing the bundle looks again.
    check_target(out)
    wanted = load_job(job)
    with progress_on_stderr() as progress:
        bundle = build_bundle(
            wanted, out, work=work, progress=progress, data_dir=data_dir, exchange=measure_exchange
        )
    candidates = bundle.candidates()
    dropped = sum(candidate.dropped is not None for candidate in candidates)
    if json:
        print_json(
            {
                "bundle": str(out),
                "digest": bundle.digest,
                "candidates": len(candidates),
                "dropped": dropped,
                "reference_accuracy": bundle.manifest.reference_accuracy,
                "menu": bundle.manifest.menu,
            }
        )
        return
    print(f"{out}: {len(bundle.manifest.menu)} plans of {len(candidates)} candidates ({dropped} dropped early)")
    link, device = wanted.link, wanted.device
    note(f'next: coinfer plan {out} --rate "{link.rate}" --slowdown {device.slowdown:g}')
