"""Sources: parts read once, checked, and held out without overlap."""

import numpy as np
import pytest

from coinfer.data import PARTS, Images, Source, hold_out
from coinfer.errors import DataError


def numbered(count, first=0):
    """Pictures whose only pixel is their number."""
    values = np.arange(first, first + count, dtype=np.uint8)
    return Images(values.reshape(-1, 1, 1, 1), values.astype(np.int64) % 3)


def source(read=None, shape=(1, 1, 1)):
    parts = {"train": numbered(50), "test": numbered(20, 100), "validation": numbered(5, 200)}
    return Source("numbers", ("a", "b", "c"), shape, read or parts.__getitem__)


def values(images):
    return images.pixels.ravel().tolist()


def test_part_is_read_once():
    calls = []

    def read(part):
        calls.append(part)
        return numbered(3)

    made = source(read)
    assert made.images("train") is made.images("train")
    assert calls == ["train"]


def test_every_fifth_test_picture_is_held_out():
    held = hold_out(source(), "test-fifth")
    assert values(held.images("train")) == list(range(50))
    assert values(held.images("validation")) == [100, 105, 110, 115]
    assert values(held.images("test")) == [n for n in range(100, 120) if n % 5]
    assert held.images("test").labels.tolist() == [n % 3 for n in range(100, 120) if n % 5]


def test_a_tenth_of_the_training_pictures_is_held_out():
    held = hold_out(source(), "train")
    assert values(held.images("validation")) == [0, 10, 20, 30, 40]
    assert values(held.images("train")) == [n for n in range(50) if n % 10]
    assert values(held.images("test")) == list(range(100, 120))


def test_unknown_part_and_holdout():
    with pytest.raises(DataError, match='part must be train, validation, test, got "val"'):
        source().images("val")
    with pytest.raises(DataError, match='holdout must be test-fifth or train, got "half"'):
        hold_out(source(), "half")


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (Images(np.zeros((2, 1, 1, 1), np.float32), None), "must be uint8 1x1x1, got float32 1x1x1"),
        (Images(np.zeros((2, 3, 1, 1), np.uint8), None), "must be uint8 1x1x1, got uint8 3x1x1"),
        (Images(np.zeros((0, 1, 1, 1), np.uint8), None), "no pictures"),
        (Images(np.zeros((2, 1, 1, 1), np.uint8), np.zeros(3, np.int64)), r"labels must be 2 int64, got \(3,\)"),
        (Images(np.zeros((1, 1, 1, 1), np.uint8), np.array([3])), "labels must be 0 to 2, got 3 to 3"),
        (Images(np.zeros((1, 1, 1, 1), np.uint8), np.array([-1])), "labels must be 0 to 2, got -1 to -1"),
    ],
)
def test_pictures_of_another_kind_are_refused(images, message):
    with pytest.raises(DataError, match=message) as raised:
        source(lambda part: images).images("test")
    assert 'test part of data "numbers"' in str(raised.value)


def test_unlabelled_pictures_stay_unlabelled():
    held = hold_out(source(lambda part: Images(numbered(10).pixels, None)), "test-fifth")
    assert all(held.images(part).labels is None for part in PARTS)
