"""When the stages of a request began and ended, as spans: the device's own, and those that a reply brings."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from ..protocol import Reply
from ..timeline import Span
from .request import Asked, Event, Handed

# A request that has waited for less was computed at once.
_WAITED_S = 1e-3


class Stamps:
    """The device's stages of one request, one behind the other, by a clock that tells how far it has come."""

    def __init__(self, clock: Callable[[], float], handed: Handed) -> None:
        self._clock, self._request = clock, handed.request
        self.since_s = clock()
        self.spans: list[Span] = []
        if self.since_s - handed.start_s > _WAITED_S:
            self.spans.append(Span(request=handed.request, stage="queue", start_s=handed.start_s, end_s=self.since_s))

    def mark(self, stage: str) -> None:
        """Behind a stage."""
        start_s = self.since_s
        self.since_s = max(start_s, self._clock())
        self.spans.append(Span(request=self._request, stage=stage, start_s=start_s, end_s=self.since_s))

    def extend(self) -> None:
        """What has passed since then was of the last stage, too."""
        self.since_s = max(self.since_s, self._clock())
        self.spans[-1] = msgspec.structs.replace(self.spans[-1], end_s=self.since_s)


def link_spans(asked: Asked, event: Event, received_s: float) -> list[Span]:
    """The exchange on the device's clock, and the edge's durations on the edge's."""
    request = asked.request
    sent_s, num_bytes = asked.sent_s, asked.wire_bytes
    spans = [Span(request=request, stage="exchange", start_s=sent_s, end_s=received_s, num_bytes=num_bytes)]
    if isinstance(event, Reply):
        at_s = 0.0
        for stage, duration_us in zip(("wait", "decode", "tail"), event.durations, strict=True):
            after_s = at_s + duration_us * 1e-6
            spans.append(Span(request=request, stage=stage, start_s=at_s, end_s=after_s, clock="edge"))
            at_s = after_s
    return spans
