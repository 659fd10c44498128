from __future__ import annotations

import pytest

from coinfer.profile import Conditions, Link, Radio, Slowdown
from coinfer.search import Goal, estimate, search

CONDITIONS = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10, int8=20), exchange_s=0.001)


def test_the_stages_add_up_to_the_latency(trio):
    for candidate in trio:
        priced = estimate(candidate, CONDITIONS)
        assert sum(priced.stages_s.values()) == pytest.approx(priced.latency_s, rel=1e-12)


def test_stages_that_a_plan_does_not_have_are_left_out(trio):
    assert list(estimate(trio[0], CONDITIONS).stages_s) == ["head"]
    assert list(estimate(trio[1], CONDITIONS).stages_s) == ["encode", "send", "decode", "tail", "reply", "exchange"]
    assert list(estimate(trio[2], CONDITIONS).stages_s)[0] == "head"


def test_an_estimate_is_the_row_of_the_ranking(trio):
    for row in search(trio, CONDITIONS, Goal()).rows:
        priced = estimate(trio[row.index], CONDITIONS)
        assert priced.latency_s == row.latency_s
        assert priced.throughput_hz == row.throughput_hz
        assert priced.wire_bytes == row.wire_bytes
        assert priced.energy_j is row.energy_j is None


def test_the_critical_resource_bounds_the_stream(trio):
    assert [estimate(candidate, CONDITIONS).critical for candidate in trio] == ["device", "uplink", "device"]


def test_int8_work_has_a_slowdown_of_its_own(make_candidate):
    device = make_candidate(0, "device", head_s=0.001, precision="int8")
    assert estimate(device, CONDITIONS).latency_s == pytest.approx(0.020)


def test_energy_is_compute_and_sending(make_candidate):
    conditions = Conditions(
        link=Link(rate_bps=8e3), device_power_w=2.0, radio=Radio(name="lte", alpha_w_per_bps=1e-4, beta_w=0.2)
    )
    upload = make_candidate(0, "upload", payload_bytes=100.0, encode_s=0.5)
    # 154 B on the wire at 1 kB/s: 0.154 s at 1 W; half a second of computing at 2 W.
    assert estimate(upload, conditions).energy_j == pytest.approx(1.154)
