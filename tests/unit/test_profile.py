from __future__ import annotations

import math

import pytest

from coinfer.errors import PlanError
from coinfer.profile import Conditions, Link, Radio, Slowdown, Trace

LINK = Link(rate_bps=1e6)


def test_a_trace_holds_each_rate_until_the_next_start_and_repeats():
    trace = Trace(name="t", start_s=(0.0, 1.0, 2.5), rate_bps=(5.0, 0.0, 7.0), duration_s=4.0)
    for time_s, rate_bps in [(0, 5), (0.999, 5), (1, 0), (2.499, 0), (2.5, 7), (3.999, 7), (4, 5), (9.0, 0), (4003, 7)]:
        assert trace.at(time_s) == rate_bps


@pytest.mark.parametrize(
    ("start_s", "rate_bps", "duration_s", "message"),
    [
        ((), (), 1.0, "as many starts as rates"),
        ((0.5,), (1.0,), 1.0, "the first at 0"),
        ((0.0, 1.0), (1.0,), 2.0, "as many starts as rates"),
        ((0.0, 1.0, 1.0), (1.0, 1.0, 1.0), 2.0, "starts must increase"),
        ((0.0, 2.0), (1.0, 1.0), 2.0, "before the duration"),
        ((0.0, math.nan), (1.0, 1.0), 2.0, "starts must increase"),
        ((0.0,), (-1.0,), 1.0, "at least 0 and some above 0"),
        ((0.0, 1.0), (0.0, 0.0), 2.0, "some above 0"),
        ((0.0, 1.0), (1.0, math.nan), 2.0, "at least 0"),
        ((0.0,), (math.inf,), 2.0, "at least 0"),
    ],
)
def test_a_trace_that_makes_no_sense_is_refused(start_s, rate_bps, duration_s, message):
    with pytest.raises(PlanError, match=f'{message}.*trace "odd"'):
        Trace(name="odd", start_s=start_s, rate_bps=rate_bps, duration_s=duration_s)


@pytest.mark.parametrize("rate_bps", [0.0, -1.0, math.nan])
def test_a_rate_is_above_0(rate_bps):
    with pytest.raises(PlanError, match="rate must be above 0"):
        Link(rate_bps=rate_bps)
    with pytest.raises(PlanError, match="rate must be above 0"):
        Link(rate_bps=1.0, down_rate_bps=rate_bps)


@pytest.mark.parametrize("delay_s", [-0.001, math.nan])
def test_a_delay_is_at_least_0(delay_s):
    with pytest.raises(PlanError, match=f"delay must be at least 0 s, got {delay_s}"):
        Link(rate_bps=1.0, delay_s=delay_s)


@pytest.mark.parametrize("factors", [{"fp32": 0.0}, {"int8": -2.0}, {"fp32": math.nan}])
def test_a_slowdown_is_above_0(factors):
    with pytest.raises(PlanError, match="a slowdown must be above 0"):
        Slowdown(**factors)


def test_an_edge_load_is_above_0():
    with pytest.raises(PlanError, match="load must be above 0, got 0"):
        Conditions(link=LINK, edge_load=0)


def test_a_radio_sends_at_its_power():
    assert Radio(name="4G", alpha_w_per_bps=438.39e-9, beta_w=1.288).power_w(5.85e6) == pytest.approx(3.8526, rel=1e-4)
