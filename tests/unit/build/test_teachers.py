"""The unmodified network's answers are computed once, and anew where they would be others."""

from pathlib import Path

import torch
from torch import nn

from coinfer.build.teachers import Teachers
from coinfer.compress.batches import Views
from coinfer.data import load_source
from coinfer.model.graph import capture
from coinfer.plan import Preprocess


class Scaled(nn.Module):
    """A classifier of digits, whose code has a number that its weights do not show."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.scale = nn.Linear(64, 10), scale

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """(N, 1, 8, 8) to logits (N, 10)."""
        return self.linear(inputs.flatten(1)) * self.scale


def answers(folder: Path, module: nn.Module, views: Views) -> tuple[torch.Tensor, bool]:
    """Logits, and whether they were computed."""
    source, stages = load_source("digits"), []
    graph = capture(module.eval(), torch.zeros(2, 1, 8, 8))
    teachers = Teachers(
        module, graph, source, Preprocess(mean=(0.0,), std=(1.0,)), source.images("validation"),
        progress=lambda stage, *_: stages.append(stage), folder=folder,
    )  # fmt: skip
    teacher = teachers.of(300, views)
    assert teachers.of(300, views) is teacher and len(teacher.images) == 300
    return teacher.logits, bool(stages)


def test_answers_are_kept_for_a_build_that_goes_on(tmp_path: Path) -> None:
    plain, mirrored = Views(is_mirrored=False), Views(is_mirrored=True)
    first, was_computed = answers(tmp_path, Scaled(1.0), mirrored)
    assert was_computed and first.shape == (2, 300, 10)
    again, was_computed = answers(tmp_path, Scaled(1.0), mirrored)
    assert not was_computed and torch.equal(first, again)
    # Other views, other weights, and other code with the same weights give other answers.
    assert answers(tmp_path, Scaled(1.0), plain)[1]
    other = Scaled(1.0)
    nn.init.ones_(other.linear.weight)
    assert answers(tmp_path, other, mirrored)[1]
    doubled, was_computed = answers(tmp_path, Scaled(2.0), mirrored)
    assert was_computed and torch.allclose(doubled, 2 * first)
