"""Small official-looking CIFAR files, and the shared data folder where there is one."""

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture
def shared_data():
    """The folder with CIFAR-10 and the photographs; skips where there is none."""
    folder = Path(os.environ.get("DATA_DIR", ROOT.parent / "shared" / "data"))
    if not (folder / "cifar10").is_dir():
        pytest.skip(f"no data folder at {folder}: set DATA_DIR")
    return folder
