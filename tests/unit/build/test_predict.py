"""Predicted latencies: what is counted of a segment, and times that follow from the counts are found again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coinfer.build.predict import cross_validated, features_of, fit
from coinfer.compress.int8 import quantize_onnx
from coinfer.errors import DataError
from coinfer.model.export import Whole, export_onnx
from coinfer.model.graph import capture
from tiny_nets import PREPROCESS


def exported(folder: Path, width: int, *, depth: int = 1) -> Whole:
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Conv2d(width, 2 * width, 1), nn.ReLU(), nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 5)).eval()
    path = folder / f"net.{width}.{depth}.onnx"
    return export_onnx(capture(net, torch.zeros(2, 3, 16, 16)), path, preprocess=PREPROCESS)


@pytest.fixture(scope="module")
def wholes(tmp_path_factory: pytest.TempPathFactory) -> list[Whole]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("predict")
    return [exported(folder, width, depth=depth) for width in (4, 6, 9, 12) for depth in (1, 2, 3)]


def test_layers_are_counted_by_type(wholes: list[Whole]) -> None:
    found = features_of(wholes[0].path)
    area = 16 * 16
    assert found["Conv macs"] == area * (4 * 3 * 9 + 4 * 8 * 9)
    assert found["Conv 1x1 macs"] == area * 8 * 4
    assert found["Conv 1x1 values"] == area * 8
    assert (found["Conv layers"], found["Conv 1x1 layers"], found["Relu layers"]) == (2, 1, 3)
    assert (found["MatMul macs"], found["MatMul layers"], found["call"]) == (20, 1, 1)


def test_an_int8_network_has_the_same_layers(wholes: list[Whole], tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), dtype=np.uint8)
    found = features_of(quantize_onnx(wholes[0], images, tmp_path / "int8.onnx").path)
    wanted = features_of(wholes[0].path)
    for name in ("Conv macs", "Conv 1x1 macs", "MatMul macs", "Conv values", "Conv layers"):
        assert found[name] == wanted[name], name


def test_times_that_follow_from_the_layers_are_found_again(wholes: list[Whole]) -> None:
    per = {"Conv macs": 2e-11, "Conv 1x1 macs": 3e-11, "MatMul macs": 1e-10, "Conv values": 1e-9, "call": 1e-5}
    found = [features_of(whole.path) for whole in wholes]
    measured = [(own, sum(per.get(name, 0.0) * value for name, value in own.items())) for own in found]
    errors = cross_validated(measured)
    assert errors.num_segments == len(wholes)
    assert errors.p95 < 0.01
    predictor = fit(measured[:-1])
    assert predictor.seconds(measured[-1][0]) == pytest.approx(measured[-1][1], rel=0.01)


def test_too_little_to_predict_from_is_refused(wholes: list[Whole]) -> None:
    with pytest.raises(DataError, match="at least 5 measured segments, got 1"):
        cross_validated([(features_of(wholes[0].path), 1.0)])
    with pytest.raises(DataError, match="times above 0, got 0"):
        fit([])
    with pytest.raises(DataError, match="times above 0"):
        fit([(features_of(wholes[0].path), 0.0)])
