"""Training batches, the same for the same seed: pictures, or features that a frozen head computed once.

    PictureBatches    pictures shuffled, augmented and normalised
    FeatureBatches    what crosses a cut, of every picture in each of its views
    AnsweredBatches   pictures mixed anew each time, with a network's answers to just these

With a teacher, each sample comes with the unmodified network's logits of its view (a shift by a few pixels hardly
moves them).  The order and the augmentation of an epoch follow from (seed, epoch) alone, so
that a training that was stopped goes on as if it had not been.
"""

from __future__ import annotations

import copy
import functools
import tempfile
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..errors import DataError
from ..model.graph import first_of
from ..plan import Preprocess
from .hardware import has_bfloat16, layout_of, training_device
from .losses import Batch

IN_MEMORY_BYTES = 4_000_000_000
_HALF_MAX = 65504.0


class Batches(Protocol):
    """What `fit` reads: a number of batches an epoch, and the batches of one epoch."""

    def __len__(self) -> int:
        """Batches an epoch."""
        ...

    def epoch(self, number: int) -> Iterator[Batch]:
        """The batches of epoch `number`, counted from 0."""
        ...


class Views(NamedTuple):
    """The fixed views of a picture that a frozen network is asked about once: as it is, mirrored, and mixed.

    Mirroring suits photographs of things; a mirrored digit is another sign.  A mix is `share` of the picture and the
    rest of another one, both fixed: to such pictures a network that knows its training set by heart gives answers as
    soft as to new ones (Zhang et al., 2018, arXiv:1710.09412; for distillation Beyer et al., 2022, arXiv:2106.05237).
    View v of n sides is the picture (v < n) or its mix v // n, mirrored where v % n is 1.
    """

    is_mirrored: bool = True
    mixes: int = 0

    @property
    def num_views(self) -> int:
        """How many there are of each picture."""
        return (1 + self.is_mirrored) * (1 + self.mixes)

    def of(self, pixels: NDArray[np.uint8], chosen: NDArray[np.int64], views: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Pictures (n, H, W, C): view `views[i]` of picture `chosen[i]` of `pixels` (N, H, W, C)."""
        seen, sides = pixels[chosen], 1 + self.is_mirrored
        for mix in range(1, 1 + self.mixes):
            is_mixed = views // sides == mix
            if is_mixed.any():
                others, shares = _partners(len(pixels), mix)
                share = shares[chosen[is_mixed], None, None, None]
                other = pixels[others[chosen[is_mixed]]]
                seen[is_mixed] = np.rint(share * seen[is_mixed] + (1 - share) * other).astype(np.uint8)
        is_flipped = views % sides == 1
        seen[is_flipped] = seen[is_flipped][:, :, ::-1]
        return seen


@functools.lru_cache(maxsize=8)
def _partners(count: int, mix: int) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """For each of `count` pictures the other one of its mix, and its own share of it, half to all."""
    rng = np.random.default_rng([count, mix])
    return rng.permutation(count), rng.uniform(0.5, 1.0, count)


class Augment(NamedTuple):
    """One of the views of each picture, shifted by up to `shift` pixels (the border reflected)."""

    shift: int = 4
    views: Views = Views()


def augmented(
    pixels: NDArray[np.uint8], chosen: NDArray[np.int64], augment: Augment, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """The chosen of pictures (N, H, W, C), each in a view and shifted by its own draw; and (n,) the views."""
    count, (height, width), shift = len(chosen), pixels.shape[1:3], augment.shift
    rows = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(height)
    columns = rng.integers(0, 2 * shift + 1, size=(count, 1)) + np.arange(width)
    views: NDArray[np.int64] = np.zeros(count, np.int64)
    if augment.views.num_views > 1:
        views = np.asarray(rng.integers(0, augment.views.num_views, size=count))
    seen = augment.views.of(pixels, chosen, views)
    padded = np.pad(seen, ((0, 0), (shift, shift), (shift, shift), (0, 0)), mode="reflect")
    moved: NDArray[np.uint8] = padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return moved, views


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
        teacher: (V, N, K) logits of the V views of each picture.
        features: (V, N, C, H, W) what crosses a cut, likewise; for pictures that are not shifted.

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
        _check(len(pixels), labels, batch_size, teacher, 1 if augment is None else augment.views.num_views)
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
            if self._augment is None:
                pixels, views = self._pixels[chosen], np.zeros(len(chosen), np.int64)
            else:
                pixels, views = augmented(self._pixels, chosen, self._augment, rng)
            inputs = as_inputs(pixels, self._preprocess)
            yield _batch(inputs, self._labels, self._teacher, views, chosen, self._features)


class FeatureBatches:
    """Batches of features (V, N, *shape) of the V views of N pictures.

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
        """Every picture at most once, in an order drawn from (seed, number), in a view by its own draw."""
        rng = np.random.default_rng([self._seed, number])
        order = rng.permutation(self._features.shape[1])
        drawn = rng.integers(0, len(self._features), size=len(order))
        for step in range(len(self)):
            part = slice(step * self._batch_size, (step + 1) * self._batch_size)
            chosen, views = order[part], drawn[part]
            inputs = self._features[torch.from_numpy(views), torch.from_numpy(chosen)].float()
            yield _batch(inputs, self._labels, self._teacher, views, chosen)


class AnsweredBatches:
    """Pictures mixed anew each time they are shown, with a network's own answers to just these.

    Half of each batch of `pictures` stays as it is, half is mixed with others of the batch.  Answers to what is shown,
    however it was changed, teach more than those to fixed views (Beyer et al., 2022, arXiv:2106.05237); each step costs
    the network's forward pass more.  `network` is in evaluation mode, on the device where it runs.
    """

    def __init__(self, pictures: PictureBatches, network: nn.Module, *, seed: int = 0) -> None:
        self._pictures, self._network, self._seed = pictures, network, seed

    def __len__(self) -> int:
        return len(self._pictures)

    @torch.no_grad()
    def epoch(self, number: int) -> Iterator[Batch]:
        """As `PictureBatches.epoch`, without labels."""
        device = next(self._network.parameters()).device
        draw = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        for batch in self._pictures.epoch(number):
            inputs = _mixed(batch.inputs, draw).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device)):
                answers = first_of(self._network(inputs))
            yield Batch(inputs, None, answers.float())


def _mixed(inputs: Tensor, draw: torch.Generator) -> Tensor:
    """Half of the pictures, each with another one: half to all of itself, the rest the other."""
    count = len(inputs)
    shares = torch.where(torch.rand(count, generator=draw) < 0.5, 1.0, 0.5 + 0.5 * torch.rand(count, generator=draw))
    others = inputs[torch.randperm(count, generator=draw)]
    share = shares.view(-1, *[1] * (inputs.ndim - 1))
    return share * inputs + (1 - share) * others


@torch.inference_mode()
def seen_by(
    module: nn.Module, pixels: NDArray[np.uint8], preprocess: Preprocess, views: Views, *, batch_size: int = 250
) -> Tensor:
    """What `module` gives for every view of every picture, (V, N, ...) float16.

    `module` is in evaluation mode; of several outputs the first counts.  A copy of it runs as in training: on the
    training device, channels_last where it takes that, bfloat16 where the machine computes in it.  What is too large
    for memory lies in a file (of TMPDIR); values are clipped to float16's range.
    """
    device = training_device()
    module = copy.deepcopy(module).to(device)
    layout = layout_of(module, as_planes(pixels[:2], preprocess).to(device))
    module.to(memory_format=layout)  # type: ignore[call-overload]
    whole = torch.empty(0)
    for view in range(views.num_views):
        for first in range(0, len(pixels), batch_size):
            chosen = np.arange(first, min(first + batch_size, len(pixels)))
            part = views.of(pixels, chosen, np.full(len(chosen), view))
            inputs = as_inputs(part, preprocess).to(device, memory_format=layout)
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=has_bfloat16(device)):
                given = module(inputs)
            values = first_of(given)
            if not whole.numel():
                whole = _room((views.num_views, len(pixels), *values.shape[1:]))
            whole[view, first : first + len(part)] = values.clamp(-_HALF_MAX, _HALF_MAX)
    return whole


def _room(shape: tuple[int, ...]) -> Tensor:
    """An empty float16 tensor; one beyond `IN_MEMORY_BYTES` lies in a file without a name, which goes with it."""
    if 2 * int(np.prod(shape)) <= IN_MEMORY_BYTES:
        return torch.empty(shape, dtype=torch.float16)
    with tempfile.TemporaryFile() as file:
        return torch.from_numpy(np.memmap(file, dtype=np.float16, mode="w+", shape=shape))


def _batch(
    inputs: Tensor,
    labels: NDArray[np.int64] | None,
    teacher: Tensor | None,
    views: NDArray[np.int64],
    chosen: NDArray[np.int64],
    features: Tensor | None = None,
) -> Batch:
    known = None if labels is None else torch.from_numpy(labels[chosen])
    drawn, places = torch.from_numpy(views), torch.from_numpy(chosen)
    taught, imitated = (None if seen is None else seen[drawn, places].float() for seen in (teacher, features))
    return Batch(inputs, known, taught, imitated)


def _check(
    count: int, labels: NDArray[np.int64] | None, batch_size: int, teacher: Tensor | None, num_views: int
) -> None:
    if not 1 <= batch_size <= count:
        raise DataError(f"training needs at least one batch of pictures, got {count} for a batch of {batch_size}")
    if labels is None and teacher is None:
        raise DataError("training needs labels or the unmodified network's logits, got neither")
    if teacher is not None and teacher.shape[:2] != (num_views, count):
        have = tuple(teacher.shape[:2])
        raise DataError(f"a teacher's logits must be of {num_views} x {count} pictures, got {have}")
