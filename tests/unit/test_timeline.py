from __future__ import annotations

import threading

import msgspec

from coinfer.timeline import Outcome, Span, Timeline


def test_spans_and_outcomes_are_kept_apart_in_order():
    timeline = Timeline()
    head = Span(request=0, stage="head", start_s=0.0, end_s=0.5)
    tail = Span(request=0, stage="tail", start_s=0.0, end_s=1.0, clock="edge")
    outcome = Outcome(request=0, plan=3, answered="edge", start_s=1.0, end_s=1.75, payload_bytes=9, wire_bytes=60)
    timeline.add(head, outcome, tail)
    assert timeline.spans == [head, tail]
    assert timeline.outcomes == [outcome]
    assert outcome.latency_s == 0.75


def test_busy_time_is_the_sum_of_one_stages_spans():
    timeline = Timeline()
    timeline.add(*(Span(request=k, stage="head", start_s=k, end_s=k + 0.25) for k in range(4)))
    timeline.add(Span(request=0, stage="send", start_s=0, end_s=9))
    assert timeline.busy_s("head") == 1.0
    assert timeline.busy_s("decode") == 0


def test_json_lines_hold_everything():
    timeline = Timeline()
    span = Span(request=0, stage="tail", start_s=0.0, end_s=0.5, clock="edge", num_bytes=7)
    outcome = Outcome(request=0, plan=3, answered="device", start_s=0.0, end_s=1.0)
    timeline.add(span, outcome)
    first, second = timeline.to_json_lines().splitlines()
    assert msgspec.json.decode(first, type=Outcome) == outcome
    assert msgspec.json.decode(second, type=Span) == span


def test_threads_lose_nothing():
    timeline = Timeline()

    def work(request: int) -> None:
        for k in range(200):
            timeline.add(Span(request=request, stage="head", start_s=k, end_s=k + 1))

    threads = [threading.Thread(target=work, args=(request,)) for request in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(timeline.spans) == 1600
    for request in range(8):
        assert [span.start_s for span in timeline.spans if span.request == request] == list(range(200))
