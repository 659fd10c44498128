"""A Timeline for processes that never end: it keeps the latest spans and outcomes and forgets older ones."""

from __future__ import annotations

from ..timeline import Outcome, Span, Timeline


class RecentTimeline(Timeline):
    """Keeps at least the latest `keep` spans and outcomes, and at most twice as many of each."""

    def __init__(self, *, keep: int = 50_000) -> None:
        super().__init__()
        self.keep = keep

    def add(self, *items: Span | Outcome) -> None:
        """Record spans and outcomes; the oldest go where there are too many."""
        super().add(*items)
        with self._lock:
            if len(self.spans) > 2 * self.keep:
                del self.spans[: -self.keep]
            if len(self.outcomes) > 2 * self.keep:
                del self.outcomes[: -self.keep]
