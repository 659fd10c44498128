"""How trainings of the benches tell where they are: a line for each epoch."""

from __future__ import annotations

import time

import numpy as np

from coinfer.compress.train import Step


class Epochs:
    """A line for each epoch: mean loss, share of right answers, bytes, seconds."""

    def __init__(self) -> None:
        self._key: tuple[str, int] = ("", -1)
        self._rows: list[tuple[float, float, float]] = []
        self._since_s = time.monotonic()

    def __call__(self, phase: str, step: Step) -> None:
        self._rows.append((step.loss, step.accuracy or 0.0, step.num_bytes or 0.0))
        is_last = step.step == step.steps
        if (phase, step.epoch) != self._key or is_last:
            if self._key[0] or is_last:
                loss, accuracy, num_bytes = np.mean(self._rows, axis=0)
                seen = f"loss {loss:.4f}, {100 * accuracy:.2f} %{f', {num_bytes:.1f} B' if num_bytes else ''}"
                say(f"{self._key[0]} {self._key[1]}: {seen}, {time.monotonic() - self._since_s:.0f} s")
            self._key, self._rows, self._since_s = (phase, step.epoch), [], time.monotonic()


def say(text: str) -> None:
    """A line with the time of day, at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)
