"""Every network of the zoo without 30 % and 60 % of its channels: trains, exports, divides everywhere, quantises."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coinfer.compress.channels import Channels, Removal
from coinfer.compress.int8 import quantize_onnx
from coinfer.engine.onnx import Session
from coinfer.model.cut import split
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import capture, first_of
from coinfer.model.zoo import ZOO, build_model

pytestmark = pytest.mark.slow


def pruned(name: str, share: float) -> tuple[nn.Module, nn.Module]:
    """The network without its first channels, and with these masked; its scales are such that no channel is silent."""
    torch.manual_seed(0)
    model = build_model(name)
    assert model.input_shape is not None
    for layer in model.module.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.weight, 0.8, 1.2)
    channels = Channels(model.module.eval(), (torch.randn(1, *model.input_shape),))
    removals = [Removal(group=g.name, places=tuple(range(int(g.size * share)))) for g in channels.groups]
    masked = channels.masked(removals).eval()
    channels.remove(removals)
    return model.module, masked


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("share", [0.3, 0.6])
def test_a_pruned_network_does_all_that_the_whole_one_does(name: str, share: float, tmp_path: Path) -> None:
    entry = ZOO[name]
    before = sum(weight.numel() for weight in build_model(name).module.parameters())
    module, masked = pruned(name, share)
    assert sum(weight.numel() for weight in module.parameters()) < (1 - share / 2) * before
    inputs = torch.randn(2, *entry.input_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        got, whole = first_of(module(inputs)), first_of(masked(inputs))
    assert float((got - whole).abs().max()) <= 1e-4 * float(whole.abs().max())
    module.train()
    first_of(module(inputs)).square().sum().backward()
    assert all(weight.grad is not None for weight in module.parameters())
    module.eval()
    with torch.no_grad():
        wanted = first_of(module(inputs))
    assert wanted.shape == (2, entry.num_classes) and torch.isfinite(wanted).all()

    graph = capture(module, inputs)
    for cut in graph.cuts():
        head, tail = split(graph, cut)
        with torch.no_grad():
            assert torch.equal(first_of(tail(*head(inputs))), first_of(graph.module(inputs))), cut.name

    height, width = entry.input_shape[1:]
    pixels = np.random.default_rng(0).integers(0, 256, (8, height, width, 3), dtype=np.uint8)
    fp32 = export_onnx(graph, tmp_path / "whole.onnx", preprocess=entry.preprocess)
    int8 = quantize_onnx(fp32, pixels, tmp_path / "int8.onnx")
    for whole in (fp32, int8):
        (own,) = Session(whole.path).run([pixels[:1]])
        assert whole.cuts
        for cut in whole.cuts:
            cut_onnx(whole, cut.name, head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
            (given,) = Session(tmp_path / "tail.onnx").run(Session(tmp_path / "head.onnx").run([pixels[:1]]))
            # int8 of a part may round otherwise than of the whole: by a few steps of 1/255 of the range.
            spread = float(np.ptp(own))
            assert np.abs(given - own).max() <= (1e-4 if whole is fp32 else 0.1) * max(spread, 1e-6), cut.name
