"""Pictures and labels as arrays, and sources of them in three parts that share no picture.

    train        what a network is trained on, and what ranges and tables are calibrated on
    validation   what choices are made on (bit widths, plans)
    test         what figures are reported on; no choice has seen it

A source that comes with two parts only gets its validation part by `hold_out`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError

Part = Literal["train", "validation", "test"]
Holdout = Literal["test-fifth", "train"]
PARTS: tuple[Part, ...] = get_args(Part)
HOLDOUTS: tuple[Holdout, ...] = get_args(Holdout)


@dataclass(frozen=True, slots=True)
class Images:
    """Pictures (N, H, W, C) uint8 and their classes (N,) int64, None where nobody knows them."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64] | None

    def pick(self, which: slice | NDArray[np.int64] | NDArray[np.bool_]) -> Images:
        """The pictures at these positions, with their labels."""
        return Images(self.pixels[which], None if self.labels is None else self.labels[which])

    @property
    def digest(self) -> str:
        """Hex sha256 of the pictures and their classes."""
        digest = hashlib.sha256(np.ascontiguousarray(self.pixels).tobytes())
        if self.labels is not None:
            digest.update(self.labels.tobytes())
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self.pixels)


class Source:
    """Where pictures come from: a name, class names, the shape (H, W, C) of every picture, and three parts.

    `read` is called once for each part, when it is first asked for; `images` remembers the answer.  A source whose
    parts may be larger than memory gives `read_some` as well: so many pictures of a part, the same ones every time.
    """

    def __init__(
        self,
        name: str,
        classes: tuple[str, ...],
        shape: tuple[int, int, int],
        read: Callable[[Part], Images],
        read_some: Callable[[Part, int], Images] | None = None,
    ) -> None:
        self.name = name
        self.classes = classes
        self.shape = shape
        self._read = read
        self._read_some = read_some
        self._parts: dict[str, Images] = {}

    def images(self, part: str) -> Images:
        """One part of the source.

        Raises:
            DataError: no such part, or it cannot be read, or it is empty or of another shape or class.
        """
        if part not in self._parts:
            self._parts[part] = self._checked(part, self._read(self._known(part)))
        return self._parts[part]

    def drawn(self, part: str, count: int) -> Images:
        """`count` pictures of a part (all, where it has fewer), in an order that is random but always the same.

        Raises:
            DataError: as `images`.
        """
        if self._read_some is not None and part not in self._parts:
            return self._checked(part, self._read_some(self._known(part), count))
        images = self.images(part)
        return images.pick(drawn_rows(len(images), count))

    def _known(self, part: str) -> Part:
        for known in PARTS:
            if known == part:
                return known
        raise DataError(f'part must be {", ".join(PARTS)}, got "{part}" (data "{self.name}")')

    def _checked(self, part: str, images: Images) -> Images:
        where = f'({part} part of data "{self.name}")'
        pixels, labels = images.pixels, images.labels
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[1:] != self.shape:
            shape = "x".join(map(str, pixels.shape[1:]))
            allowed = "x".join(map(str, self.shape))
            raise DataError(f"pictures must be uint8 {allowed}, got {pixels.dtype} {shape} {where}")
        if len(pixels) == 0:
            raise DataError(f"no pictures {where}")
        if labels is not None:
            if labels.shape != (len(pixels),) or labels.dtype != np.int64:
                raise DataError(f"labels must be {len(pixels)} int64, got {labels.shape} {labels.dtype} {where}")
            if labels.min() < 0 or labels.max() >= len(self.classes):
                got = f"{labels.min()} to {labels.max()}"
                raise DataError(f"labels must be 0 to {len(self.classes) - 1}, got {got} {where}")
        return images


def drawn_rows(length: int, count: int) -> NDArray[np.int64]:
    """The first `count` of a random order of 0 to `length` - 1 that is always the same."""
    return np.random.default_rng(0).permutation(length)[:count]


def hold_out(source: Source, how: str) -> Source:
    """The same source with its validation part taken from pictures it already has.

    test-fifth   validation = test pictures 0, 5, 10, ...; test = the others; train as it is.  For
                 networks whose training has seen the whole train part.
    train        validation = every tenth training picture (5,000 of 50,000); train = the others; test as it is.

    Raises:
        DataError: `how` is neither.
    """
    if how not in HOLDOUTS:
        raise DataError(f'holdout must be {" or ".join(HOLDOUTS)}, got "{how}" (data "{source.name}")')
    victim, step = ("test", 5) if how == "test-fifth" else ("train", 10)

    def read(part: Part) -> Images:
        if part not in ("validation", victim):
            return source.images(part)
        whole = source.images(victim)
        is_held_out = np.arange(len(whole)) % step == 0
        return whole.pick(is_held_out if part == "validation" else ~is_held_out)

    return Source(source.name, source.classes, source.shape, read)
