"""Fixtures of every suite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from coinfer.bundle import Bundle
from tiny_bundle import EXITS, MENU, make_tiny_bundle

if TYPE_CHECKING:
    from coinfer.model.export import Whole
    from coinfer.model.graph import Graph


@pytest.fixture(scope="session")
def tiny_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A real bundle of a tiny network, made without torch; see tests/tiny_bundle.py."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "tiny", has_evidence=True)


@pytest.fixture(scope="session")
def exit_bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The same with plans that have exits."""
    return make_tiny_bundle(tmp_path_factory.mktemp("bundles") / "exits", menu=(*MENU, *EXITS))


@pytest.fixture(scope="session")
def graphs() -> dict[str, Graph]:
    """Each of `tiny_nets.TINY`, captured; nobody may change them."""
    from coinfer.model.graph import capture
    from tiny_nets import TINY, make, pictures

    return {name: capture(make(factory), pictures(1)) for name, factory in TINY.items()}


@pytest.fixture(scope="session")
def wholes(graphs: dict[str, Graph], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Whole]:
    """Two of `tiny_nets.TINY`, exported: `residual` takes pictures, `transformer` floats."""
    from coinfer.model.export import export_onnx
    from tiny_nets import PREPROCESS

    folder = tmp_path_factory.mktemp("exported")
    scaling = {"residual": PREPROCESS, "transformer": None}
    return {
        name: export_onnx(graphs[name], folder / f"{name}.fp32.onnx", preprocess=preprocess)
        for name, preprocess in scaling.items()
    }
