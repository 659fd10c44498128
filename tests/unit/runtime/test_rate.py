"""The uplink's rate, from frames over a link in made-up time."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from coinfer.runtime.rate import LEAST_BPS, UplinkRate

BASE_S = 0.010


class MadeUpLink:
    """Carries frames one after the other at `rate_bps`; the edge keeps each for `edge_s`."""

    def __init__(self, estimate: UplinkRate, rate_bps: float, *, base_s: float = BASE_S) -> None:
        self.estimate, self.rate_bps, self.base_s = estimate, rate_bps, base_s
        self.free_s, self.count = 0.0, 0

    def carry(self, at_s: float, num_bytes: float, edge_s: float = 0.0, *, is_way: bool = False) -> float:
        """Send a frame, and hear of it before anything else; when that was."""
        key, self.count = self.count, self.count + 1
        self.estimate.sent(key, at_s, num_bytes)
        self.free_s = max(at_s, self.free_s) + 8 * num_bytes / self.rate_bps
        heard_s = self.free_s + self.base_s + edge_s
        self.estimate.heard(key, heard_s, edge_s=edge_s, is_way=is_way)
        return heard_s

    def measure(self, at_s: float) -> None:
        """A bare heartbeat and, right behind it, one with padding."""
        self.carry(at_s, 50, is_way=True)
        self.carry(at_s, 2000)


@pytest.mark.parametrize("rate_bps", [5e4, 1e6, 3e7, 1e8])
@pytest.mark.parametrize("edge_s", [0.0, 0.5])
def test_frames_that_fill_the_link_tell_its_rate(rate_bps: float, edge_s: float) -> None:
    estimate = UplinkRate(1e6)
    link = MadeUpLink(estimate, rate_bps)
    for k in range(4):
        link.measure(10.0 * k)
    now_s = 50.0
    for _ in range(40):
        # Large enough that half a millisecond of noise is a twentieth of it.
        now_s = link.carry(now_s, rate_bps * 0.01 / 8, edge_s) + 0.05
    # A heartbeat's own bytes are left out, but for no more than a quarter of all.
    assert BASE_S * 0.99 < estimate.base_s < 1.01 * max(BASE_S, 0.75 * (BASE_S + 400 / rate_bps))
    assert estimate.at(now_s) == pytest.approx(rate_bps, rel=0.12)


@pytest.mark.parametrize("num_before", [1, 2, 4])
def test_a_heartbeat_over_a_link_that_stood_still_does_not_blur_the_next_ones(num_before: int) -> None:
    estimate = UplinkRate(1e6)
    link = MadeUpLink(estimate, 1e6)
    for k in range(num_before):
        link.measure(1.0 * k)
    noise_s = estimate.noise_s
    link.free_s = 12.0
    link.carry(10.0, 50, is_way=True)
    assert estimate.noise_s == pytest.approx(noise_s, abs=1e-4)


@pytest.mark.parametrize("rate_bps", [2e4, 1e6, 1e7])
def test_a_rate_assumed_far_too_low_spoils_neither_way_nor_noise(rate_bps: float) -> None:
    # A heartbeat of 50 B at 5 kbit/s would take 80 ms, more than all that this one took.
    estimate = UplinkRate(5e3)
    link = MadeUpLink(estimate, rate_bps)
    for k in range(4):
        link.measure(3.0 * k)
        assert BASE_S * 0.99 < estimate.base_s < 1.01 * max(BASE_S, 0.75 * (BASE_S + 400 / rate_bps))
        assert estimate.noise_s == pytest.approx(5e-4)
    # A padded heartbeat takes 1.6 ms at 10 Mbit/s, within 0.5 ms.
    assert estimate.at(20.0) == pytest.approx(rate_bps, rel=0.25)


@pytest.mark.parametrize("num_before", [0, 4])
def test_a_link_that_stands_still_behind_a_heartbeat_is_known_again_by_the_next(num_before: int) -> None:
    estimate = UplinkRate(1e6)
    link = MadeUpLink(estimate, 2e5)
    for k in range(num_before):
        link.measure(3.0 * k)
    link.carry(20.0, 50, is_way=True)
    link.free_s = 25.0
    link.carry(20.0, 2000)
    for k in range(3):
        link.measure(30.0 + k)
    assert estimate.base_s == pytest.approx(BASE_S, rel=0.02)
    assert estimate.at(40.0) == pytest.approx(2e5, rel=0.05)
    assert estimate.is_way_known


def test_one_late_heartbeat_on_a_new_link_is_no_way() -> None:
    estimate = UplinkRate(1e7)
    link = MadeUpLink(estimate, 1e7)
    link.free_s = 0.06
    link.carry(0.0, 50, is_way=True)
    assert estimate.base_s > 0.06 and not estimate.is_way_known
    for k in range(2):
        assert not estimate.is_way_known
        link.measure(1.0 + k)
    assert estimate.base_s == pytest.approx(BASE_S, rel=0.01)
    assert estimate.is_way_known


@pytest.mark.parametrize(("before_s", "after_s"), [(0.08, 0.02), (0.06, 0.005), (0.02, 0.08), (0.005, 0.06)])
def test_another_way_is_learnt_from_five_heartbeats_shorter_ones_from_one(before_s: float, after_s: float) -> None:
    estimate = UplinkRate(1e6)
    link = MadeUpLink(estimate, 1e7, base_s=before_s)
    for k in range(5):
        link.measure(3.0 * k)
    link.base_s = after_s
    link.measure(20.0)
    if after_s < before_s:
        assert estimate.base_s == pytest.approx(after_s, rel=0.01)
    else:
        assert not estimate.is_way_known
    for k in range(4):
        link.measure(21.0 + k)
    assert estimate.base_s == pytest.approx(after_s, rel=0.01)
    assert estimate.is_way_known
    assert estimate.at(40.0) == pytest.approx(1e7, rel=0.25)


def test_frames_that_are_answered_out_of_turn_are_measured_together() -> None:
    estimate = UplinkRate(1e6, BASE_S)
    link = MadeUpLink(estimate, 1e6)
    link.measure(0.0)
    for k in range(10):
        at_s = 1.0 + k
        estimate.sent(10 + 2 * k, at_s, 20_000)
        estimate.sent(11 + 2 * k, at_s, 500)
        # The edge keeps the first for 300 ms.
        estimate.heard(11 + 2 * k, at_s + 0.164 + BASE_S)
        estimate.heard(10 + 2 * k, at_s + 0.160 + 0.3 + BASE_S, edge_s=0.3)
    assert estimate.at(12.0) == pytest.approx(1e6, rel=0.05)


def test_frames_that_queue_are_not_charged_for_each_other() -> None:
    estimate = UplinkRate(2e6, BASE_S)
    link = MadeUpLink(estimate, 1e6)
    link.measure(0.0)
    # Ten at once: the last is heard of a second after it was sent, though each takes 100 ms.
    sent = [(key, 1.0) for key in range(10)]
    for key, at_s in sent:
        estimate.sent(key, at_s, 12_500)
    for key, _ in sent:
        estimate.heard(key, 1.0 + 0.1 * (key + 1) + BASE_S)
    assert estimate.at(2.5) == pytest.approx(1e6, rel=0.05)


def test_small_frames_do_not_pull_a_fast_link_down() -> None:
    estimate = UplinkRate(1e8)
    link = MadeUpLink(estimate, 1e8)
    for k in range(4):
        link.measure(0.1 * k)
    # 100 B take 8 us; hearing of them is late by up to 0.4 ms.
    for k in range(100):
        estimate.sent(k, 1 + 0.1 * k, 100)
        estimate.heard(k, 1 + 0.1 * k + BASE_S + 8e-6 + 4e-6 * k)
    assert estimate.at(20.0) == pytest.approx(1e8)


def test_silence_lowers_the_rate_before_anything_is_heard() -> None:
    estimate = UplinkRate(1e6, BASE_S)
    estimate.sent(1, 0.0, 12_500)
    assert estimate.at(0.05) == 1e6
    # After 2 s, 100 kbit have not passed: at most 50 kbit/s.
    assert estimate.at(2.0 + BASE_S) == pytest.approx(5e4, rel=0.01)
    assert estimate.backlog_s(0.0) == pytest.approx(0.1)
    # A frame whose time the edge explains does not.
    patient = UplinkRate(1e6, BASE_S)
    patient.sent(1, 0.0, 12_500, edge_s=5.0)
    assert patient.at(2.0) == 1e6


def test_what_a_broken_link_had_taken_is_forgotten() -> None:
    estimate = UplinkRate(1e6)
    estimate.sent(1, 0.0, 12_500)
    estimate.forget()
    assert estimate.backlog_s(10.0) == 0.0 and estimate.at(10.0) == 1e6
    estimate.heard(1, 20.0)
    assert estimate.at(21.0) == 1e6


def test_a_link_that_changes_is_followed_within_a_few_frames() -> None:
    estimate = UplinkRate(1e6)
    link = MadeUpLink(estimate, 1e6)
    link.measure(0.0)
    now_s = 1.0
    for rate_bps in (1e6, 1e7, 5e5, 4e6):
        link.rate_bps = rate_bps
        for _ in range(6):
            now_s = link.carry(now_s, 12_500) + 0.1
        assert estimate.at(now_s) == pytest.approx(rate_bps, rel=0.25)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(1, 1e6), st.floats(0, 10), st.booleans()), max_size=60))
def test_whatever_happens_the_rate_is_a_rate(story: list[tuple[float, float, float, bool]]) -> None:
    estimate, now_s = UplinkRate(1e6), 0.0
    for key, (gap_s, num_bytes, edge_s, is_way) in enumerate(story):
        now_s += gap_s
        estimate.sent(key, now_s, num_bytes)
        estimate.heard(key - 1, now_s, edge_s=edge_s, is_way=is_way)
        assert LEAST_BPS <= estimate.at(now_s) < 1e12
        assert 0 <= estimate.backlog_s(now_s) < 1e12
