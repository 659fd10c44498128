"""`coinfer demo`: the chosen plan beside every baseline, over a shaped link."""

from __future__ import annotations


def demo() -> None:
    """Later."""
