"""Whose turn it is: the order, the places of other plans, bytes, and how many are ahead, against counting."""

from __future__ import annotations

from concurrent.futures import Future
from itertools import count
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.protocol import Request
from coinfer.runtime.turns import Job, Turns
from tiny_bundle import MENU, SPLIT32, UPLOAD

DEVICES = "abcd"
PLANS = [UPLOAD, SPLIT32]


def job(number: int, device: str, plan: int = UPLOAD, num_bytes: int = 1) -> Job:
    nobody: Any = None
    return Job(nobody, Request(number, MENU[plan], bytes(num_bytes)), 0.0, Future(), device)


def numbers(batch: list[Job]) -> list[int]:
    return [one.request.request for one in batch]


def test_lines_are_served_in_turns() -> None:
    turns = Turns()
    for number, device in enumerate("abcaa"):
        turns.put(job(number, device))
    assert turns.first().request.request == 0
    assert numbers(turns.take(4)) == [0, 1, 2, 3] and len(turns) == 1
    # A device that comes anew is behind those that wait.
    turns.put(job(5, "b"))
    assert numbers(turns.take(9)) == [4, 5] and not turns


def test_what_is_taken_of_one_plan_leaves_the_others_their_places() -> None:
    turns = Turns()
    order = [("a", UPLOAD), ("a", SPLIT32), ("b", SPLIT32), ("a", UPLOAD), ("b", UPLOAD), ("b", SPLIT32)]
    for number, (device, plan) in enumerate(order):
        turns.put(job(number, device, plan))
    assert (turns.count(UPLOAD), turns.count(SPLIT32)) == (3, 3)
    # Of a its first, of b what it has of that plan, of a again.
    assert numbers(turns.take(9)) == [0, 4, 3]
    assert dict(turns.counts()) == {SPLIT32: 3}
    assert numbers(turns.take(9)) == [2, 1, 5] and not turns.counts()


def test_bytes_are_those_that_wait() -> None:
    turns = Turns()
    for number, (device, size) in enumerate([("a", 10), ("b", 200), ("a", 3)]):
        turns.put(job(number, device, num_bytes=size))
    assert (turns.bytes_of("a"), turns.bytes_of("b"), turns.bytes_of("c")) == (13, 200, 0)
    turns.take(2)
    assert (turns.bytes_of("a"), turns.bytes_of("b")) == (3, 0)


def test_cleared_turns_are_as_new() -> None:
    turns = Turns()
    for number, device in enumerate("aab"):
        turns.put(job(number, device, PLANS[number % 2]))
    assert sorted(numbers(turns.clear())) == [0, 1, 2]
    assert (len(turns), turns.bytes_of("a"), turns.ahead_of("a"), dict(turns.counts())) == (0, 0, 0, {})
    turns.put(job(7, "a"))
    assert (turns.ahead_of("a"), turns.ahead_of("b")) == (1, 1) and numbers(turns.take(9)) == [7]


STEPS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(DEVICES), st.sampled_from(PLANS), st.integers(0, 5)), st.integers(1, 4)
    ),
    max_size=40,
)  # fmt: skip


def lived(steps: list[Any], number: Any) -> tuple[Turns, list[Job]]:
    """Turns after these steps, of which a tuple puts a request and a number takes as many; and what waits."""
    turns, waits = Turns(), []
    for step in steps:
        if isinstance(step, tuple):
            waits.append(job(next(number), *step))
            turns.put(waits[-1])
        elif turns:
            plan = turns.first().plan
            taken = turns.take(step)
            assert 1 <= len(taken) <= step and {one.plan for one in taken} == {plan}
            assert len(taken) == step or not turns.count(plan)
            for one in taken:
                # Of one device and plan, in the order in which they came.
                mine = [w.request.request for w in waits if (w.device, w.plan) == (one.device, one.plan)]
                assert mine[0] == one.request.request
                waits = [w for w in waits if w.request.request != one.request.request]
    return turns, waits


@given(STEPS)
def test_counts_and_bytes_are_those_of_what_waits(steps: list[Any]) -> None:
    turns, waits = lived(steps, count())
    assert len(turns) == len(waits)
    assert dict(turns.counts()) == {p: n for p in PLANS if (n := sum(w.plan == p for w in waits))}
    for device in DEVICES:
        assert turns.bytes_of(device) == sum(w.num_bytes for w in waits if w.device == device)


@pytest.mark.parametrize("device", DEVICES)
@given(STEPS)
def test_ahead_of_is_the_bound_that_serving_one_by_one_shows(device: str, steps: list[Any]) -> None:
    number = count()
    turns, waits = lived(steps, number)
    foreseen = turns.ahead_of(device)
    own = sum(w.device == device for w in waits)
    # The lines from which one more than from this one counts.
    longer = sum(sum(w.device == other for w in waits) > own for other in DEVICES if other != device)
    new = next(number)
    turns.put(job(new, device))
    served = next(place for place in count() if turns.take(1)[0].request.request == new)
    assert foreseen - longer <= served <= foreseen
    if own == 0:
        # A new line is the last of all, so that there is nothing to be unsure of.
        assert served == foreseen
