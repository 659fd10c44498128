"""How a build tells how far it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..compress.train import Step

# Stage of work, how much of it is done, of how much, and what is at hand.
Progress = Callable[[str, int, int, str], None]


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """A Progress that shows nothing."""


def of_training(progress: Progress, name: str) -> Callable[[str, Step], None]:
    """A training's steps as a build's progress: a stage for each phase, loss, accuracy and bytes as its detail."""

    def show(phase: str, step: Step) -> None:
        accuracy = "" if step.accuracy is None else f", {100 * step.accuracy:.1f} % right"
        num_bytes = "" if step.num_bytes is None else f", {step.num_bytes:.0f} B"
        progress(f"{name}: {phase}", step.step, step.steps, f"loss {step.loss:.3f}{accuracy}{num_bytes}")

    return show
