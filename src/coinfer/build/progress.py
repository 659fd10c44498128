"""How a build tells how far it is."""

from __future__ import annotations

from collections.abc import Callable

# Stage of work, how much of it is done, of how much, and what is at hand.
Progress = Callable[[str, int, int, str], None]


def quiet(stage: str, done: int, total: int, detail: str) -> None:
    """A Progress that shows nothing."""
