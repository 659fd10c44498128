"""Tables: what is allowed in them, and the file they lie in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from coinfer.codec.tables import Tables, TensorTables, load_tables, save_tables
from coinfer.errors import CodecError


def arrays_of(channels: int = 3, levels: int = 4) -> dict[str, Any]:
    return {
        "low": np.zeros(channels, np.float32),
        "step": np.ones(channels, np.float32),
        "levels": np.tile(np.arange(levels, dtype=np.float32), (channels, 1)),
        "frequencies": np.full((channels, levels), 65536 // levels, np.uint16),
        "groups": np.arange(channels, dtype=np.uint8),
    }


def test_saved_tables_are_the_same_when_loaded(tmp_path: Path) -> None:
    tables = Tables(
        (TensorTables(**arrays_of()), TensorTables(**arrays_of(5, 2) | {"frequencies": None, "groups": None}))
    )
    path = tmp_path / "k.safetensors"
    save_tables(tables, path)
    loaded = load_tables(path)
    assert loaded.digest == tables.digest
    assert loaded.tensors[1].frequencies is None
    np.testing.assert_array_equal(loaded.tensors[0].levels, tables.tensors[0].levels)
    assert [one.name for one in tmp_path.iterdir()] == ["k.safetensors"]


def test_no_tables_are_saved_and_loaded_too(tmp_path: Path) -> None:
    save_tables(Tables(), tmp_path / "none.safetensors")
    assert load_tables(tmp_path / "none.safetensors").tensors == ()


def test_a_failed_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "k.safetensors"
    path.write_bytes(b"before")

    def full(source: str, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="disk full"):
        save_tables(Tables((TensorTables(**arrays_of()),)), path)
    assert [one.name for one in tmp_path.iterdir()] == ["k.safetensors"]
    assert path.read_bytes() == b"before"


def test_digest_changes_with_any_array() -> None:
    digests = {Tables((TensorTables(**arrays_of()),)).digest, Tables().digest}
    for name in ("low", "step", "levels", "frequencies", "groups"):
        arrays = arrays_of()
        arrays[name] = arrays[name].copy()
        if name == "frequencies":
            arrays[name][0, :2] += np.array([1, -1], np.int64).astype(np.uint16)
        else:
            arrays[name].flat[0] += 1
        digests.add(Tables((TensorTables(**arrays),)).digest)
    assert len(digests) == 7


def test_tables_cannot_be_written_to() -> None:
    tables = TensorTables(**arrays_of())
    with pytest.raises(ValueError, match="read-only"):
        tables.low[0] = 1


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("low", np.zeros(3), "low and step must be float32"),
        ("low", np.zeros((3, 1), np.float32), "low and step must be float32"),
        ("step", np.ones(2, np.float32), "low and step must be float32"),
        ("step", np.zeros(3, np.float32), "steps above 0"),
        ("low", np.full(3, np.inf, np.float32), "finite"),
        ("levels", np.zeros((2, 4), np.float32), r"levels must be \(3, L\)"),
        ("levels", np.zeros((3, 4), np.int64), r"levels must be \(3, L\)"),
        ("levels", np.zeros((3, 5), np.float32), "power of two, got 5"),
        ("levels", np.zeros((3, 512), np.float32), "power of two, got 512"),
        ("frequencies", np.full((3, 4), 16384, np.int64), "frequencies must be"),
        ("frequencies", np.full((3, 5), 13107, np.uint16), "frequencies must be"),
        ("frequencies", np.full((2, 4), 16384, np.uint16), r"groups must be \(C,\) uint8 below 2"),
        ("groups", np.zeros(4, np.uint8), "ranges must be for 1 or 4 channels, got 3"),
        ("groups", np.zeros(3, np.int64), "groups must be"),
        ("groups", np.zeros((3, 1), np.uint8), "groups must be"),
        ("groups", np.zeros(0, np.uint8), "groups must be"),
        ("frequencies", np.full((3, 4), 16383, np.uint16), "sum to 65536"),
        ("frequencies", np.tile(np.uint16([0, 32768, 16384, 16384]), (3, 1)), "at least 1"),
    ],
)
def test_arrays_that_are_no_tables_are_refused(tmp_path: Path, name: str, value: np.ndarray, message: str) -> None:
    arrays = arrays_of() | {name: value}
    with pytest.raises(CodecError, match=message):
        TensorTables(**arrays)
    path = tmp_path / "bad.safetensors"
    save_file({f"0.{key}": array for key, array in arrays.items()}, path)
    with pytest.raises(CodecError, match=r"bad\.safetensors"):
        load_tables(path)


def test_frequencies_without_groups_are_refused() -> None:
    for name in ("frequencies", "groups"):
        with pytest.raises(CodecError, match="belong together"):
            TensorTables(**arrays_of() | {name: None})


def test_files_that_are_no_tables_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CodecError, match=r"cannot be read.*none\.safetensors"):
        load_tables(tmp_path / "none.safetensors")
    garbage = tmp_path / "garbage.safetensors"
    garbage.write_bytes(b"\xff" * 100)
    with pytest.raises(CodecError, match=r"not safetensors.*garbage\.safetensors"):
        load_tables(garbage)
    for unlisted in ({"0.low": np.zeros(1, np.float32)}, {"weights": np.zeros(1, np.float32)}):
        save_file(unlisted, garbage)
        with pytest.raises(CodecError, match="holds low, step, levels, frequencies, groups"):
            load_tables(garbage)
