"""`coinfer inspect`: the cuts of a model, where they lie, and what would cross."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import UsageError
from ..units import format_bytes
from .options import Json
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..model.graph import Graph
    from ..report.table import TextTable


def inspect(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A built-in name, or package.module:factory.", show_default=False),
    ],
    input_shape: Annotated[
        str | None,
        typer.Option(
            "--input",
            metavar="CxHxW",
            help="Input shape, such as 3x224x224; a built-in model knows its own.",
            show_default=False,
        ),
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option("--weights", help="A safetensors file of the model's weights.", show_default=False),
    ] = None,
    deployable: Annotated[
        bool,
        typer.Option("--deployable", help="Export to ONNX as well and say which cuts can be deployed (slower)."),
    ] = False,
    json: Json = False,
) -> None:
    """Show the cuts of a model.

    For every cut: its name, what crosses, how many bytes, and how much of the compute lies before it.

    A factory is a function without arguments that returns a torch.nn.Module; the current folder is
    importable. Nothing is trained or written.
    """
    import torch

    from ..model.graph import capture
    from ..model.zoo import build_model

    loaded = build_model(model, weights=weights)
    shape = _shape_of(input_shape) if input_shape is not None else loaded.input_shape
    if shape is None:
        raise UsageError(f'--input is needed for "{model}", such as --input 3x224x224')
    graph = capture(loaded.module, torch.zeros(1, *shape))
    known = _deployable(graph) if deployable else None
    if json:
        print_json(_as_json(model, graph, known))
        return
    print_table(_table(model, graph, known))


def _table(model: str, graph: Graph, known: set[str] | None) -> TextTable:
    from ..report.table import TextTable

    rows = []
    for cut in graph.cuts():
        crossing = ", ".join(f"{'x'.join(map(str, spec.shape))} {spec.dtype}" for spec in cut.specs)
        row = (cut.name, crossing, format_bytes(cut.num_bytes), f"{100 * cut.compute_share:.1f} %")
        rows.append(row if known is None else (*row, "yes" if cut.name in known else "no"))
    shape = "x".join(map(str, graph.inputs[0].shape))
    return TextTable(
        title=f"{model}: {len(rows)} cuts, input {shape}, {graph.num_macs / 1e6:.3g} M MACs, captured by {graph.how}",
        columns=("cut", "crosses", "bytes", "compute before", *(("deployable",) if known is not None else ())),
        right=("bytes", "compute before"),
        rows=tuple(rows),
    )


def _shape_of(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdigit() and int(size) > 0 for size in sizes):
        raise UsageError(f'--input must be sizes joined by x, such as 3x224x224, got "{text}"')
    return tuple(int(size) for size in sizes)


def _deployable(graph: Graph) -> set[str]:
    from tempfile import TemporaryDirectory

    from ..model.export import export_onnx

    with TemporaryDirectory(prefix="coinfer-") as folder:
        whole = export_onnx(graph, Path(folder) / "whole.onnx", preprocess=None)
        return {cut.name for cut in whole.cuts}


def _as_json(model: str, graph: Graph, known: set[str] | None) -> dict[str, Any]:
    cuts = []
    for cut in graph.cuts():
        entry: dict[str, Any] = {
            "name": cut.name,
            "specs": cut.specs,
            "num_bytes": cut.num_bytes,
            "compute_share": cut.compute_share,
        }
        if known is not None:
            entry["deployable"] = cut.name in known
        cuts.append(entry)
    return {"model": model, "input": graph.inputs[0], "cuts": cuts}
