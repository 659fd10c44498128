"""Every cut of every zoo network: tail(*head(x)) against model(x), in torch bit for bit, in ONNX Runtime to 1e-4.

python -m bench.exactness [NETWORK ...]     writes docs/results/raw/main-job/exactness.jsonl.gz, a line a cut
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree

from coinfer.engine.onnx import Session
from coinfer.model.cut import split
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import capture
from coinfer.model.zoo import ZOO, build_model
from coinfer.report.results import write_raw

RAW = Path("docs/results/raw/main-job/exactness.jsonl.gz")


def seeded(name: str) -> torch.nn.Module:
    """A zoo network with random weights and random batch-norm statistics, so that no layer is the identity."""
    torch.manual_seed(0)
    module = build_model(name).module
    for layer in module.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(layer.running_mean, -0.1, 0.1)
            torch.nn.init.uniform_(layer.running_var, 0.5, 1.5)
            torch.nn.init.uniform_(layer.weight, 0.5, 1.5)
            torch.nn.init.uniform_(layer.bias, -0.1, 0.1)
    return module.eval()


def torch_lines(name: str, module: torch.nn.Module, shape: tuple[int, ...], batch: int) -> Iterator[dict[str, Any]]:
    """One line per cut of the captured graph: whether every output is equal bit for bit."""
    x = torch.randn((batch, *shape), generator=torch.Generator().manual_seed(1))
    graph = capture(module, torch.zeros((2, *shape)))
    with torch.no_grad():
        expected = pytree.tree_leaves(module(x))
        for cut in graph.cuts():
            head, tail = split(graph, cut)
            got = pytree.tree_leaves(tail(*head(x)))
            equal = len(got) == len(expected) and all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
            yield {"network": name, "engine": "torch", "cut": cut.name, "crossing": len(cut.specs), "wrong": not equal}


def onnx_lines(name: str, module: torch.nn.Module, shape: tuple[int, ...]) -> Iterator[dict[str, Any]]:
    """One line per deployable cut: the largest difference over the largest output, against torch."""
    x = torch.randn((1, *shape), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        root = Path(folder)
        whole = export_onnx(capture(module, torch.zeros((2, *shape))), root / "whole.onnx", preprocess=None)
        expected = [leaf.numpy() for leaf in pytree.tree_leaves(module(x))]
        for cut in whole.cuts:
            cut_onnx(whole, cut.name, head=root / "head.onnx", tail=root / "tail.onnx")
            got = Session(root / "tail.onnx").run(Session(root / "head.onnx").run([x.numpy()]))
            error = max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, expected, strict=True))
            yield {"network": name, "engine": "onnx", "cut": cut.name, "error": error, "wrong": not error <= 1e-4}


def main(names: list[str]) -> None:
    """Run all networks and write the raw log."""
    torch.set_num_threads(2)
    lines: list[dict[str, Any]] = []
    for name in names or sorted(ZOO):
        module, shape = seeded(name), ZOO[name].input_shape
        found = [*torch_lines(name, module, shape, batch=3), *onnx_lines(name, module, shape)]
        wrong = sum(line["wrong"] for line in found)
        print(f"{name}: {len(found)} cuts tried, {wrong} wrong", flush=True)
        lines.extend(found)
    write_raw(RAW, lines)


if __name__ == "__main__":
    main(sys.argv[1:])
