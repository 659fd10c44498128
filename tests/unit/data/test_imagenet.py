"""Tar files of photographs: labels from their table, sizes as networks are evaluated."""

import csv
import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image

from coinfer.data import load_source
from coinfer.data.imagenet import read_tar, ten_crops
from coinfer.errors import DataError


def write_tar(path, pictures, *, listed=None):
    """A tar of PNGs and labels.csv; `pictures` maps name to (array, label)."""
    with tarfile.open(path, "w") as tar:

        def add(name, raw):
            member = tarfile.TarInfo(name)
            member.size = len(raw)
            tar.addfile(member, io.BytesIO(raw))

        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["file", "label"])
        for name, (array, label) in pictures.items():
            raw = io.BytesIO()
            Image.fromarray(array).save(raw, format="PNG")
            add(name, raw.getvalue())
            writer.writerow([name, label])
        for name in listed or []:
            writer.writerow([name, 0])
        add("labels.csv", table.getvalue().encode())


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    place = tmp_path / "imagenet"
    place.mkdir()
    small = {f"{n}.JPEG": (rng.integers(0, 256, (224, 224, 3), dtype=np.uint8), n * 100) for n in range(10)}
    write_tar(place / "imagenette_val500_224px.tar", small)
    large = {f"{n}.JPEG": (np.full((300, 400 + n, 3), n, np.uint8), n) for n in range(3)}
    write_tar(place / "imagenet_sample_112.tar", large)
    return tmp_path


def test_parts_labels_and_sizes(folder):
    source = load_source("imagenette", data_dir=folder)
    assert source.shape == (224, 224, 3)
    assert source.images("test").labels.tolist() == [number * 100 for number in range(10)]
    assert source.images("train").labels.tolist() == [0, 2] * 10
    assert source.images("validation").labels.tolist() == [1] * 10
    assert source.images("train").pixels[3].min() == source.images("train").pixels[3].max() == 2
    assert len(source.classes) == 1000


def test_class_names_come_from_the_list_where_there_is_one(folder):
    table = [{"index": index, "wnid": "n", "name": f"thing {index}"} for index in range(1000)]
    (folder / "imagenet" / "imagenet_classes.json").write_text(json.dumps(table))
    assert load_source("imagenette", data_dir=folder).classes[7] == "thing 7"
    (folder / "imagenet" / "imagenet_classes.json").write_text("[1]")
    with pytest.raises(DataError, match="imagenet_classes.json cannot be read"):
        load_source("imagenette", data_dir=folder)


def test_short_side_is_scaled_to_256_and_the_middle_224_is_kept(tmp_path):
    columns = np.broadcast_to(np.arange(512, dtype=np.int64) // 2, (256, 512))
    picture = np.stack([columns] * 3, -1).astype(np.uint8)
    write_tar(tmp_path / "a.tar", {"a.png": (picture, 0)})
    pixels = read_tar(tmp_path / "a.tar", size=(224, 224)).pixels
    assert np.array_equal(pixels[0], picture[16:240, 144:368])  # the short side already is 256


def test_ten_crops_are_centre_and_corners_and_their_mirror_images(tmp_path):
    rng = np.random.default_rng(1)
    pictures = rng.integers(0, 256, (2, 256, 300, 3), dtype=np.uint8)
    write_tar(tmp_path / "a.tar", {f"{n}.png": (picture, n) for n, picture in enumerate(pictures)})
    crops = ten_crops(tmp_path / "a.tar", size=(224, 224), first=1)
    whole = pictures[1]
    upright = [whole[16:240, 38:262], whole[:224, :224], whole[:224, 76:], whole[32:, :224], whole[32:, 76:]]
    assert np.array_equal(crops.pixels, [*upright, *(crop[:, ::-1] for crop in upright)])
    assert crops.labels.tolist() == [1] * 10


def test_damaged_or_incomplete_tars_are_named(tmp_path, folder):
    (tmp_path / "b.tar").write_bytes(b"no tar")
    write_tar(tmp_path / "c.tar", {}, listed=["absent.JPEG"])
    for name in ("absent.tar", "b.tar", "c.tar"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            read_tar(tmp_path / name, size=(224, 224))


def test_real_photographs(shared_data):
    source = load_source("imagenette", data_dir=shared_data)
    assert [len(source.images(part)) for part in ("train", "validation", "test")] == [560, 560, 500]
    assert source.classes[0] == "tench"
    assert set(source.images("test").labels.tolist()) == {0, 217, 482, 491, 497, 566, 569, 571, 574, 701}
