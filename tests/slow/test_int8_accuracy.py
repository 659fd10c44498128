"""Static int8 of trained networks on real pictures."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from coinfer.compress.int8 import quantize_onnx
from coinfer.data import load_source
from coinfer.engine.onnx import Session
from coinfer.model.export import export_onnx
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model

DATA = Path(os.environ.get("DATA_DIR", Path(__file__).resolve().parents[2].parent / "shared" / "data"))


@pytest.mark.slow
def test_resnet20_loses_less_than_half_a_point(tmp_path: Path) -> None:
    if not (DATA / "cifar10").is_dir():
        pytest.skip(f"no data folder at {DATA}: set DATA_DIR")
    loaded = build_model("resnet20", weights=DATA / "weights" / "cifar10_resnet20.safetensors")
    source = load_source("cifar10", data_dir=DATA)
    graph = capture(loaded.module, torch.zeros(1, 3, 32, 32))
    whole = export_onnx(graph, tmp_path / "fp32.onnx", preprocess=loaded.preprocess)
    quantised = quantize_onnx(whole, source.images("train").pixels[:512], tmp_path / "int8.onnx")
    test = source.images("test")
    hits = []
    for path in (whole.path, quantised.path):
        session = Session(path)
        answers = [session.run((test.pixels[k : k + 100],))[0].argmax(1) for k in range(0, len(test.pixels), 100)]
        hits.append(float(np.mean(np.concatenate(answers) == test.labels)))
    assert hits[0] > 0.91
    assert hits[0] - hits[1] < 0.005
    assert hits[0] != hits[1]
