"""The embedded data: pinned bytes, disjoint parts, readable digits."""

import hashlib

import numpy as np
import pytest

from coinfer.data import PARTS, load_source
from coinfer.data.digits import _place, _plainest, compose_scenes, photograph_tiles
from coinfer.errors import DataError

SCENES = load_source("scene-digits")


def digest(pixels):
    return hashlib.sha256(np.ascontiguousarray(pixels).tobytes()).hexdigest()


def test_digits_are_the_pinned_ones():
    source = load_source("digits")
    parts = [source.images(part) for part in PARTS]
    assert [len(part) for part in parts] == [1097, 300, 400]
    assert [digest(part.pixels)[:16] for part in parts] == [
        "5ce9475f7b7af8ab",
        "7f7c209a50bd6b1a",
        "f665fb2957a5c88f",
    ]
    assert source.shape == (8, 8, 1)


def test_digits_of_the_parts_are_all_digits_each_once():
    from sklearn.datasets import load_digits

    source = load_source("digits")
    pixels = np.concatenate([source.images(part).pixels for part in PARTS]).reshape(-1, 64)
    labels = np.concatenate([source.images(part).labels for part in PARTS])
    bunch = load_digits()
    # Sorted by content, labels and all: the same multiset, hence a partition.
    ours = sorted(map(tuple, np.column_stack([pixels, labels]).tolist()))
    theirs = sorted(map(tuple, np.column_stack([bunch.data.astype(int) * 255 // 16, bunch.target]).tolist()))
    assert ours == theirs


@pytest.mark.parametrize(("part", "count"), [("validation", 2000), ("test", 4000)])
def test_scenes_are_the_pinned_ones(part, count):
    images = SCENES.images(part)
    assert images.pixels.shape == (count, 64, 64, 3)
    assert (digest(images.pixels)[:16], digest(images.labels)[:16]) == PINNED[part]


PINNED = {
    "validation": ("d1246f3154ef1fe9", "3f97a77532aeb338"),
    "test": ("315a75623c839fd5", "8c39057ba942441e"),
}


def test_tiles_of_the_photographs_are_disjoint_between_parts():
    tiles = {part: {tile.tobytes() for tile in photograph_tiles(part)} for part in PARTS}
    assert [len(tiles[part]) for part in PARTS] == [18, 6, 6]
    assert not tiles["train"] & tiles["validation"]
    assert not tiles["train"] & tiles["test"]
    assert not tiles["validation"] & tiles["test"]


def test_labels_are_those_of_the_digits_placed():
    digits = load_source("digits").images("test")
    drawn = SCENES.images("test").labels
    # Digits are drawn alike, so each class comes up as often as it is among the part's digits (4 sigma).
    share = np.bincount(digits.labels, minlength=10) / len(digits)
    sigma = np.sqrt(len(drawn) * share * (1 - share))
    assert (np.abs(np.bincount(drawn, minlength=10) - len(drawn) * share) < 4 * sigma).all()


def test_without_scikit_learn_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("coinfer.data.digits.find_spec", lambda name: None)
    for name in ("digits", "scene-digits"):
        with pytest.raises(DataError, match=r'need scikit-learn.*pip install "coinfer\[build\]"'):
            load_source(name).images("test")


def test_close_ups_keep_the_scale_of_scenes(monkeypatch):
    monkeypatch.setattr("coinfer.data.digits._NUM_SCENES", {"train": 50, "validation": 50, "test": 50})
    close, scenes = compose_scenes("validation", size=32), compose_scenes("validation")
    assert close.pixels.shape == (50, 32, 32, 3)
    assert np.array_equal(close.labels, scenes.labels)


def test_digit_goes_where_the_picture_is_plainest_and_stands_out():
    scene = np.full((64, 64, 3), 40, np.uint8)
    scene[:32] = np.random.default_rng(0).integers(0, 256, (32, 64, 3))
    assert _plainest(scene, [0, 40, 8, 20], [0, 7, 30, 5], 20) == (40, 7)
    dark, light = np.full((2, 2, 3), 40, np.uint8), np.full((2, 2, 3), 200, np.uint8)
    glyph = np.array([[0, 255], [128, 0]], np.uint8)
    _place(dark, glyph, np.array([10, 20, 30]))
    _place(light, glyph, np.array([10, 20, 30]))
    assert dark[0].tolist() == [[40, 40, 40], [245, 235, 225]]
    assert light[0].tolist() == [[200, 200, 200], [10, 20, 30]]
    assert dark[1, 0].tolist() == [round((40 * 127 + value * 128) / 255) for value in (245, 235, 225)]
