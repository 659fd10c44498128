"""A folder of pictures as a source.

    PATH/CLASS/x.jpg                 classes are the sub-folders' names, sorted
    PATH/x.jpg                       no classes: labels are None
    PATH/train|validation|test/...   either of these in each part (`val` is understood too)

Without part folders a picture's part follows from a hash of its file name: 60 % train, 20 %
validation, 20 % test, the same on every machine.  With train and test alone, or train and validation
alone, every fifth picture of the second is the validation part.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .images import PARTS, Images, Part, Source, drawn_rows

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".tif", ".tiff"}
_MODES = {1: "L", 3: "RGB"}
_PART_FOLDERS: dict[str, Part] = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def read_picture(file: Path, *, size: tuple[int, int] | None = None, channels: int = 3) -> NDArray[np.uint8]:
    """One picture as RGB (H, W, 3) or with one channel as grey (H, W, 1).

    With `size` (height, width) it is scaled to cover it, then cropped around the centre.

    Raises:
        DataError: the file is missing or is not a picture that Pillow can read.
    """
    try:
        with Image.open(file) as image:
            return fit_picture(image, size=size, channels=channels)
    except UnidentifiedImageError as error:
        raise DataError(f"{file} is not a picture of a known format") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file} cannot be read as a picture: {error}") from error


def fit_picture(image: Image.Image, *, size: tuple[int, int] | None, channels: int = 3) -> NDArray[np.uint8]:
    """The picture as RGB or grey; scaled (bilinear) so that it just covers `size`, then the middle of it."""
    picture = image.convert(_MODES[channels])
    if size is not None and (picture.height, picture.width) != size:
        height, width = size
        scale = max(height / picture.height, width / picture.width)
        scaled = (max(width, round(picture.width * scale)), max(height, round(picture.height * scale)))
        picture = picture.resize(scaled, Image.Resampling.BILINEAR)
        left, top = (picture.width - width) // 2, (picture.height - height) // 2
        picture = picture.crop((left, top, left + width, top + height))
    return np.asarray(picture).reshape(picture.height, picture.width, channels)


def part_of(name: str) -> Part:
    """The part that a file name falls into: 60 % train, 20 % validation, 20 % test.

    >>> [part_of(f"photo_{index}.jpg") for index in range(3)]
    ['validation', 'train', 'train']
    """
    share = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return "train" if share < 60 else "validation" if share < 80 else "test"


def folder(path: Path, *, size: tuple[int, int] | None = None, channels: int = 3) -> Source:
    """The pictures below `path`, RGB or grey (1 channel), scaled and cropped to `size` (height, width) where given.

    Raises:
        DataError: another number of channels, no such folder, no pictures, or (without `size`) a first picture that
            cannot be read; when a part is read: an empty part, a file that is not a picture, or one of another size.
    """
    if not path.is_dir():
        raise DataError(f'no folder {path} (data "folder:{path}")')
    roots = {
        part: path / name for name, part in _PART_FOLDERS.items() if (path / name).is_dir() and "train" in _names(path)
    }
    classes = sorted({entry for root in (roots.values() or [path]) for entry in _names(root)})
    files = _files_of_parts(path, roots, classes)
    if not any(files.values()):
        raise DataError(f'no pictures in {path} (data "folder:{path}")')
    if channels not in _MODES:
        raise DataError(f'pictures of a folder have 1 or 3 channels, not {channels} (data "folder:{path}")')
    first = next(file for members in files.values() for file in members)
    height, width = size or read_picture(first, channels=channels).shape[:2]
    shape = (height, width, channels)

    def read(part: Part, count: int | None = None) -> Images:
        members = files[part]
        if not members:
            raise DataError(f'no pictures for the {part} part in {path} (data "folder:{path}")')
        if count is not None:
            members = [members[row] for row in drawn_rows(len(members), count)]
        pixels = np.stack([_of_shape(file, size, shape) for file in members])
        if not classes:
            return Images(pixels, None)
        return Images(pixels, np.array([classes.index(file.parent.name) for file in members], dtype=np.int64))

    return Source(f"folder:{path}", tuple(classes), shape, read, read)


def _files_of_parts(path: Path, roots: dict[Part, Path], classes: list[str]) -> dict[Part, list[Path]]:
    """The pictures of each part; where one is missing beside train, every fifth of the other stands in."""
    if not roots:
        listed = _files(path, classes)
        return {part: [f for f in listed if part_of(f.relative_to(path).as_posix()) == part] for part in PARTS}
    files = {part: _files(root, classes) for part, root in roots.items()}
    if "validation" not in files or "test" not in files:
        both = files.pop("validation", []) + files.pop("test", [])
        files["validation"], files["test"] = both[::5], [f for row, f in enumerate(both) if row % 5]
    return files


def _names(path: Path) -> list[str]:
    return [entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith(".")]


def _files(root: Path, classes: list[str]) -> list[Path]:
    """The pictures of one root, by class and name; those of the root itself where there are no classes."""
    places = [root / name for name in classes if (root / name).is_dir()] if classes else [root]
    return [
        file
        for place in places
        for file in sorted(place.iterdir())
        if file.is_file() and file.suffix.lower() in SUFFIXES
    ]


def _of_shape(file: Path, size: tuple[int, int] | None, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    picture = read_picture(file, size=size, channels=shape[2])
    if picture.shape != shape:
        got, allowed = (f"{height}x{width}" for height, width in (picture.shape[:2], shape[:2]))
        raise DataError(f"{file} is {got}, the others are {allowed}: give a size to scale and crop all of them")
    return picture
