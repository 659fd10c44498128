"""What the pruner of a build counts as good enough."""

from __future__ import annotations

from types import SimpleNamespace

from coinfer.build.pruned import Pruner


def test_a_loss_of_exactly_the_goal_is_kept() -> None:
    pruner = Pruner.__new__(Pruner)
    # 100 x 1843 / 2000 - 1 is more than 100 x 1823 / 2000 in the last bit of a double.
    pruner._teachers = SimpleNamespace(own_accuracy=100 * (1843 / 2000))
    pruner._job = SimpleNamespace(goal=SimpleNamespace(max_loss=1.0))
    assert pruner.is_good(SimpleNamespace(accuracy=100 * (1823 / 2000)))
    assert not pruner.is_good(SimpleNamespace(accuracy=100 * (1822 / 2000)))
