"""Series of ever fewer channels at a cut."""

from __future__ import annotations

import pytest
import torch
from test_channels import awake, example
from test_pruning import EXAMPLE, FEW, Net, taught

from coinfer.compress.batches import Views
from coinfer.compress.channels import Channels
from coinfer.compress.pruning import PruneRecipe
from coinfer.compress.recipes import top1
from coinfer.compress.series import counts_below, crossing_groups, series
from coinfer.compress.unit_training import teacher_of
from coinfer.errors import CutError
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model
from tiny_nets import PREPROCESS, Residual


def test_what_crosses_is_made_before_and_read_behind() -> None:
    torch.manual_seed(0)
    module = awake(build_model("resnet20").module)
    graph, channels = capture(module, torch.zeros(2, 3, 32, 32)), Channels(module, example(32))
    found = {
        name: [group.name for group in crossing_groups(channels, graph, graph.cut(name))]
        for name in ("layer1.0#0", "layer2.2#0", "layer1.1/relu#0", "layer3.2#0")
    }
    assert found == {
        "layer1.0#0": ["conv1"],
        "layer2.2#0": ["layer2.0.conv2"],
        "layer1.1/relu#0": ["conv1", "layer1.1.conv1"],
        "layer3.2#0": ["layer3.0.conv2"],
    }


def test_counts_are_log_spaced_down_to_one() -> None:
    assert counts_below(64) == (38, 23, 13, 8, 5, 3, 2, 1)
    assert counts_below(4) == (3, 2, 1)
    assert counts_below(1) == ()


def test_a_series_narrows_what_crosses_and_nothing_else() -> None:
    torch.manual_seed(0)
    module = Net().eval()
    graph = capture(module, torch.zeros(2, 3, 16, 16))
    teacher = taught(module)
    recipe = PruneRecipe(keep=0.5, **{**FEW, "score": "magnitude"})
    cut = graph.cut("one#0")

    def accuracy(module: torch.nn.Module) -> float:
        return 100 * top1(module, teacher.images.pixels, teacher.images.labels, PREPROCESS)

    members = list(series(module, EXAMPLE, graph, cut, teacher, recipe, accuracy_of=accuracy, least_accuracy=0.0))
    assert [member.num_channels for member in members] == [11, 8, 6, 4, 3, 2, 1]
    for member in members:
        smaller = capture(member.pruned.module, torch.zeros(2, 3, 16, 16))
        assert smaller.cut("one#0").specs[0].shape == (member.num_channels, 16, 16)
        assert member.pruned.module.two[0].out_channels == 16
    assert len(members[-1].lineage) == 7
    stopped = list(series(module, EXAMPLE, graph, cut, teacher, recipe, accuracy_of=accuracy, least_accuracy=101.0))
    assert [member.num_channels for member in stopped] == [11]
    listed = series(
        module, EXAMPLE, graph, cut, teacher, recipe, accuracy_of=accuracy, least_accuracy=0.0, counts=(99, 5, 2)
    )
    assert [member.num_channels for member in listed] == [5, 2]


def test_a_cut_whose_channels_stay_is_refused_with_the_reason() -> None:
    torch.manual_seed(0)
    module = awake(Residual())
    graph = capture(module, torch.zeros(2, 3, 16, 16))
    images = taught(Net().eval()).images
    teacher = teacher_of(graph, images, PREPROCESS, Views())
    with pytest.raises(CutError, match=r'no channel that crosses at "layer1.0#0" can be removed; "conv1": without'):
        next(
            series(
                module, EXAMPLE, graph, graph.cut("layer1.0#0"), teacher, PruneRecipe(keep=0.5),
                accuracy_of=lambda module: 0.0, least_accuracy=0.0,
            )
        )  # fmt: skip
