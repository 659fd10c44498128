"""What the pruner of a build counts as good enough, and at which cuts it makes series."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from coinfer.build.pruned import Pruner
from coinfer.build.wanted import series_cuts
from coinfer.compress.channels import Channels
from coinfer.errors import JobError
from coinfer.model.graph import capture
from coinfer.model.zoo import build_model


def test_a_loss_of_exactly_the_goal_is_kept() -> None:
    pruner = Pruner.__new__(Pruner)
    # 100 x 1843 / 2000 - 1 is more than 100 x 1823 / 2000 in the last bit of a double.
    pruner._teachers = SimpleNamespace(own_accuracy=100 * (1843 / 2000))
    pruner._job = SimpleNamespace(goal=SimpleNamespace(max_loss=1.0))
    assert pruner.is_good(SimpleNamespace(accuracy=100 * (1823 / 2000)))
    assert not pruner.is_good(SimpleNamespace(accuracy=100 * (1822 / 2000)))


def test_series_are_at_deployable_cuts_by_whatever_name() -> None:
    module = build_model("resnet20").module
    graph, channels = capture(module, torch.zeros(2, 3, 32, 32)), Channels(module, (torch.zeros(1, 3, 32, 32),))
    whole = {cut.name for cut in graph.cuts()}
    (named,), _ = series_cuts("layer1.2#0", graph, channels, whole)
    (alias,), _ = series_cuts("layer1#0", graph, channels, whole)
    assert named.name == alias.name == "layer1.2#0"
    found, _ = series_cuts("layer1.*#0", graph, channels, whole - {"layer1.1#0"})
    assert "layer1.2#0" in {cut.name for cut in found} and "layer1.1#0" not in {cut.name for cut in found}
    with pytest.raises(JobError, match=r'"layer1#0" is no deployable cut; near are layer'):
        series_cuts("layer1#0", graph, channels, whole - {"layer1.2#0"})
