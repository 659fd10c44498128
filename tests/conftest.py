"""Fixtures of every suite."""

from __future__ import annotations

import pytest

from coinfer.bundle import Bundle
from tiny_bundle import make_tiny_bundle


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A real bundle of a tiny network, made without torch; see tests/tiny_bundle.py."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny")
