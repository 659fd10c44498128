"""A user's own function by name: found beside the job, refused in one line."""

import sys

import pytest

from coinfer.errors import DataError, ModelError
from coinfer.factory import call_factory, import_object, is_factory


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The current folder, with a module of its own that is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("a:b", True),
        ("package.module:factory", True),
        ("resnet20", False),
        ("folder:photos", False),
        ("folder:/a/b", False),
        ("a.b:", False),
        ("a b:c", False),
        (":c", False),
    ],
)
def test_form_is_recognised(source, expected):
    assert is_factory(source) is expected


def test_module_in_the_current_folder_is_found_and_the_path_is_left_as_it_was(here):
    (here / "own_things.py").write_text("def make():\n    return 42\n")
    path = list(sys.path)
    assert call_factory("own_things:make", error=ModelError) == 42
    assert sys.path == path


@pytest.mark.parametrize(
    ("text", "source", "message"),
    [
        ("", "absent_things:make", 'no module "absent_things"'),
        ("import absent_needed\n", "own_things:make", 'no module "absent_needed" \\(needed by "own_things"\\)'),
        ("def make(:\n", "own_things:make", 'module "own_things" cannot be imported'),
        ("from os import no_such\n", "own_things:make", "cannot be imported.*no_such"),
        ("x = undefined\n", "own_things:make", r"cannot be imported: NameError.*own_things.py:1"),
        ("def make():\n    raise KeyError('mine')\n", "own_things:make", r"failed: KeyError: 'mine' .*own_things.py:2"),
        ("x = 1\n", "own_things:make", 'has no "make"'),
        ("make = 1\n", "own_things:make", "must be a function without arguments, got a int"),
        ("def make(depth):\n    pass\n", "own_things:make", "without arguments.*'depth'"),
    ],
)
@pytest.mark.parametrize("error", [ModelError, DataError])
def test_what_cannot_be_called_is_refused_in_one_line(here, text, source, message, error):
    (here / "own_things.py").write_text(text)
    with pytest.raises(error, match=message) as raised:
        call_factory(source, error=error)
    assert "\n" not in str(raised.value)
    assert source in str(raised.value)


def test_object_is_given_as_it_is(here):
    (here / "own_things.py").write_text("made = [1]\n")
    assert import_object("own_things:made", error=ModelError) == [1]
