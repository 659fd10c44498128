"""Units in the deployed form: cut out of an exported network, coded, restored; on maps, tokens and vectors."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from coinfer.codec import make_codec
from coinfer.compress.batches import as_inputs
from coinfer.compress.bottleneck import UnitSpec
from coinfer.compress.divided import Deployable, behind_reduction, codecs_of, insert_unit
from coinfer.compress.int8 import quantize_onnx
from coinfer.engine.onnx import Session
from coinfer.model.export import cut_onnx, export_onnx
from coinfer.model.graph import capture, first_of
from coinfer.model.nets_branch import VisionTransformer
from coinfer.plan import Preprocess

PREPROCESS = Preprocess(mean=(0.5, 0.4, 0.3), std=(0.2, 0.25, 0.3))


class Two(nn.Module):
    """Two outputs; the first is what is classified."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.relu(self.first(x))
        return self.last(y.mean((2, 3))), y.amax((2, 3))


class Hidden(nn.Module):
    """A vector between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.hidden = nn.Linear(8, 8)
        self.last = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.relu(self.hidden(torch.relu(self.first(x)).amax((2, 3)))))


def vision_transformer() -> nn.Module:
    return VisionTransformer(width=32, depth=2, num_heads=2)


# A network, what crosses the cut that gets a unit (the last such cut), and the unit.
NETWORKS = {
    "tokens": (vision_transformer, (65, 32), UnitSpec(width=12, bits=6, refine=1)),
    "vector": (Hidden, (8,), UnitSpec(width=6, bits=6, refine=1)),
    "prepared vector": (Hidden, (8,), UnitSpec(width=6, bits=6, prepare=1)),
    "two outputs": (Two, (8, 32, 32), UnitSpec(width=6, stride=2, bits=6)),
    "prepared": (Two, (8, 32, 32), UnitSpec(width=6, stride=2, bits=6, prepare=2)),
    "prepared tokens": (vision_transformer, (65, 32), UnitSpec(width=12, bits=6, prepare=1)),
    "light head": (Two, (8, 32, 32), UnitSpec(width=6, stride=4, bits=6, head_width=8)),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_unit_answers_deployed_as_in_torch(tmp_path: Path, name: str, precision: str) -> None:
    make, crossing, spec = NETWORKS[name]
    torch.manual_seed(0)
    graph = capture(make().eval(), torch.zeros(2, 3, 32, 32))
    cut = [cut for cut in graph.cuts() if [tensor.shape for tensor in cut.specs] == [crossing]][-1]
    pixels = np.random.default_rng(0).integers(0, 256, (64, 32, 32, 3), dtype=np.uint8)
    inputs = as_inputs(pixels, PREPROCESS).contiguous()
    divided = insert_unit(graph, cut, spec)
    with torch.no_grad():
        features = first_of(divided.head(inputs))
        if spec.head_width:
            divided.unit.start_grid_from(features)
        else:
            divided.unit.start_from(features)
        for name, parameter in divided.unit.named_parameters():
            # Blocks begin as nothing.
            if "second.weight" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        divided.unit.start_grid_from(features)
        want = first_of(divided(inputs)).numpy()
    deployable = capture(Deployable(divided), torch.zeros(2, 3, 32, 32))
    whole = export_onnx(deployable, tmp_path / "a.onnx", preprocess=PREPROCESS)
    if precision == "int8":
        whole = quantize_onnx(whole, pixels, tmp_path / "b.onnx")
    place = behind_reduction(spec)
    cut_onnx(whole, place, head=tmp_path / "head.onnx", tail=tmp_path / "tail.onnx")
    deployed = whole.cut(place)
    scale = {"scale": deployed.scales[0], "zero_point": deployed.zero_points[0]} if deployed.scales else {}
    ((codec_spec, tables),) = codecs_of(divided.unit, deployed.specs[0], **scale)
    codec = make_codec(codec_spec, deployed.specs, tables)
    head, tail = Session(tmp_path / "head.onnx"), Session(tmp_path / "tail.onnx")
    got = np.concatenate(
        [tail.run(codec.decode(codec.encode(head.run([pixels[n : n + 1]]))))[0] for n in range(len(pixels))]
    )
    assert got.shape == want.shape
    error = np.abs(got - want).mean() / want.std()
    assert error < (0.02 if precision == "fp32" else 0.6), error
