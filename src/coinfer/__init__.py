"""coinfer: find, build and run the best division of a network's inference between device and edge.

    graph = coinfer.capture(model, example)
    cuts = graph.cuts()
    head, tail = coinfer.split(graph, cuts[3])

`capture` and `split` need torch and are loaded on first use; everything that a device needs is not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .bundle import Bundle, load_bundle
from .errors import CoinferError
from .plan import Candidate, CodecSpec, Evidence, Plan, TensorSpec

if TYPE_CHECKING:
    from .model.cut import split as split
    from .model.graph import Graph as Graph
    from .model.graph import capture as capture

__version__ = "0.1.0"

__all__ = [
    "Bundle",
    "Candidate",
    "CodecSpec",
    "CoinferError",
    "Evidence",
    "Graph",
    "Plan",
    "TensorSpec",
    "capture",
    "load_bundle",
    "split",
]

_LAZY = {"capture": "model.graph", "Graph": "model.graph", "split": "model.cut"}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
