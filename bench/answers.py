"""What every answer of a bundle must be: each plan computed in this process, coded and decoded as on the link."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from coinfer.bundle import Bundle
from coinfer.engine.segments import Segments
from coinfer.engine.sides import run_side
from coinfer.plan import Plan
from coinfer.protocol import Result, decode_result, encode_result
from coinfer.runtime.request import Answer

Verdict = Literal["same", "close", "wrong"]
# Of the largest logit: sums of a batch are added up in another order than those of one picture.
_CLOSE = 1e-4
# Softmax scores cross as float16.
_SCORE_CLOSE = 2e-3
PICTURES = 48


class References:
    """The right answers to some pictures, (N, H, W, C) uint8, by the plans of a bundle; each is computed once."""

    def __init__(self, bundle: Bundle, pictures: NDArray[Any]) -> None:
        self._bundle, self._pictures = bundle, pictures
        self._segments = Segments(bundle.path, bundle.manifest.outputs)
        self._known: dict[tuple[int, int], Result] = {}

    def of(self, number: int, picture: int) -> Result:
        """The answer to a picture by a plan."""
        if (number, picture) not in self._known:
            plan = self._bundle.plan(number)
            self._known[number, picture] = self._computed(plan, self._pictures[picture][None])
        return self._known[number, picture]

    def _computed(self, plan: Plan, x: NDArray[Any]) -> Result:
        side = run_side(plan, "device", self._segments, (x,))
        if plan.kind != "device" and side.exit is None:
            codec = self._segments.codec(plan)
            side = run_side(plan, "edge", self._segments, codec.decode(codec.encode(side.values)))
        outputs = self._bundle.manifest.outputs
        return decode_result(plan, memoryview(encode_result(plan, side.values, outputs)), outputs)

    def judge(self, answer: Answer, picture: int) -> Verdict:
        """Whether an answer is the right one bit by bit, or as close as a batch of others leaves it."""
        right = self.of(answer.outcome.plan, picture)
        if right.classes is not None and right.scores is not None:
            if answer.classes is None or answer.scores is None or answer.classes.shape != right.classes.shape:
                return "wrong"
            if np.array_equal(answer.classes, right.classes) and np.array_equal(answer.scores, right.scores):
                return "same"
            return "close" if np.allclose(answer.scores, right.scores, rtol=0, atol=_SCORE_CLOSE) else "wrong"
        if len(answer.outputs) != len(right.outputs):
            return "wrong"
        pairs = list(zip(answer.outputs, right.outputs, strict=True))
        if all(np.array_equal(mine, theirs) for mine, theirs in pairs):
            return "same"
        return "close" if all(_is_close(mine, theirs) for mine, theirs in pairs) else "wrong"

    def tell_apart(self, number: int) -> int:
        """How many of the pictures have an answer by a plan that is close to another picture's: those prove less."""
        logits = np.stack([_first(self.of(number, picture)) for picture in range(len(self._pictures))])
        apart = np.abs(logits[:, None] - logits[None]).reshape(len(logits), len(logits), -1).max(axis=2)
        np.fill_diagonal(apart, np.inf)
        return int((apart.min(axis=1) <= 10 * _CLOSE * np.abs(logits).max()).sum())


def _is_close(mine: NDArray[Any], theirs: NDArray[Any]) -> bool:
    return mine.shape == theirs.shape and bool(np.abs(mine - theirs).max() <= _CLOSE * np.abs(theirs).max())


def _first(result: Result) -> NDArray[Any]:
    found = result.scores if result.scores is not None else result.outputs[0]
    return np.asarray(found, np.float64).reshape(-1)


def pictures_of(bundle: Bundle) -> NDArray[Any]:
    """The bundle's own pictures, and some that are made of them: (N, H, W, C) uint8, all different."""
    samples = bundle.folder / "samples.safetensors"
    shape = (PICTURES, *bundle.manifest.input.shape)
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    if not samples.is_file():
        return noise
    given = load_file(samples)["pixels"]
    # Each a mixture of a real picture, turned around, and of noise.
    mixed = [
        np.roll(given[k % len(given)], 3 * k, axis=1) * 0.7 + 0.3 * noise[k] for k in range(PICTURES - len(given))
    ]
    return np.concatenate([given, np.stack(mixed).astype(np.uint8)])
