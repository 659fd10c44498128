"""A Timeline for processes that never end: it keeps the latest spans and outcomes and forgets older ones."""

from __future__ import annotations

from ..timeline import Decision, Outcome, Span, Timeline


class RecentTimeline(Timeline):
    """Keeps at least the latest `keep` spans, outcomes and decisions, and at most twice as many of each."""

    def __init__(self, *, keep: int = 50_000) -> None:
        super().__init__()
        self.keep = keep

    def add(self, *items: Span | Outcome | Decision) -> None:
        """Record spans, outcomes and decisions; the oldest go where there are too many."""
        super().add(*items)
        with self._lock:
            for kept in (self.spans, self.outcomes, self.decisions):
                if len(kept) > 2 * self.keep:
                    del kept[: -self.keep]
