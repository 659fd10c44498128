"""The reader of the official Python batches: reads them, and nothing that a pickle could do."""

import struct
from pathlib import Path

import numpy as np
import pytest

from coinfer.data.batch_file import read_batch
from coinfer.errors import DataError


def text(value: bytes) -> bytes:
    """A short string, as Python 2's writer put it."""
    return b"U" + bytes([len(value)]) + value


def official_batch(pixels: np.ndarray, labels: list[int]) -> bytes:
    """Bytes as the official files have them: protocol 2, written by Python 2 with numpy 1.

    Built by hand, instruction by instruction, since no Python 3 writes this form.
    """
    raw = np.ascontiguousarray(pixels, dtype=np.uint8).tobytes()
    rows, columns = pixels.shape
    array = (
        b"cnumpy.core.multiarray\n_reconstruct\nq\x07cnumpy\nndarray\nq\x08K\x00\x85" + text(b"b") + b"\x87Rq\x09"
        b"(K\x01M" + struct.pack("<H", rows) + b"M" + struct.pack("<H", columns) + b"\x86"
        b"cnumpy\ndtype\nq\x0a" + text(b"u1") + b"K\x00K\x01\x87Rq\x0b"
        b"(K\x03" + text(b"|") + b"NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89T" + struct.pack("<i", len(raw)) + raw + b"tb"
    )
    numbers = b"]q\x05(" + b"".join(b"K" + bytes([label]) for label in labels) + b"e"
    names = b"]q\x0c(" + b"".join(text(f"picture_{index}.png".encode()) for index in range(3)) + b"e"
    return (
        b"\x80\x02}q\x01(" + text(b"batch_label") + b"q\x02" + text(b"training batch 1 of 5") + b"q\x03"
        + text(b"labels") + b"q\x04" + numbers + text(b"data") + b"q\x06" + array
        + text(b"filenames") + names + b"u."
    )  # fmt: skip


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, size=(5, 3072), dtype=np.uint8)


def write(tmp_path, raw) -> Path:
    path = tmp_path / "data_batch_1"
    path.write_bytes(raw)
    return path


def test_official_form_is_read(tmp_path, pixels):
    batch = read_batch(write(tmp_path, official_batch(pixels, [3, 1, 4, 1, 5])))
    assert batch["labels"] == [3, 1, 4, 1, 5]
    assert batch["batch_label"] == b"training batch 1 of 5"
    assert batch["filenames"][2] == b"picture_2.png"
    assert np.array_equal(batch["data"], pixels)
    assert batch["data"].dtype == np.uint8


def test_hand_written_form_means_the_same_to_python(pixels):
    """The fixture is honest: Python's own reader, told where numpy's function lives now, sees the same."""
    import io
    import pickle

    class Reader(pickle.Unpickler):
        def find_class(self, module, name):
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)

    batch = Reader(io.BytesIO(official_batch(pixels, [3, 1])), encoding="bytes").load()
    assert batch[b"labels"] == [3, 1]
    assert np.array_equal(batch[b"data"], pixels)


def test_every_cut_of_a_batch_is_refused(tmp_path, pixels):
    raw = official_batch(pixels[:2, :16], [3, 7])
    for length in range(len(raw) - 1):
        with pytest.raises(DataError, match="is not an official CIFAR batch file, or is cut short"):
            read_batch(write(tmp_path, raw[:length]))


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"\x80\x02cos\nsystem\n" + text(b"touch owned") + b"\x85R.", "name 'os system' is not allowed"),
        (b"\x80\x02cbuiltins\neval\n" + text(b"1") + b"\x85R.", "name 'builtins eval' is not allowed"),
        (b"(S'touch owned'\nios\nsystem\n.", "instruction b'S' at byte 1 is not allowed"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "instruction b'.x8c' at byte 2 is not allowed"),
        (text(b"a") + b"K\x01\x85R.", "a call of something that is not a name"),
        (b"cnumpy\nndarray\nK\x01b.", "a state for something that has none"),
        (b"cnumpy\ndtype\n" + text(b"O8") + b"K\x00K\x01\x87R.", "numbers must be u1"),
        (b"T\xff\xff\xff\x7f.", "2147483647 bytes wanted"),
        (b"T\xff\xff\xff\xff.", "-1 bytes wanted"),
        (b"K\x01.", "it holds a int"),
        (b"", "cut short"),
    ],
)
def test_everything_else_is_refused_and_nothing_is_run(tmp_path, monkeypatch, raw, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=message):
        read_batch(write(tmp_path, raw))
    assert not (tmp_path / "owned").exists()


def test_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match="absent cannot be read"):
        read_batch(tmp_path / "absent")


def test_random_damage_never_raises_anything_else(tmp_path, pixels):
    raw = official_batch(pixels[:2, :16], [3, 7])
    rng = np.random.default_rng(1)
    for _ in range(500):
        damaged = bytearray(raw)
        damaged[rng.integers(len(raw))] = rng.integers(256)
        try:
            read_batch(write(tmp_path, bytes(damaged)))
        except DataError as error:
            assert "data_batch_1" in str(error)
