"""Labelled pictures as training batches: shuffled, augmented and normalised, the same for the same seed.

The order and the augmentation of an epoch follow from (seed, epoch) alone, so that a training that
was stopped goes on as if it had not been.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import DataError
from ..plan import Preprocess
from .losses import Batch


class Batches(Protocol):
    """What `fit` reads: a number of batches an epoch, and the batches of one epoch."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 0."""
        ...


class Augment(NamedTuple):
    """Random shifts by up to `shift` pixels (the border reflected), and mirroring where `is_mirrored`.

    Mirroring suits photographs of things; a mirrored digit is another sign.
    """

    shift: int = 4
    is_mirrored: bool = True


def augmented(pixels: NDArray[np.uint8], augment: Augment, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Pictures (N, H, W, C), each shifted and mirrored by its own draw; the same shape."""
    count, height, width, _ = pixels.shape
    shift = augment.shift
    padded = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    rows = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(height)
    columns = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(width)
    if augment.is_mirrored:
        is_flipped = rng.integers(0, 2, size=(count, 1)).astype(bool)
        columns = np.where(is_flipped, columns[:, ::-1], columns)
    moved: NDArray[np.uint8] = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved


def as_inputs(pixels: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Pictures (N, H, W, C) as float32 (N, C, H, W), `(pixels / 255 - mean) / std`, channels last in memory."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    scaled = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2)


class PictureBatches:
    """Batches of labelled pictures; the last, incomplete one of an epoch is left out."""

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        preprocess: Preprocess,
        *,
        batch_size: int = 128,
        augment: Augment | None = None,
        seed: int = 0,
    ) -> None:
        if labels is None or not 1 <= batch_size <= len(pixels):
            got = "pictures without labels" if labels is None else f"{len(pixels)} pictures, batch {batch_size}"
            raise DataError(f"training needs labelled pictures, at least one batch of them; got {got}")
        self._pixels = pixels
        self._labels = labels
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._augment = augment
        self._seed = seed

    def __len__(self) -> int:
        return len(self._pixels) // self._batch_size

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every picture at most once, in an order drawn from (seed, number)."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._pixels))
        for step in range(len(self)):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            pixels = self._pixels[chosen]
            if self._augment is not None:
                pixels = augmented(pixels, self._augment, rng)
            yield Batch(as_inputs(pixels, self._preprocess), torch.from_numpy(self._labels[chosen]))
