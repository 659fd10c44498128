"""`coinfer bench`: the chosen plan beside every baseline, over a shaped link."""

from __future__ import annotations


def bench() -> None:
    """Later."""
