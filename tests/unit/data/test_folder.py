"""Folders of pictures: classes, parts, sizes, and files that are none."""

import numpy as np
import pytest
from PIL import Image

from coinfer.data import PARTS, load_source
from coinfer.data.folder import fit_picture, part_of, read_picture
from coinfer.errors import DataError


def write(path, *, size=(6, 8), colour=(10, 20, 30)):
    """A picture of one colour, `size` being (height, width)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size[::-1], colour).save(path)


def test_sub_folders_are_classes_in_order(tmp_path):
    for number, name in enumerate(["cat", "ant", "bee"]):
        for index in range(20):
            write(tmp_path / name / f"{index}.png", colour=(number, index, 0))
    source = load_source(f"folder:{tmp_path}")
    assert source.classes == ("ant", "bee", "cat")
    assert source.shape == (6, 8, 3)
    seen = []
    for part in PARTS:
        images = source.images(part)
        # Red says which class was written: ant 1, bee 2, cat 0.
        assert [(1, 2, 0)[label] for label in images.labels] == images.pixels[:, 0, 0, 0].tolist()
        seen += map(tuple, images.pixels[:, 0, 0, :2].tolist())
    assert sorted(seen) == [(number, index) for number in range(3) for index in range(20)]


def test_parts_follow_from_names_alone_in_the_documented_shares():
    parts = [part_of(f"class/{index}.jpg") for index in range(10_000)]
    shares = [parts.count(part) / len(parts) for part in PARTS]
    assert shares == pytest.approx([0.6, 0.2, 0.2], abs=0.02)
    assert part_of("a.png") == part_of("a.png")
    assert [part_of(f"{index}.png") for index in range(8)] == PINNED_PARTS


PINNED_PARTS = ["train", "train", "test", "train", "train", "train", "train", "train"]


def test_flat_folder_has_no_labels(tmp_path):
    for index in range(30):
        write(tmp_path / f"{index}.png")
    source = load_source(f"folder:{tmp_path}")
    assert source.classes == ()
    assert all(source.images(part).labels is None for part in PARTS)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        (("train", "val", "test"), {"train": 10, "validation": 10, "test": 10}),
        (("train", "validation", "test"), {"train": 10, "validation": 10, "test": 10}),
        (("train", "test"), {"train": 10, "validation": 2, "test": 8}),
        (("train", "val"), {"train": 10, "validation": 2, "test": 8}),
    ],
)
def test_part_folders_are_taken_as_they_are(tmp_path, folders, expected):
    for number, folder in enumerate(folders):
        for index in range(10):
            write(tmp_path / folder / "ab"[index % 2] / f"{index}.png", colour=(number, index, 0))
    source = load_source(f"folder:{tmp_path}")
    assert source.classes == ("a", "b")
    assert {part: len(source.images(part)) for part in PARTS} == expected
    assert set(source.images("train").pixels[:, 0, 0, 0].tolist()) == {0}


def test_a_few_of_many_pictures_are_read_alone_and_are_always_the_same(tmp_path):
    for index in range(60):
        write(tmp_path / "train" / "ab"[index % 2] / f"{index}.png", colour=(index, 0, 0))
        write(tmp_path / "test" / "ab"[index % 2] / f"{index}.png", colour=(index, 0, 0))
    source = load_source(f"folder:{tmp_path}")
    few = source.drawn("train", 20)
    whole = load_source(f"folder:{tmp_path}")
    assert len(whole.images("train")) == 60
    drawn = whole.drawn("train", 20)
    assert np.array_equal(few.pixels, drawn.pixels) and np.array_equal(few.labels, drawn.labels)
    assert len(set(few.pixels[:, 0, 0, 0].tolist())) == 20 and set(few.labels.tolist()) == {0, 1}
    # A damaged picture that is not drawn is not missed.
    left = set(range(60)) - set(few.pixels[:, 0, 0, 0].tolist())
    number = max(left)
    (tmp_path / "train" / "ab"[number % 2] / f"{number}.png").write_bytes(b"damaged")
    assert np.array_equal(load_source(f"folder:{tmp_path}").drawn("train", 20).pixels, few.pixels)
    with pytest.raises(DataError, match=f"{number}.png"):
        load_source(f"folder:{tmp_path}").images("train")


def test_size_scales_to_cover_and_keeps_the_middle():
    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, 20:60] = 255  # the middle square is white
    fitted = fit_picture(Image.fromarray(picture), size=(20, 20))
    assert fitted.shape == (20, 20, 3)
    assert (fitted[:, 1:-1] == 255).all()
    assert np.array_equal(fit_picture(Image.fromarray(picture), size=(40, 80)), picture)


def test_size_makes_different_pictures_one_shape(tmp_path):
    for index in range(30):
        write(tmp_path / f"{index}.png", size=(20 + index, 50 - index))
    source = load_source(f"folder:{tmp_path}", size=(16, 24))
    assert source.shape == (16, 24, 3)
    assert source.images("train").pixels.shape[1:] == (16, 24, 3)


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (4, 4)).save(tmp_path / f"{mode}.png")
        assert read_picture(tmp_path / f"{mode}.png").shape == (4, 4, 3)


def test_picture_of_another_size_is_named(tmp_path):
    for index in range(30):
        write(tmp_path / f"{index:02}.png", size=(6, 8) if index != 7 else (7, 8))
    source = load_source(f"folder:{tmp_path}")
    with pytest.raises(DataError, match=r"07.png is 7x8, the others are 6x8: give a size"):
        source.images(part_of("07.png"))


def test_file_that_is_no_picture_is_named(tmp_path):
    for index in range(30):
        write(tmp_path / f"{index:02}.png")
    (tmp_path / "07.png").write_bytes(b"no picture")
    with pytest.raises(DataError, match="07.png is not a picture of a known format"):
        load_source(f"folder:{tmp_path}").images(part_of("07.png"))
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "08.png")
    raw = (tmp_path / "08.png").read_bytes()
    (tmp_path / "08.png").write_bytes(raw[: len(raw) // 2])
    with pytest.raises(DataError, match="08.png cannot be read as a picture"):
        read_picture(tmp_path / "08.png")
    with pytest.raises(DataError, match="99.png cannot be read as a picture"):
        read_picture(tmp_path / "99.png")


def test_folders_without_pictures(tmp_path):
    with pytest.raises(DataError, match="no folder .*absent"):
        load_source(f"folder:{tmp_path}/absent")
    with pytest.raises(DataError, match="no pictures in"):
        load_source(f"folder:{tmp_path}")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("x")
    with pytest.raises(DataError, match="no pictures in"):
        load_source(f"folder:{tmp_path}")


def test_empty_part_is_named(tmp_path):
    write(tmp_path / "0.png")
    source = load_source(f"folder:{tmp_path}")
    empty = next(part for part in PARTS if part != part_of("0.png"))
    with pytest.raises(DataError, match=f"no pictures for the {empty} part"):
        source.images(empty)
