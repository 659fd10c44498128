"""Photographs with ImageNet-1k labels from two small tar files, as the source `imagenette`.

    imagenet_sample_112.tar            one photograph of every ninth class, original files: in turn of the train and
                                       of the validation part, ten crops each (Krizhevsky et al. 2012)
    imagenette_val500_224px.tar        500 validation pictures of 10 classes, 224 x 224: the test part

NOTE the photographs are very likely ImageNet training pictures: fit for agreement with a network's own answers,
which the crops away from the centre make harder again, and not for its accuracy.

Each file has a labels.csv as its last member.  Larger photographs are scaled so that the short side is 256 for a
crop of 224, and cropped around the centre, as ImageNet networks are evaluated.
"""

from __future__ import annotations

import csv
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from ..errors import DataError
from .images import Images, Part, Source

_PHOTOGRAPHS, _PICTURES = "imagenet_sample_112.tar", "imagenette_val500_224px.tar"
_CORNERS = ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0), (1.0, 1.0))


def imagenette(data_dir: Path, *, size: tuple[int, int] | None = None) -> Source:
    """Ten crops each of 56 photographs to calibrate on and of 56 to choose on; 500 pictures to report on.

    Raises:
        DataError: `data_dir` (or its sub-folder `imagenet`) lacks one of the two files; when a part is
            read: a file that is damaged.
    """
    places = [place for place in (data_dir, data_dir / "imagenet") if (place / _PICTURES).is_file()]
    if not places:
        raise DataError(f'no imagenet/{_PICTURES} in {data_dir} (data "imagenette")')
    place, (height, width) = places[0], size or (224, 224)

    def read(part: Part) -> Images:
        if part == "test":
            return read_tar(place / _PICTURES, size=(height, width))
        return ten_crops(place / _PHOTOGRAPHS, size=(height, width), first=0 if part == "train" else 1)

    return Source("imagenette", _classes(place), (height, width, 3), read)


def read_tar(path: Path, *, size: tuple[int, int]) -> Images:
    """The photographs that labels.csv lists, scaled and cropped to `size` (height, width), with their labels.

    Raises:
        DataError: the file is missing, is not such a tar, or a photograph in it is damaged.
    """
    pictures, labels = _read(path, size)
    return Images(np.stack([_crop(picture, size, (0.5, 0.5)) for picture in pictures]), labels)


def ten_crops(path: Path, *, size: tuple[int, int], first: int) -> Images:
    """Every second photograph from number `first` on: centres, then corners, then the same mirrored.

    Raises:
        DataError: as `read_tar`.
    """
    pictures, labels = _read(path, size)
    crops = [_crop(picture, size, at) for at in ((0.5, 0.5), *_CORNERS) for picture in pictures[first::2]]
    upright = np.stack(crops)
    return Images(np.concatenate([upright, upright[:, :, ::-1]]), np.tile(labels[first::2], 10))


def _read(path: Path, size: tuple[int, int]) -> tuple[list[NDArray[np.uint8]], NDArray[np.int64]]:
    """Scaled photographs, not cropped yet, and their labels."""
    try:
        with tarfile.open(path) as tar:
            rows = list(csv.DictReader(io.StringIO(_member(tar, "labels.csv").decode())))
            pictures = [_scaled(_member(tar, row["file"]), size) for row in rows]
    except (tarfile.TarError, OSError, KeyError, UnidentifiedImageError, UnicodeDecodeError) as error:
        raise DataError(f'{path} cannot be read: {error} (data "imagenette")') from error
    return pictures, np.array([int(row["label"]) for row in rows], dtype=np.int64)


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    file = tar.extractfile(name)
    if file is None:
        raise KeyError(f"{name} is not a file")
    return file.read()


def _scaled(raw: bytes, size: tuple[int, int]) -> NDArray[np.uint8]:
    """Short side to 256/224 of the crop's, except where the picture already has the crop's size."""
    with Image.open(io.BytesIO(raw)) as image:
        picture = image.convert("RGB")
    if (picture.height, picture.width) != size:
        factor = max(size) * 256 / 224 / min(picture.height, picture.width)
        scaled = (round(picture.width * factor), round(picture.height * factor))
        picture = picture.resize(scaled, Image.Resampling.BILINEAR)
    return np.asarray(picture)


def _crop(picture: NDArray[np.uint8], size: tuple[int, int], at: tuple[float, float]) -> NDArray[np.uint8]:
    """The part of `size` that begins at these shares of what can be cut away from top and left."""
    top, left = (int(share * (have - keep)) for share, have, keep in zip(at, picture.shape, size, strict=False))
    return picture[top : top + size[0], left : left + size[1]]


def _classes(place: Path) -> tuple[str, ...]:
    """Names of the 1,000 classes; their numbers where the list is absent."""
    path = place / "imagenet_classes.json"
    if not path.is_file():
        return tuple(str(index) for index in range(1000))
    try:
        table = json.loads(path.read_bytes())
        names = {int(row["index"]): str(row["name"]) for row in table}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f'{path} cannot be read: {error} (data "imagenette")') from error
    return tuple(names[index] for index in range(len(names)))
