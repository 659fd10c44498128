"""What is known of the edge: what replies tell, and what is left of it when none come."""

from __future__ import annotations

import pytest

from coinfer.runtime.edge_load import EdgeLoad


def test_nothing_is_known_at_first() -> None:
    assert EdgeLoad().at(0.0) == 1.0 and EdgeLoad().wait_s(1e9) == 0.0


@pytest.mark.parametrize("period_s", [0.25, 2.0, 10.0, 100.0])
def test_replies_that_agree_are_believed_however_rare(period_s: float) -> None:
    edge = EdgeLoad()
    for k in range(40):
        edge.replied(period_s * k, took_s=0.03, said_s=0.01, wait_s=0.1)
    now_s = period_s * 39
    assert edge.at(now_s) == pytest.approx(3.0, rel=1e-4)
    assert edge.wait_s(now_s) == pytest.approx(0.1, rel=1e-4)


def test_what_was_told_fades_when_no_reply_comes() -> None:
    edge = EdgeLoad()
    for k in range(40):
        edge.replied(0.25 * k, took_s=0.03, said_s=0.01, wait_s=0.1)
    told_s = 0.25 * 39
    assert edge.told == (edge.at(told_s), edge.wait_s(told_s))
    loads = [edge.at(told_s + after_s) for after_s in (0.0, 1.0, 2.0, 10.0, 100.0)]
    assert loads[0] == loads[1] > loads[2] > loads[3] > loads[4] == pytest.approx(1.0)
    assert edge.wait_s(told_s + 100.0) == pytest.approx(0.0, abs=1e-6)
    # A reply long afterwards is not mixed with what has faded.
    edge.replied(told_s + 100.0, took_s=0.01, said_s=0.01, wait_s=0.0)
    assert edge.at(told_s + 100.0) == pytest.approx(1.0)
