"""CIFAR-10 (Krizhevsky, 2009) from any of three forms of its files, in the official order.

    cifar-10-batches-bin/data_batch_1..5.bin, test_batch.bin     official, binary: 3,073 bytes a picture
    cifar-10-batches-py/data_batch_1..5, test_batch              official, for Python (read by `batch_file`)
    cifar10/train_1..5.npy.xz, test.npy.xz, labels.npz           differences, packed by xz (`_read_packed`)

A folder holds them itself, or in a sub-folder of these names.
"""

from __future__ import annotations

import io
import lzma
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import DataError
from .batch_file import read_batch
from .images import Images, Part, Source

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_SHAPE = (32, 32, 3)
_BATCH = 10_000


class _Form(NamedTuple):
    folder: str
    files: tuple[str, ...]
    """Five training batches, then the test batch."""
    read: Callable[[Path], Images]


def cifar10(data_dir: Path) -> Source:
    """50,000 training and 10,000 test pictures (32, 32, 3); the validation part needs `hold_out`.

    Raises:
        DataError: `data_dir` holds none of the three forms, here or when a part of it is read.
    """
    for form in _FORMS:
        for place in (data_dir, data_dir / form.folder):
            if (place / form.files[-1]).is_file():
                return Source("cifar10", CLASSES, _SHAPE, _reader(place, form))
    names = ", ".join(f"{form.folder}/{form.files[-1]}" for form in _FORMS)
    raise DataError(f'no CIFAR-10 in {data_dir}: looked for {names} (data "cifar10")')


def _reader(place: Path, form: _Form) -> Callable[[Part], Images]:
    def read(part: Part) -> Images:
        if part == "validation":
            raise DataError('CIFAR-10 has no validation part: give a holdout (data "cifar10")')
        paths = [place / name for name in (form.files[:-1] if part == "train" else form.files[-1:])]
        for path in paths:
            if not path.is_file():
                raise DataError(f'{path} is missing (data "cifar10")')
        batches = [form.read(path) for path in paths]
        labels = [batch.labels for batch in batches if batch.labels is not None]
        return Images(np.concatenate([batch.pixels for batch in batches]), np.concatenate(labels))

    return read


def _from_planes(planes: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """(N, 3072) as the official files have it (red, green, blue planes) -> (N, 32, 32, 3)."""
    return np.ascontiguousarray(planes.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))


def _read_binary(path: Path) -> Images:
    raw = np.fromfile(path, dtype=np.uint8)
    if len(raw) != _BATCH * 3073:
        raise DataError(f'{path} must have {_BATCH * 3073} bytes, it has {len(raw)} (data "cifar10")')
    rows = raw.reshape(_BATCH, 3073)
    return Images(_from_planes(rows[:, 1:]), rows[:, 0].astype(np.int64))


def _read_python(path: Path) -> Images:
    batch = read_batch(path)
    planes, labels = batch.get("data"), batch.get("labels")
    if not isinstance(planes, np.ndarray) or planes.shape != (_BATCH, 3072) or not isinstance(labels, list):
        raise DataError(f'{path} does not hold {_BATCH} x 3072 "data" and "labels" (data "cifar10")')
    return Images(_from_planes(planes), np.array(labels, dtype=np.int64))


def _read_packed(path: Path) -> Images:
    try:
        planes = np.load(io.BytesIO(lzma.decompress(path.read_bytes())), allow_pickle=False)
        with (path.parent / "labels.npz").open("rb") as file, np.load(file, allow_pickle=False) as table:
            labels = table["test" if path.name.startswith("test") else "train"]
    except (OSError, EOFError, lzma.LZMAError, zipfile.BadZipFile, ValueError, KeyError) as error:
        raise DataError(f'{path} or labels.npz beside it cannot be read: {error} (data "cifar10")') from error
    if planes.shape != (3, _BATCH, 32, 32) or planes.dtype != np.uint8:
        raise DataError(f'{path} must hold uint8 3x{_BATCH}x32x32, got {planes.dtype} {planes.shape} (data "cifar10")')
    green, red, blue = np.cumsum(np.cumsum(planes, 2, dtype=np.uint8), 3, dtype=np.uint8)
    first = 0 if path.name.startswith("test") else (int(path.name[6]) - 1) * _BATCH
    pixels = np.stack([red + green, green, blue + green], -1)
    return Images(pixels, labels[first : first + _BATCH].astype(np.int64))


_FORMS = (
    _Form(
        "cifar-10-batches-bin",
        (*(f"data_batch_{index}.bin" for index in range(1, 6)), "test_batch.bin"),
        _read_binary,
    ),
    _Form("cifar-10-batches-py", (*(f"data_batch_{index}" for index in range(1, 6)), "test_batch"), _read_python),
    _Form("cifar10", (*(f"train_{index}.npy.xz" for index in range(1, 6)), "test.npy.xz"), _read_packed),
)
