"""Photographs with ImageNet-1k labels from two small tar files, as the source `imagenette`.

    imagenet_sample_112.tar            one photograph of every ninth class, original files: the train part
                                       (for calibration; very likely ImageNet training pictures)
    imagenette_val500_224px.tar        500 validation pictures of 10 classes, 224 x 224: the test part

Each has a labels.csv as its last member.  Larger photographs are scaled so that the short side is 256 for a crop
of 224, and cropped around the centre, as ImageNet networks are evaluated.
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

_FILES: dict[Part, str] = {"train": "imagenet_sample_112.tar", "test": "imagenette_val500_224px.tar"}


def imagenette(data_dir: Path, *, size: tuple[int, int] | None = None) -> Source:
    """112 photographs to calibrate on and 500 to choose and report on; the validation part needs `hold_out`.

    Raises:
        DataError: `data_dir` (or its sub-folder `imagenet`) lacks one of the two files; when a part is
            read: a file that is damaged.
    """
    places = [place for place in (data_dir, data_dir / "imagenet") if (place / _FILES["test"]).is_file()]
    if not places:
        raise DataError(f'no imagenet/{_FILES["test"]} in {data_dir} (data "imagenette")')
    place, (height, width) = places[0], size or (224, 224)

    def read(part: Part) -> Images:
        if part == "validation":
            raise DataError('imagenette has no validation part: give a holdout (data "imagenette")')
        return read_tar(place / _FILES[part], size=(height, width))

    return Source("imagenette", _classes(place), (height, width, 3), read)


def read_tar(path: Path, *, size: tuple[int, int]) -> Images:
    """The photographs that labels.csv lists, scaled and cropped to `size` (height, width), with their labels.

    Raises:
        DataError: the file is missing, is not such a tar, or a photograph in it is damaged.
    """
    try:
        with tarfile.open(path) as tar:
            rows = list(csv.DictReader(io.StringIO(_member(tar, "labels.csv").decode())))
            pixels = [_scaled(_member(tar, row["file"]), size) for row in rows]
    except (tarfile.TarError, OSError, KeyError, UnidentifiedImageError, UnicodeDecodeError) as error:
        raise DataError(f'{path} cannot be read: {error} (data "imagenette")') from error
    return Images(np.stack(pixels), np.array([int(row["label"]) for row in rows], dtype=np.int64))


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
        left, top = (picture.width - size[1]) // 2, (picture.height - size[0]) // 2
        picture = picture.crop((left, top, left + size[1], top + size[0]))
    return np.asarray(picture)


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
