"""CIFAR-10 in its three forms gives the same arrays; damaged files are named."""

import lzma

import numpy as np
import pytest
from test_batch_file import official_batch

from coinfer.data import cifar10 as cifar10_module
from coinfer.data import load_source
from coinfer.data.cifar10 import cifar10
from coinfer.errors import DataError

COUNT = 20  # pictures a batch in these tests, in place of 10,000


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(cifar10_module, "_BATCH", COUNT)


@pytest.fixture
def batches():
    """Six batches of (pixels (N, 32, 32, 3), labels): five to train on, one to test on."""
    rng = np.random.default_rng(0)
    return [
        (rng.integers(0, 256, (COUNT, 32, 32, 3), dtype=np.uint8), rng.integers(0, 10, COUNT).astype(np.uint8))
        for _ in range(6)
    ]


def planes(pixels):
    return pixels.transpose(0, 3, 1, 2).reshape(len(pixels), 3072)


def write_binary(folder, batches):
    for name, (pixels, labels) in zip(
        [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"], batches, strict=True
    ):
        np.concatenate([labels[:, None], planes(pixels)], 1).tofile(folder / name)


def write_python(folder, batches):
    names = [f"data_batch_{n}" for n in range(1, 6)] + ["test_batch"]
    for name, (pixels, labels) in zip(names, batches, strict=True):
        (folder / name).write_bytes(official_batch(planes(pixels), labels.tolist()))


def write_packed(folder, batches):
    names = [f"train_{n}.npy.xz" for n in range(1, 6)] + ["test.npy.xz"]
    for name, (pixels, _) in zip(names, batches, strict=True):
        red, green, blue = (pixels[..., channel].astype(np.int16) for channel in range(3))
        differences = np.stack([green, red - green, blue - green])
        differences = np.diff(differences, axis=2, prepend=0)
        differences = np.diff(differences, axis=3, prepend=0)
        with lzma.open(folder / name, "wb", preset=0) as file:
            np.save(file, (differences % 256).astype(np.uint8))
    labels = [labels for _, labels in batches]
    np.savez(folder / "labels.npz", train=np.concatenate(labels[:5]), test=labels[5])


FORMS = {
    "cifar-10-batches-bin": write_binary,
    "cifar-10-batches-py": write_python,
    "cifar10": write_packed,
}


@pytest.mark.parametrize("is_nested", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_official_pixels_and_labels(tmp_path, small, batches, form, is_nested):
    folder = tmp_path / form if is_nested else tmp_path
    folder.mkdir(exist_ok=True)
    FORMS[form](folder, batches)
    source = cifar10(tmp_path)
    assert source.classes[3] == "cat"
    for part, expected in (("train", batches[:5]), ("test", batches[5:])):
        images = source.images(part)
        assert np.array_equal(images.pixels, np.concatenate([pixels for pixels, _ in expected]))
        assert np.array_equal(images.labels, np.concatenate([labels for _, labels in expected]))


def test_holdouts_are_the_documented_ones(tmp_path, small, batches):
    write_binary(tmp_path, batches)
    test = batches[5][0]
    default = load_source("cifar10", data_dir=tmp_path)
    assert np.array_equal(default.images("validation").pixels, test[::5])
    assert np.array_equal(default.images("test").pixels, np.delete(test, np.s_[::5], 0))
    assert len(default.images("train")) == 5 * COUNT
    own = load_source("cifar10", data_dir=tmp_path, holdout="train")
    assert len(own.images("train")) == 5 * COUNT * 9 // 10
    assert np.array_equal(own.images("test").pixels, test)


def test_no_files_at_all(tmp_path):
    with pytest.raises(DataError, match="no CIFAR-10 in .*looked for cifar-10-batches-bin/test_batch.bin"):
        cifar10(tmp_path)


def test_one_missing_file_is_named_when_its_part_is_read(tmp_path, small, batches):
    write_binary(tmp_path, batches)
    (tmp_path / "data_batch_4.bin").unlink()
    source = cifar10(tmp_path)
    assert len(source.images("test")) == COUNT
    with pytest.raises(DataError, match="data_batch_4.bin is missing"):
        source.images("train")


@pytest.mark.parametrize(
    ("form", "name", "message"),
    [
        ("cifar-10-batches-bin", "test_batch.bin", "must have 61460 bytes, it has 100"),
        ("cifar-10-batches-py", "test_batch", "is not an official CIFAR batch file"),
        ("cifar10", "test.npy.xz", "cannot be read"),
        ("cifar10", "labels.npz", "cannot be read"),
    ],
)
def test_damaged_file_is_named(tmp_path, small, batches, form, name, message):
    FORMS[form](tmp_path, batches)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(DataError, match=message) as raised:
        cifar10(tmp_path).images("test")
    assert name in str(raised.value)


def test_there_is_no_validation_part_before_holding_out(tmp_path, small, batches):
    write_binary(tmp_path, batches)
    with pytest.raises(DataError, match="no validation part: give a holdout"):
        cifar10(tmp_path).images("validation")


def test_real_test_part_is_the_official_one(shared_data):
    images = load_source("cifar10", data_dir=shared_data, holdout="train").images("test")
    assert images.pixels.shape == (10_000, 32, 32, 3)
    assert np.bincount(images.labels).tolist() == [1000] * 10
    # The first labels of the official test_batch: cat, ship, ship, airplane, frog, frog, automobile, ...
    assert images.labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
