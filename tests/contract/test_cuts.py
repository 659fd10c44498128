"""Every cut of every network of the zoo: torch to the bit, ONNX Runtime to 1e-4; sampled here, whole when slow."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from coinfer.engine.onnx import Session
from coinfer.model.cut import split
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import capture
from coinfer.model.zoo import ZOO, build_model


@torch.no_grad()
def wrong_cuts(name: str, *, samples: int | None = None) -> list[str]:
    """Those of about `samples` cuts (None: of all) whose tail(*head(x)) differs in any bit, at batch 1 and 2."""
    torch.manual_seed(0)
    loaded = build_model(name)
    assert loaded.input_shape is not None
    graph = capture(loaded.module, torch.zeros(1, *loaded.input_shape))
    assert graph.why_fixed_batch is None
    inputs = [torch.randn(batch, *loaded.input_shape) for batch in (1, 2)]
    answers = [loaded.module(x) for x in inputs]
    wrong = []
    for cut in graph.cuts()[:: 1 if samples is None else max(1, len(graph.cuts()) // samples)]:
        head, tail = split(graph, cut)
        if not all(torch.equal(tail(*head(x)), answer) for x, answer in zip(inputs, answers, strict=True)):
            wrong.append(cut.name)
    return wrong


@pytest.mark.parametrize("name", ZOO)
def test_sampled_cuts_are_exact(name: str) -> None:
    assert wrong_cuts(name, samples=4) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_cut_is_exact(name: str) -> None:
    assert wrong_cuts(name) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_every_segment_is_close(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    loaded = build_model(name)
    assert loaded.input_shape is not None
    graph = capture(loaded.module, torch.zeros(1, *loaded.input_shape))
    whole = export_onnx(graph, tmp_path / "whole.onnx", preprocess=loaded.preprocess)
    pixels = np.random.default_rng(0).integers(0, 256, (2, *whole.input.shape), dtype=np.uint8)
    answer = Session(whole.path).run((pixels,))[0]
    head, tail = tmp_path / "head.onnx", tmp_path / "tail.onnx"
    far = []
    for cut in whole.cuts:
        cut_onnx(whole, cut.name, head=head, tail=tail)
        got = Session(tail).run(Session(head).run((pixels,)))[0]
        if not np.abs(got - answer).max() <= 1e-4 * np.abs(answer).max():
            far.append(cut.name)
    assert far == []
    assert len(whole.cuts) >= len(graph.cuts()) / 2
