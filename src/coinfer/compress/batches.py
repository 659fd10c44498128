"""Training batches, the same for the same seed: pictures, or features that a frozen head computed once.

    PictureBatches    pictures shuffled, augmented and normalised
    FeatureBatches    what crosses a cut, of every picture as it is and mirrored

With a teacher, each sample comes with the unmodified network's logits of its picture (as it is or mirrored: a shift
by a few pixels hardly moves them).  The order and the augmentation of an epoch follow from (seed, epoch) alone, so
that a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import DataError
from ..plan import Preprocess
from .hardware import has_bfloat16, layout_of, training_device
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


def augmented(
    pixels: NDArray[np.uint8], augment: Augment, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Pictures (N, H, W, C), each shifted and mirrored by its own draw; the same shape. And (N,) 1 where mirrored."""
    count, height, width, _ = pixels.shape
    shift = augment.shift
    padded = np.pad(pixels, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    rows = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(height)
    columns = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(width)
    is_flipped: NDArray[np.int64] = np.zeros(count, np.int64)
    if augment.is_mirrored:
        is_flipped = np.asarray(rng.integers(0, 2, size=count))
        columns = np.where(is_flipped[:, None].astype(bool), columns[:, ::-1], columns)
    moved: NDArray[np.uint8] = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved, is_flipped


def as_inputs(pixels: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """Pictures (N, H, W, C) as float32 (N, C, H, W), `(pixels / 255 - mean) / std`, channels last in memory."""
    mean, std = torch.tensor(preprocess.mean), torch.tensor(preprocess.std)
    scaled = (torch.from_numpy(pixels).float() / 255 - mean) / std
    return scaled.permute(0, 3, 1, 2)


def as_planes(pixels: NDArray[np.uint8], preprocess: Preprocess) -> Tensor:
    """The same, one channel after the other in memory: for modules that view what their convolutions made."""
    return as_inputs(pixels, preprocess).clone(memory_format=torch.contiguous_format)


class PictureBatches:
    """Batches of pictures; the last, incomplete one of an epoch is left out.

    Args:
        pixels: (N, H, W, C).
        labels: (N,) classes, or None where nobody knows them; then there must be a teacher.
        preprocess: how pictures become inputs.
        batch_size: pictures a batch.
        augment: how they are moved.
        seed: of order and augmentation.
        teacher: (1 or 2, N, K) logits of the pictures as they are and, where `augment` mirrors, mirrored.
        features: (1 or 2, N, C, H, W) what crosses a cut, likewise; for pictures that are not shifted.

    Raises:
        DataError: fewer pictures than a batch, neither labels nor a teacher, or a teacher of other pictures.
    """

    def __init__(
        self,
        pixels: NDArray[np.uint8],
        labels: NDArray[np.int64] | None,
        preprocess: Preprocess,
        *,
        batch_size: int = 128,
        augment: Augment | None = None,
        seed: int = 0,
        teacher: Tensor | None = None,
        features: Tensor | None = None,
    ) -> None:
        if features is not None and augment is not None and augment.shift:
            raise DataError(f"features are of pictures as they are, not shifted by up to {augment.shift} pixels")
        _check(len(pixels), labels, batch_size, teacher, 2 if augment is not None and augment.is_mirrored else 1)
        self._pixels = pixels
        self._labels = labels
        self._preprocess = preprocess
        self._batch_size = batch_size
        self._augment = augment
        self._seed = seed
        self._teacher, self._features = teacher, features

    def __len__(self) -> int:
        return len(self._pixels) // self._batch_size

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every picture at most once, in an order drawn from (seed, number)."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(len(self._pixels))
        for step in range(len(self)):
            chosen = order[step * self._batch_size : (step + 1) * self._batch_size]
            pixels, is_mirrored = self._pixels[chosen], np.zeros(len(chosen), np.int64)
            if self._augment is not None:
                pixels, is_mirrored = augmented(pixels, self._augment, rng)
            inputs = as_inputs(pixels, self._preprocess)
            yield _batch(inputs, self._labels, self._teacher, is_mirrored, chosen, self._features)


class FeatureBatches:
    """Batches of features (1 or 2, N, *shape) of N pictures as they are and, where there are 2, mirrored.

    Args, Raises: as `PictureBatches`.
    """

    def __init__(
        self,
        features: Tensor,
        labels: NDArray[np.int64] | None,
        *,
        batch_size: int = 128,
        seed: int = 0,
        teacher: Tensor | None = None,
    ) -> None:
        _check(features.shape[1], labels, batch_size, teacher, len(features))
        self._features = features
        self._labels = labels
        self._batch_size = batch_size
        self._seed = seed
        self._teacher = teacher

    def __len__(self) -> int:
        return self._features.shape[1] // self._batch_size

    def epoch(self, number: int) -> Iterator[Batch]:
        """Every picture at most once, in an order drawn from (seed, number), mirrored or not by its own draw."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(self._features.shape[1])
        mirrored = rng.integers(0, len(self._features), size=len(order))
        for step in range(len(self)):
            part = slice(step * self._batch_size, (step + 1) * self._batch_size)
            chosen, is_mirrored = order[part], mirrored[part]
            inputs = self._features[torch.from_numpy(is_mirrored), torch.from_numpy(chosen)].float()
            yield _batch(inputs, self._labels, self._teacher, is_mirrored, chosen)


@torch.inference_mode()
def seen_by(
    module: nn.Module, pixels: NDArray[np.uint8], preprocess: Preprocess, *, is_mirrored: bool, batch_size: int = 250
) -> Tensor:
    """What `module` gives for every picture, (1 or 2, N, ...) float16: as they are and, with `is_mirrored`, mirrored.

    `module` is in evaluation mode and gives a tensor, or a tuple of one.  A copy of it runs as in training: on the
    training device, channels_last where it takes that, bfloat16 where the machine computes in it.
    """
    device = training_device()
    module = copy.deepcopy(module).to(device)
    layout = layout_of(module, as_planes(pixels[:2], preprocess).to(device))
    module.to(memory_format=layout)  # type: ignore[call-overload]
    whole = torch.empty(0)
    for side in range(1 + is_mirrored):
        for first in range(0, len(pixels), batch_size):
            part = pixels[first : first + batch_size]
            inputs = as_inputs(part[:, :, ::-1].copy() if side else part, preprocess).to(device, memory_format=layout)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device)):
                given = module(inputs)
            values = given[0] if isinstance(given, tuple) else given
            if not whole.numel():
                whole = torch.empty((1 + is_mirrored, len(pixels), *values.shape[1:]), dtype=torch.float16)
            whole[side, first : first + len(part)] = values
    return whole


def _batch(
    inputs: Tensor,
    labels: NDArray[np.int64] | None,
    teacher: Tensor | None,
    is_mirrored: NDArray[np.int64],
    chosen: NDArray[np.int64],
    features: Tensor | None = None,
) -> Batch:
    known = None if labels is None else torch.from_numpy(labels[chosen])
    sides, places = torch.from_numpy(is_mirrored), torch.from_numpy(chosen)
    taught, imitated = (None if seen is None else seen[sides, places].float() for seen in (teacher, features))
    return Batch(inputs, known, taught, imitated)


def _check(
    count: int, labels: NDArray[np.int64] | None, batch_size: int, teacher: Tensor | None, num_sides: int
) -> None:
    if not 1 <= batch_size <= count:
        raise DataError(f"training needs at least one batch of pictures, got {count} for a batch of {batch_size}")
    if labels is None and teacher is None:
        raise DataError("training needs labels or the unmodified network's logits, got neither")
    if teacher is not None and teacher.shape[:2] != (num_sides, count):
        have = tuple(teacher.shape[:2])
        raise DataError(f"a teacher's logits must be of {num_sides} x {count} pictures, got {have}")
