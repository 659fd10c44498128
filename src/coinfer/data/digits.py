"""The embedded data: scikit-learn's real handwritten digits, alone or placed into real photographs.

`digits` are the 1,797 scans of 8 x 8 (Alpaydin and Kaynak, 1998).  `scene-digits` is what a
meter-reading camera sees, much picture and little answer:

    a random square of one of scikit-learn's two photographs, scaled to 64 x 64
      + one digit, 16 to 30 pixels high, in it, in a colour that stands out there; of four places
        drawn at random the one where the picture is plainest, as people put signs

The digits and the tiles of the photographs are disjoint between train, validation and test.  All
drawing is integer arithmetic on draws of a fixed seed, so that every machine composes the same bytes.
"""

from __future__ import annotations

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import DataError
from .folder import read_picture
from .images import PARTS, Images, Part, Source

CLASSES = tuple("0123456789")
SCENE_SIZE = 64
_SEED = 20_240_501
_NUM_SCENES: dict[Part, int] = {"train": 12_000, "validation": 2_000, "test": 4_000}
# Half-open ranges of the shuffled digits.
_DIGITS: dict[Part, tuple[int, int]] = {"train": (0, 1097), "validation": (1097, 1397), "test": (1397, 1797)}
# Each photograph is cut into 3 x 5 tiles, dealt out along the diagonals; a scene stays within one tile.
_TILE = (142, 128)
_DEAL: tuple[Part, ...] = ("train", "train", "train", "validation", "test")
_HEIGHTS = (16, 31)
_PLACES = 4


def digits() -> Source:
    """The scans as (8, 8, 1) uint8, 0 to 255: 1,097 to train on, 300 to choose on, 400 to report on."""
    return Source("digits", CLASSES, (8, 8, 1), _digits_part)


def scene_digits() -> Source:
    """Digits in photographs as (64, 64, 3) uint8: 12,000 to train on, 2,000 to choose on, 4,000 to report on."""
    return Source("scene-digits", CLASSES, (SCENE_SIZE, SCENE_SIZE, 3), compose_scenes)


def _digits_part(part: Part) -> Images:
    with gzip.open(_datasets_file("data/digits.csv.gz"), "rt") as file:
        table = np.loadtxt(file, delimiter=",", dtype=np.int64)  # 64 values of 0 to 16, then the class
    first, last = _DIGITS[part]
    chosen = table[np.random.default_rng(_SEED).permutation(len(table))[first:last]]
    pixels = (chosen[:, :64] * 255 // 16).astype(np.uint8)
    return Images(pixels.reshape(-1, 8, 8, 1), chosen[:, 64])


def _datasets_file(name: str) -> Path:
    """A data file within scikit-learn's package, found without importing it (which takes seconds)."""
    spec = find_spec("sklearn")
    places = (
        [] if spec is None else [Path(place) / "datasets" / name for place in spec.submodule_search_locations or ()]
    )
    for path in places:
        if path.is_file():
            return path
    raise DataError(f'digits need scikit-learn\'s data file "{name}": pip install "coinfer[build]"')


def photograph_tiles(part: Part) -> list[NDArray[np.uint8]]:
    """The part's tiles (142, 128, 3) of the two photographs; those of china.jpg twice, since flower.jpg is a blur."""
    china, flower = (read_picture(_datasets_file(f"images/{name}.jpg")) for name in ("china", "flower"))
    height, width = _TILE
    tiles = []
    for turn, photo in enumerate((china, china, flower)):
        for row, column in np.ndindex(photo.shape[0] // height, photo.shape[1] // width):
            if _DEAL[(column + 2 * row + turn // 2) % len(_DEAL)] == part:
                top, left = row * height, column * width
                tiles.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return tiles


class _Draws(NamedTuple):
    """Everything that is left to chance in the scenes of one part, each (N,), `tint` (N, 3), places (N, 4); int64."""

    digit: NDArray[np.int64]
    tile: NDArray[np.int64]
    square: NDArray[np.int64]
    height: NDArray[np.int64]
    row: NDArray[np.int64]
    column: NDArray[np.int64]
    top: NDArray[np.int64]
    left: NDArray[np.int64]
    tint: NDArray[np.int64]


def _draw(part: Part, *, size: int, num_digits: int, num_tiles: int) -> _Draws:
    rng = np.random.default_rng([_SEED, PARTS.index(part)])
    count = _NUM_SCENES[part]
    square = rng.integers(size, size * 7 // 4 + 1, size=count)
    height = rng.integers(*_HEIGHTS, size=count)
    return _Draws(
        digit=rng.integers(num_digits, size=count),
        tile=rng.integers(num_tiles, size=count),
        square=square,
        height=height,
        row=rng.integers(0, _TILE[0] - square + 1),
        column=rng.integers(0, _TILE[1] - square + 1),
        top=rng.integers(0, (size - height + 1)[:, None], size=(count, _PLACES)),
        left=rng.integers(0, (size - height + 1)[:, None], size=(count, _PLACES)),
        tint=rng.integers(0, 80, size=(count, 3)),
    )


def compose_scenes(part: Part, *, size: int = SCENE_SIZE) -> Images:
    """The part's scenes (N, size, size, 3), everything in them at the same scale; the source has 64.

    A `size` of 32 (the least) gives close-ups, in which a digit fills the picture: easier to learn from first.
    """
    scans = _digits_part(part)
    tiles = [Image.fromarray(tile) for tile in photograph_tiles(part)]
    draws = _draw(part, size=size, num_digits=len(scans), num_tiles=len(tiles))
    glyphs = [Image.fromarray(scan[..., 0]) for scan in scans.pixels]
    count = len(draws.digit)
    scenes = np.empty((count, size, size, 3), dtype=np.uint8)
    for index in range(count):
        square, row, column = (int(draw[index]) for draw in (draws.square, draws.row, draws.column))
        box = (column, row, column + square, row + square)
        tile = tiles[int(draws.tile[index])]
        scenes[index] = np.asarray(tile.resize((size, size), Image.Resampling.BILINEAR, box=box))
        height = int(draws.height[index])
        top, left = _plainest(scenes[index], draws.top[index].tolist(), draws.left[index].tolist(), height)
        glyph = glyphs[int(draws.digit[index])].resize((height, height), Image.Resampling.BICUBIC)
        _place(scenes[index, top : top + height, left : left + height], np.asarray(glyph), draws.tint[index])
    assert scans.labels is not None
    return Images(scenes, scans.labels[draws.digit])


def _plainest(scene: NDArray[np.uint8], tops: list[int], lefts: list[int], height: int) -> tuple[int, int]:
    """Of the squares that begin at (top, left) the one whose luma varies least."""
    red, green, blue = scene.astype(np.int32).transpose(2, 0, 1)
    luma = (299 * red + 587 * green + 114 * blue) // 1000
    spreads = []
    for top, left in zip(tops, lefts, strict=True):
        square = luma[top : top + height, left : left + height].ravel()
        # Variance times count squared: exact in integers, and all squares are of one size.
        spreads.append(len(square) * int(square @ square) - int(square.sum()) ** 2)
    best = spreads.index(min(spreads))
    return tops[best], lefts[best]


def _place(ground: NDArray[np.uint8], glyph: NDArray[np.uint8], tint: NDArray[np.int64]) -> None:
    """Blend a glyph (H, W) into `ground` (H, W, 3): near white where it is dark there, else near black."""
    wide = ground.astype(np.int32)
    red, green, blue = wide.sum((0, 1)).tolist()
    is_dark = 299 * red + 587 * green + 114 * blue < 128_000 * glyph.size
    colour = (255 - tint if is_dark else tint).astype(np.int32)
    cover = glyph.astype(np.int32)[..., None]
    ground[...] = (wide * (255 - cover) + colour * cover + 127) // 255
