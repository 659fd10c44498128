"""`coinfer evaluate`: accuracy and bytes of one plan in its deployed form, in one process."""

from __future__ import annotations

from typing import Annotated

import typer

from ..bundle import load_bundle
from ..units import format_bytes
from .options import BundleFolder, DataFolder, DataSource, Json
from .output import print_json


def evaluate(
    bundle: BundleFolder,
    plan: Annotated[
        int, typer.Option("--plan", metavar="N", help="Number of a plan of the menu.", show_default=False)
    ],
    data: DataSource,
    limit: Annotated[
        int | None,
        typer.Option("--limit", min=1, help="At most this many pictures; all by default.", show_default=False),
    ] = None,
    data_dir: DataFolder = None,
    json: Json = False,
) -> None:
    """Measure accuracy and bytes of one plan.

    Runs the plan over held-out pictures in one process, coded and decoded for real. Loss is in top-1
    points against the unmodified fp32 network on the same pictures; pictures without labels are compared
    with that network's own answers.
    """
    from ..build.evaluate import evaluate_plan
    from .pictures import test_images

    loaded = load_bundle(bundle)
    chosen = loaded.plan(plan)
    pictures = test_images(data, loaded, limit=limit, data_dir=data_dir)
    evidence = evaluate_plan(loaded, plan, pictures)
    if json:
        print_json({"plan": plan, "label": chosen.label, "data": data, "evidence": evidence})
        return
    print(f"plan {plan} ({chosen.label}) on {evidence.num_images} pictures of {data}")
    word = "agreement" if pictures.labels is None else "accuracy "
    print(f"  {word}  {_points(evidence.accuracy, evidence.accuracy_ci)} %")
    print(f"  loss       {_points(evidence.loss_points, evidence.loss_ci_points)} points")
    print(
        f"  payload    {format_bytes(evidence.payload_bytes)} mean, {format_bytes(evidence.payload_bytes_p95)} p95"
    )


def _points(value: float | None, half_width: float | None) -> str:
    return "-" if value is None or half_width is None else f"{value:.2f} +- {half_width:.2f}"
