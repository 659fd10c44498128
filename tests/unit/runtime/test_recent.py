from __future__ import annotations

from coinfer.runtime.recent import RecentTimeline
from coinfer.timeline import Outcome, Span


def test_the_latest_spans_and_outcomes_stay() -> None:
    timeline = RecentTimeline(keep=10)
    for number in range(1000):
        timeline.add(
            Span(request=number, stage="head", start_s=0.0, end_s=1.0),
            Outcome(request=number, plan=0, answered="device", start_s=0.0, end_s=1.0),
        )
        assert len(timeline.spans) <= 20 and len(timeline.outcomes) <= 20
    for record in (timeline.spans, timeline.outcomes):
        assert [item.request for item in record][-10:] == list(range(990, 1000))
