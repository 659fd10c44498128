"""Static int8: close to fp32, codes that cross, tails that start from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from coinfer.compress.int8 import quantize_onnx
from coinfer.engine.onnx import Session
from coinfer.errors import DataError, EngineError
from coinfer.model.export import Whole, cut_onnx, export_onnx, load_whole
from coinfer.model.graph import capture
from tiny_nets import PREPROCESS, make, pictures

IMAGES = np.random.default_rng(0).integers(0, 256, (96, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def pair(wholes: dict[str, Whole], tmp_path_factory: pytest.TempPathFactory) -> tuple[Whole, Whole]:
    folder = tmp_path_factory.mktemp("int8")
    whole = wholes["residual"]
    return whole, quantize_onnx(whole, IMAGES, folder / "residual.int8.onnx")


def outputs(path: Path) -> np.ndarray:
    return np.asarray(Session(path).run((IMAGES,))[0])


def test_int8_is_close_to_fp32_and_not_equal(pair: tuple[Whole, Whole]) -> None:
    whole, quantised = pair
    wanted, got = outputs(whole.path), outputs(quantised.path)
    error = np.abs(wanted - got).mean() / wanted.std()
    assert 0 < error < 0.2


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(3, 3, 3, groups=3)
        self.pointwise = nn.Conv2d(3, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.pointwise(torch.relu(self.depthwise(x))).mean((2, 3))


def test_depthwise_weights_use_all_bits(tmp_path: Path) -> None:
    whole = export_onnx(capture(make(Depthwise), pictures(1)), tmp_path / "whole.onnx", preprocess=PREPROCESS)
    model = onnx.load(quantize_onnx(whole, IMAGES, tmp_path / "int8.onnx").path)
    weights = [numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == 3 and len(t.dims) == 4]
    assert {(value.shape, int(np.abs(value).max())) for value in weights} == {((3, 1, 3, 3), 127), ((5, 3, 1, 1), 64)}


class Halvings(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = torch.relu(x[:, :, ::2, ::2] - 0.1)
        return x.mean((2, 3))


def test_nothing_is_said_of_constants_that_layers_share(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    whole = export_onnx(capture(make(Halvings), pictures(1)), tmp_path / "whole.onnx", preprocess=PREPROCESS)
    shared = [set(n.input) for n in onnx.load(whole.path).graph.node if n.op_type == "Slice"]
    assert shared[0] & shared[1]
    quantize_onnx(whole, IMAGES, tmp_path / "int8.onnx")
    assert "initializer" not in capfd.readouterr().err


def test_weights_are_seven_bits_wide_one_scale_a_channel(pair: tuple[Whole, Whole]) -> None:
    model = onnx.load(pair[1].path)
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    weights = [value for value in tensors.values() if value.dtype == np.int8 and value.ndim == 4]
    assert len(weights) == 5
    assert all(np.abs(value).max() == 64 for value in weights)
    scales = [tensors[n.input[1]] for n in model.graph.node if n.op_type == "DequantizeLinear" and len(n.input) > 1]
    assert sum(scale.shape == (4,) for scale in scales) >= 3


def test_every_cut_is_exact_in_codes(pair: tuple[Whole, Whole], tmp_path: Path) -> None:
    _, quantised = pair
    wanted = outputs(quantised.path)
    head, tail = tmp_path / "head.onnx", tmp_path / "tail.onnx"
    assert len(quantised.cuts) > 3
    for cut in quantised.cuts:
        cut_onnx(quantised, cut.name, head=head, tail=tail)
        codes = Session(head).run((IMAGES,))
        assert [(value.dtype.name, value.shape[1:]) for value in codes] == [(s.dtype, s.shape) for s in cut.specs]
        assert all(spec.dtype == "uint8" for spec in cut.specs)
        np.testing.assert_array_equal(Session(tail).run(codes)[0], wanted)


def test_scale_and_zero_point_turn_codes_into_values(pair: tuple[Whole, Whole], tmp_path: Path) -> None:
    whole, quantised = pair
    head, tail = tmp_path / "head.onnx", tmp_path / "tail.onnx"
    for cut in quantised.cuts:
        cut_onnx(quantised, cut.name, head=head, tail=tail)
        codes = Session(head).run((IMAGES,))
        cut_onnx(whole, cut.name, head=head, tail=tail)
        values = Session(head).run((IMAGES,))
        assert len(cut.scales) == len(cut.zero_points) == len(codes)
        for code, value, scale, zero in zip(codes, values, cut.scales, cut.zero_points, strict=True):
            decoded = scale * (code.astype(np.float32) - zero)
            # Calibrated on these very pictures: nothing is far outside the range, and errors are a few steps.
            assert np.abs(decoded - value).mean() < 4 * scale


def test_cuts_keep_their_names_and_shares(pair: tuple[Whole, Whole]) -> None:
    whole, quantised = pair
    shares = {cut.name: cut.compute_share for cut in whole.cuts}
    names = [cut.name for cut in quantised.cuts]
    assert all(shares[cut.name] == cut.compute_share for cut in quantised.cuts)
    assert names == [name for name in shares if name in names]
    assert "layer1.0#0" in names and "/adaptive_avg_pool2d#0" in names
    # The sum before an activation is quantised with it: its own value is gone.
    assert "layer1.0/add#0" not in names


def test_several_values_cross_as_codes(pair: tuple[Whole, Whole]) -> None:
    cut = pair[1].cut("layer2.0.bn2#0")
    assert [spec.shape for spec in cut.specs] == [(4, 16, 16), (8, 8, 8)]


def test_outputs_are_not_rounded_to_codes(pair: tuple[Whole, Whole]) -> None:
    assert len(np.unique(outputs(pair[1].path))) > 256


def test_the_record_is_beside_the_file(pair: tuple[Whole, Whole]) -> None:
    _, quantised = pair
    assert load_whole(quantised.path) == quantised
    assert quantised.precision == "int8"


def test_nothing_else_is_left(pair: tuple[Whole, Whole]) -> None:
    names = sorted(path.name for path in pair[1].path.parent.iterdir())
    assert names == ["residual.int8.json", "residual.int8.onnx"]


@pytest.mark.parametrize(
    "images", [IMAGES[:0], IMAGES[:, :8], IMAGES.astype(np.float32)], ids=["none", "other size", "other type"]
)
def test_images_that_do_not_fit_are_refused(images: np.ndarray, pair: tuple[Whole, Whole], tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"calibration needs images of uint8 \(N, 16, 16, 3\), got "):
        quantize_onnx(pair[0], images, tmp_path / "x.onnx")


def test_an_int8_network_is_not_quantised_again(pair: tuple[Whole, Whole], tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="int8 is made from an fp32 network with one input, got int8 with 1"):
        quantize_onnx(pair[1], IMAGES, tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []
