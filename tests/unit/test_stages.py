from __future__ import annotations

import msgspec
import numpy as np
import pytest

from coinfer.errors import PlanError
from coinfer.plan import Candidate, Evidence
from coinfer.profile import Arrivals, Conditions, Link, Radio, Slowdown
from coinfer.stages import RESOURCES, Work, cost, courses_of, price, remote_share, segment_times, stages, work_of
from tiny_bundle import EXIT_PLAN, SECONDS

LINK = Link(rate_bps=8e6, delay_s=0.01)
SPLIT = Work(
    head_s=0.002, encode_s=0.001, decode_s=0.0005, tail_s=0.004, payload_bytes=100.0, reply_bytes=10.0,
    is_int8=False, remote_share=1.0,
)  # fmt: skip


def test_stages_come_in_order_on_their_resources():
    assert [(stage.name, stage.resource) for stage in stages(SPLIT)] == [
        ("head", "device"),
        ("exit", "device"),
        ("encode", "device"),
        ("send", "uplink"),
        ("decode", "edge"),
        ("tail", "edge"),
        ("reply", "downlink"),
    ]


def test_a_price_by_hand():
    # Up: 100 + 8 header + 6 frame + 40 = 154 B; down: 10 + 8 + 12 durations + 2 frame + 40 = 72 B; 1 us a byte.
    conditions = Conditions(link=LINK, device=Slowdown(fp32=10, int8=20), edge_load=2.0, exchange_s=0.003)
    priced = price(SPLIT, conditions)
    busy_s = {"device": 0.030, "uplink": 154e-6, "edge": 0.009, "downlink": 72e-6}
    assert {name: float(seconds) for name, seconds in priced.busy_s.items()} == pytest.approx(busy_s)
    assert priced.latency_s == pytest.approx(sum(busy_s.values()) + 2 * 0.01 + 0.003)
    assert priced.period_s == pytest.approx(0.030)
    assert np.isnan(priced.energy_j)


def test_a_device_plan_pays_for_its_head_alone():
    work = SPLIT._replace(encode_s=0.0, decode_s=0.0, tail_s=0.0, payload_bytes=0.0, reply_bytes=0.0, remote_share=0.0)
    priced = price(work, Conditions(link=LINK, device=Slowdown(fp32=3), exchange_s=0.5))
    assert priced.latency_s == pytest.approx(0.006)
    assert priced.busy_s["uplink"] == priced.busy_s["downlink"] == 0


def test_int8_slows_the_network_by_its_own_factor_and_nothing_else():
    conditions = Conditions(link=LINK, device=Slowdown(fp32=10, int8=30), edge_load=2.0)
    busy_s = price(SPLIT._replace(is_int8=True), conditions).busy_s
    assert busy_s["device"] == pytest.approx(0.002 * 30 + 0.001 * 10)
    assert busy_s["edge"] == pytest.approx(0.009)


def test_the_downlink_may_have_a_rate_of_its_own():
    conditions = Conditions(link=Link(rate_bps=8e6, down_rate_bps=8e3))
    busy_s = price(SPLIT, conditions).busy_s
    assert (busy_s["uplink"], busy_s["downlink"]) == (pytest.approx(154e-6), pytest.approx(0.072))


def test_a_delay_occupies_nothing():
    near, far = (price(SPLIT, Conditions(link=Link(rate_bps=8e6, delay_s=delay_s))) for delay_s in (0.0, 5.0))
    assert far.latency_s == pytest.approx(near.latency_s + 10.0)
    assert far.period_s == near.period_s


def test_head_and_encode_share_the_device_in_a_stream():
    stage_s = {stage.name: cost(stage, Conditions(link=LINK)).busy_s for stage in stages(SPLIT)}
    assert price(SPLIT, Conditions(link=LINK)).period_s == max(
        stage_s["head"] + stage_s["encode"], stage_s["send"], stage_s["decode"] + stage_s["tail"], stage_s["reply"]
    )


def test_energy_is_the_devices_compute_and_sending():
    radio = Radio(name="r", alpha_w_per_bps=1e-7, beta_w=0.2)
    conditions = Conditions(link=LINK, device=Slowdown(fp32=10), device_power_w=2.0, radio=radio)
    assert price(SPLIT, conditions).energy_j == pytest.approx(0.030 * 2.0 + 154e-6 * (0.8 + 0.2))


@pytest.mark.parametrize("power", [{"device_power_w": 2.0}, {"radio": Radio(name="r", alpha_w_per_bps=0, beta_w=1)}])
def test_half_the_powers_give_no_energy(power):
    assert np.isnan(price(SPLIT, Conditions(link=LINK, **power)).energy_j)


def test_a_table_prices_every_row_as_it_would_alone(make_candidate, trio):
    candidates = [*trio, make_candidate(7, "device", precision="int8", head_s=0.003)]
    conditions = Conditions(link=LINK, device=Slowdown(fp32=10, int8=20), edge_load=2.0, exchange_s=0.001)
    together = price(work_of(candidates), conditions)
    for k, candidate in enumerate(candidates):
        alone = price(work_of([candidate]), conditions)
        assert together.latency_s[k] == alone.latency_s[0]
        assert together.period_s[k] == alone.period_s[0]
        assert all(together.busy_s[name][k] == alone.busy_s[name][0] for name in RESOURCES)


def test_a_table_reads_every_amount_from_the_evidence(trio):
    work = work_of(trio)
    for k, candidate in enumerate(trio):
        evidence = candidate.evidence
        for name in ("head_s", "encode_s", "decode_s", "tail_s", "payload_bytes", "reply_bytes"):
            assert getattr(work, name)[k] == getattr(evidence, name)
    assert work.remote_share.tolist() == [0.0, 1.0, 1.0]
    assert work.is_int8.tolist() == [False, False, False]


def test_latency_waits_for_the_median_payload_and_a_stream_for_the_mean() -> None:
    conditions = Conditions(link=Link(rate_bps=8e3))
    plain = price(SPLIT, conditions)
    skewed = price(SPLIT._replace(typical_bytes=SPLIT.payload_bytes - 50), conditions)
    assert float(plain.latency_s - skewed.latency_s) == pytest.approx(50e-3)
    assert skewed.busy_s["uplink"] == plain.busy_s["uplink"]


# --- exits -----------------------------------------------------------------------------------------


def test_segment_times_weight_what_is_behind_an_exit():
    shares = (0.5, 0.25)
    assert remote_share(EXIT_PLAN, shares) == 0.5
    assert segment_times(EXIT_PLAN, "device", shares, SECONDS) == (3 + 4 / 2, 1)
    # Of the half that crosses, half is answered by the exit of the edge.
    assert segment_times(EXIT_PLAN, "edge", shares, SECONDS) == (2 + 8 / 2, 0.5)


def test_exits_that_never_or_always_answer():
    assert segment_times(EXIT_PLAN, "device", (0.0, 0.0), SECONDS) == (7, 1)
    assert segment_times(EXIT_PLAN, "edge", (0.0, 0.0), SECONDS) == (10, 0.5)
    assert remote_share(EXIT_PLAN, (1.0, 0.0)) == 0
    assert segment_times(EXIT_PLAN, "device", (1.0, 0.0), SECONDS) == (3, 1)
    whole = msgspec.structs.replace(EXIT_PLAN, kind="device", cut=None, codec=None, tail=None, exits=())
    assert segment_times(whole, "device", (), SECONDS) == (3, 0) and remote_share(whole, ()) == 0


def test_a_plan_with_exits_costs_the_mean_of_its_requests():
    """Three of four requests end at an exit of 1 ms; the fourth pays for everything."""
    conditions = Conditions(
        link=LINK, device=Slowdown(fp32=10, int8=20), edge_load=2.0, exchange_s=0.003, device_power_w=2.0,
        radio=Radio(name="r", alpha_w_per_bps=1e-7, beta_w=1.0, tail_j=0.1),
    )  # fmt: skip
    through = SPLIT._replace(exit_s=0.001)
    at_exit = through._replace(
        encode_s=0.0, decode_s=0.0, tail_s=0.0, payload_bytes=0.0, reply_bytes=0.0, remote_share=0.0
    )
    both = [price(work, conditions) for work in (at_exit, through)]
    mixed = price(through._replace(remote_share=0.25), conditions)
    for name in ("latency_s", "energy_j"):
        want = 0.75 * getattr(both[0], name) + 0.25 * getattr(both[1], name)
        assert getattr(mixed, name) == pytest.approx(want)
    for resource in RESOURCES:
        want = 0.75 * both[0].busy_s[resource] + 0.25 * both[1].busy_s[resource]
        assert mixed.busy_s[resource] == pytest.approx(want)
    assert both[1].busy_s["device"] == pytest.approx(0.02 + 0.01 + 0.01)


def test_the_courses_of_a_plan_cost_what_it_costs():
    seconds = {name: 1e-3 * value for name, value in SECONDS.items()}
    shares = (0.5, 0.25)
    here, there = (segment_times(EXIT_PLAN, side, shares, seconds) for side in ("device", "edge"))
    evidence = Evidence(
        split="validation", num_images=100, accuracy=90.0, accuracy_ci=1.0, loss_points=0.0, loss_ci_points=1.0,
        payload_bytes=100.0, payload_bytes_p95=120.0, reply_bytes=10.0, encode_s=1e-3, decode_s=2e-3,
        head_s=here.segments_s, exit_s=here.classifiers_s, tail_s=there.segments_s + there.classifiers_s,
        exit_shares=shares,
    )  # fmt: skip
    candidate = Candidate(plan=EXIT_PLAN, evidence=evidence)
    courses = courses_of(candidate, seconds)
    assert [(course.exit, course.share) for course in courses] == [(0, 0.5), (1, 0.25), (None, 0.25)]
    conditions = Conditions(link=LINK, device=Slowdown(fp32=10), edge_load=3.0, exchange_s=0.01)
    whole, alone = price(work_of([candidate]), conditions), [price(c.work, conditions) for c in courses]
    assert whole.latency_s[0] == pytest.approx(sum(c.share * p.latency_s for c, p in zip(courses, alone, strict=True)))
    for resource in RESOURCES:
        mean = sum(c.share * p.busy_s[resource] for c, p in zip(courses, alone, strict=True))
        assert whole.busy_s[resource][0] == pytest.approx(mean)
    # The one that ends on the device sends nothing.
    assert alone[0].busy_s["uplink"] == 0 < alone[1].busy_s["uplink"]


# --- requests that wait for each other --------------------------------------------------------------

BUSY = SPLIT._replace(head_s=0.001, encode_s=0.0, decode_s=0.0, tail_s=0.004, payload_bytes=10.0)


def wait_of(arrivals: Arrivals, work: Work = BUSY, **options) -> float:
    lone, shared = (
        price(work, Conditions(link=LINK, arrivals=given, **options)) for given in (None, arrivals)
    )
    return float(shared.latency_s - lone.latency_s)


def test_a_lone_device_with_even_arrivals_waits_for_nobody():
    assert wait_of(Arrivals(rate_hz=249.0)) == pytest.approx(0.0)
    assert wait_of(Arrivals(rate_hz=251.0)) == np.inf


def test_arrivals_by_chance_wait_as_in_a_queue_of_constant_service():
    # At the edge 4 ms at a load of 0.5: 2 ms; on the device 1 ms at 0.125; the link hardly anything.
    wait_s = wait_of(Arrivals(rate_hz=125.0, is_random=True))
    device_s, edge_s = 0.125 * 0.001 / (2 * 0.875), 0.5 * 0.004 / (2 * 0.5)
    assert device_s + edge_s < wait_s < device_s + edge_s + 1e-5


def test_many_devices_share_the_edge_and_its_workers():
    crowd = Arrivals(rate_hz=12.5, devices=10)
    assert wait_of(crowd) == pytest.approx(0.9 * 0.5 * 0.004 / (2 * 0.5), rel=1e-6)
    helped = wait_of(crowd, edge_workers=2)
    # Erlang's C of two servers at a load of 1/4 each is 0.1: M/M/2 waits 0.1 x 4 ms / (2 - 0.5), M/D/2 half of it.
    assert helped == pytest.approx(0.9 * 0.1 * 0.004 / (2 * 1.5), rel=1e-6)
    busy = price(BUSY, Conditions(link=LINK, arrivals=crowd)).period_s
    assert busy == pytest.approx(0.04)
    assert price(BUSY, Conditions(link=LINK, arrivals=crowd, edge_workers=5)).period_s == pytest.approx(0.008)


def test_what_does_not_cross_does_not_wait_for_the_edge():
    arrivals = Arrivals(rate_hz=125.0, is_random=True)
    half = wait_of(arrivals, BUSY._replace(remote_share=0.5))
    device_s, edge_s = 0.125 * 0.001 / (2 * 0.875), 0.25 * 0.004 / (2 * 0.75)
    assert half == pytest.approx(device_s + 0.5 * edge_s, rel=1e-2)


@pytest.mark.parametrize("fields", [{"rate_hz": 0.0}, {"rate_hz": 1.0, "devices": 0}, {"rate_hz": float("nan")}])
def test_arrivals_that_are_none_are_refused(fields):
    with pytest.raises(PlanError, match="a rate above 0 and at least one device"):
        Arrivals(**fields)
    with pytest.raises(PlanError, match="at least 1 worker and batches of 1 or more, got 0 and 1"):
        Conditions(link=LINK, edge_workers=0)
