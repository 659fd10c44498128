"""Sources by name; what is not one is refused in one line."""

import numpy as np
import pytest

from coinfer.data import Source, default_data_dir, load_source
from coinfer.errors import DataError

OWN = """
import numpy as np
from coinfer.data import Images, Source
def make():
    pixels = np.arange(20, dtype=np.uint8).reshape(20, 1, 1, 1)
    return Source("own", ("x",), (1, 1, 1), lambda part: Images(pixels, np.zeros(20, np.int64)))
def wrong():
    return 3
"""


def test_embedded_sources_need_no_folder(tmp_path):
    for name, shape in (("digits", (8, 8, 1)), ("scene-digits", (64, 64, 3))):
        source = load_source(name, data_dir=tmp_path)
        assert isinstance(source, Source)
        assert source.shape == shape
        assert source.classes == tuple("0123456789")


def test_own_factory_gives_a_source(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_data_one.py").write_text(OWN)
    held = load_source("own_data_one:make", holdout="test-fifth")
    assert np.array_equal(held.images("validation").pixels.ravel(), [0, 5, 10, 15])
    with pytest.raises(DataError, match='"own_data_one:wrong" must give a coinfer.data.Source, it gave a int'):
        load_source("own_data_one:wrong")


def test_unknown_names_and_holdouts(tmp_path):
    with pytest.raises(DataError, match='unknown data "cifar-10": did you mean cifar10'):
        load_source("cifar-10", data_dir=tmp_path)
    with pytest.raises(DataError, match='unknown data "zzz": known are digits, scene-digits, cifar10'):
        load_source("zzz")
    with pytest.raises(DataError, match='holdout must be test-fifth or train, got "some"'):
        load_source("digits", holdout="some")


def test_size_that_a_source_does_not_have():
    with pytest.raises(DataError, match='pictures must be 32x32, data "scene-digits" has 64x64'):
        load_source("scene-digits", size=(32, 32))


def test_sources_that_need_a_folder_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("coinfer.data.source.default_data_dir", lambda: None)
    with pytest.raises(DataError, match='data "cifar10" needs a folder that holds it: set DATA_DIR'):
        load_source("cifar10")
    with pytest.raises(DataError, match="no imagenet/imagenette_val500_224px.tar in"):
        load_source("imagenette", data_dir=tmp_path)


def test_default_folder_lies_beside_the_current_one(tmp_path, monkeypatch):
    (tmp_path / "shared" / "data").mkdir(parents=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert default_data_dir() == tmp_path / "shared" / "data"
