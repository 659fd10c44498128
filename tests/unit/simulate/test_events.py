"""Simulated requests against queues by hand, against the estimate, and against the fleet's array operations."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from coinfer.errors import PlanError
from coinfer.plan import Candidate, CodecSpec, Evidence, Plan
from coinfer.profile import Arrivals, Conditions, Link, Slowdown, Trace
from coinfer.search import estimate
from coinfer.simulate.arrivals import periodic, poisson
from coinfer.simulate.events import Stream, simulate
from coinfer.simulate.fleet import simulate_fleet
from coinfer.stages import courses_of
from coinfer.timeline import Timeline
from tiny_bundle import exit_at

LINK = Link(rate_bps=1e6, delay_s=0.005)
CONDITIONS = Conditions(link=LINK, device=Slowdown(fp32=10, int8=10), edge_load=2.0, exchange_s=0.001)
TRACE = Trace(name="t", start_s=(0.0, 0.3, 0.5), rate_bps=(2e6, 0.0, 3e5), duration_s=1.1)


def stream_of(candidate: Candidate, arrivals: np.ndarray, conditions: Conditions = CONDITIONS, **options) -> Stream:
    return Stream(candidate.plan, courses_of(candidate, {}), arrivals, conditions, **options)


def latencies(timeline: Timeline) -> list[float]:
    return [outcome.latency_s for outcome in timeline.outcomes]


@pytest.fixture
def split(make_candidate: Callable[..., Candidate]) -> Candidate:
    """10 ms on the device, 8.4 ms on the uplink, 4 ms on the edge."""
    return make_candidate(2, "split", payload_bytes=1000, head_s=0.001, encode_s=0.0, tail_s=0.002, decode_s=0.0)


def exits(shares: tuple[float, float]) -> tuple[Candidate, dict[str, float]]:
    plan = Plan(
        number=1, kind="split", variant="n", cut="late#0", codec=CodecSpec(transform="float32"), head="a", tail="t",
        exits=(exit_at("device", "early#0", "b", 0.5), exit_at("edge", "sum#0", "u", 0.5)),
    )  # fmt: skip
    seconds = {"a": 1e-3, "segments/early.exit.onnx": 1e-4, "segments/b.onnx": 1e-3, "t": 1e-3}
    seconds |= {"segments/sum.exit.onnx": 1e-4, "segments/u.onnx": 3e-3}
    evidence = Evidence(
        split="validation", num_images=100, accuracy=90.0, accuracy_ci=1.0, loss_points=0.0, loss_ci_points=1.0,
        payload_bytes=400.0, payload_bytes_p95=400.0, reply_bytes=10.0, head_s=0.0, encode_s=1e-4, decode_s=1e-4,
        tail_s=0.0, exit_shares=shares,
    )  # fmt: skip
    return Candidate(plan=plan, evidence=evidence), seconds


# --- against the estimate ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["device", "upload", "split"])
def test_lone_requests_take_what_is_estimated(make_candidate: Callable[..., Candidate], kind: str) -> None:
    candidate = make_candidate(3, kind, payload_bytes=2345, head_s=0.003, tail_s=0.002, encode_s=0.0004)
    want = estimate(candidate, CONDITIONS)
    timeline = simulate([stream_of(candidate, periodic(1.0, 5))])
    assert latencies(timeline) == pytest.approx([want.latency_s] * 5)
    assert {o.answered for o in timeline.outcomes} == {"device" if kind == "device" else "edge"}
    for stage, stage_s in want.stages_s.items():
        if stage not in ("exchange",):
            delay_s = LINK.delay_s if stage in ("send", "reply") else 0.0
            assert timeline.busy_s(stage) == pytest.approx(5 * (stage_s - delay_s))


@pytest.mark.parametrize("kind", ["device", "upload", "split"])
def test_a_saturated_stream_has_the_estimated_rate(make_candidate: Callable[..., Candidate], kind: str) -> None:
    candidate = make_candidate(3, kind, payload_bytes=900, head_s=0.001, tail_s=0.002, encode_s=0.0004)
    # What a link carries is the mean payload, whatever the median one is.
    skewed = msgspec.structs.replace(candidate.evidence, payload_bytes_p50=300.0)
    candidate = msgspec.structs.replace(candidate, evidence=skewed)
    timeline = simulate([stream_of(candidate, periodic(0.0, 400), window=50)])
    ends = sorted(outcome.end_s for outcome in timeline.outcomes)
    rate_hz = 300 / (ends[-1] - ends[-301])
    assert rate_hz == pytest.approx(estimate(candidate, CONDITIONS).throughput_hz, rel=1e-6)


def test_exits_take_their_share_and_their_own_way() -> None:
    candidate, seconds = exits((0.5, 0.25))
    courses = courses_of(candidate, seconds)
    timeline = simulate([Stream(candidate.plan, courses, periodic(1.0, 4000), CONDITIONS, seed=3)])
    by = [(o.answered, o.exit) for o in timeline.outcomes]
    shares = {key: by.count(key) / 4000 for key in set(by)}
    assert shares == pytest.approx({("exit", 0): 0.5, ("edge", 1): 0.25, ("edge", None): 0.25}, abs=0.03)
    alone = {o.exit: o.latency_s for o in timeline.outcomes}
    assert alone[0] == pytest.approx(0.011)
    assert alone[None] - alone[1] == pytest.approx(0.006)
    assert all(o.wire_bytes == 0 for o in timeline.outcomes if o.answered == "exit")


def test_what_requests_take_is_spread_as_told(split: Candidate) -> None:
    spread = {"device": np.array([1.0, 3.0]), "uplink": np.array([2.0])}
    timeline = simulate([stream_of(split, periodic(1.0, 2000), spread=spread)])
    lone = estimate(split, CONDITIONS)
    send_s = lone.stages_s["send"] - LINK.delay_s
    slow = [took > lone.latency_s + send_s + 0.01 for took in latencies(timeline)]
    assert np.mean(slow) == pytest.approx(0.5, abs=0.04)
    assert latencies(timeline) == pytest.approx([lone.latency_s + send_s + 0.02 * is_slow for is_slow in slow])
    once = simulate([stream_of(split, periodic(1.0, 3))]).outcomes[0].wire_bytes
    assert {outcome.wire_bytes for outcome in timeline.outcomes} == {2 * once}
    for factors in (np.array([]), np.array([1.0, -1.0]), np.array([np.nan])):
        with pytest.raises(PlanError, match=r"spread needs factors of 0 or more.*uplink"):
            simulate([stream_of(split, periodic(1.0, 3), spread={"uplink": factors})])


# --- queues by hand ---------------------------------------------------------------------------------


def test_requests_queue_where_the_slowest_resource_is(split: Candidate) -> None:
    took = latencies(simulate([stream_of(split, periodic(0.006, 20), window=100)]))
    lone = estimate(split, CONDITIONS).latency_s
    # The device needs 10 ms for each: every request waits 4 ms more than the one before.
    assert took == pytest.approx([lone + 0.004 * k for k in range(20)])


def test_a_window_holds_back_the_device(split: Candidate) -> None:
    lone = estimate(split, CONDITIONS).latency_s
    ends = [o.end_s for o in simulate([stream_of(split, periodic(0.0, 6), window=1)]).outcomes]
    assert ends == pytest.approx([lone * (k + 1) for k in range(6)])


def test_two_devices_share_the_edge_and_nothing_else(make_candidate: Callable[..., Candidate]) -> None:
    slow = make_candidate(1, "upload", payload_bytes=10, tail_s=0.05, encode_s=0.0, decode_s=0.0)
    pair = [stream_of(slow, periodic(1.0, 3), device=name) for name in ("a", "b")]
    lone = estimate(slow, CONDITIONS).latency_s
    first, second = np.array(latencies(simulate(pair))).reshape(2, 3)
    assert first == pytest.approx([lone] * 3) and second == pytest.approx([lone + 0.1] * 3)
    assert latencies(simulate(pair, workers=2)) == pytest.approx([lone] * 6)


def test_two_streams_of_one_device_share_its_core_and_its_link(make_candidate: Callable[..., Candidate]) -> None:
    alone = make_candidate(0, "device", head_s=0.004)
    took = latencies(simulate([stream_of(alone, periodic(1.0, 2)), stream_of(alone, periodic(1.0, 2))]))
    assert took == pytest.approx([0.04, 0.04, 0.08, 0.08])


@pytest.mark.parametrize(
    ("policy", "kept"), [("drop-oldest", [0, 2, 4, 7, 9]), ("drop-newest", [0, 1, 3, 5, 8]), ("block", list(range(10)))]
)
def test_a_slow_device_drops_by_policy(make_candidate: Callable[..., Candidate], policy: str, kept: list[int]) -> None:
    # 24 ms a request, one every 10 ms: of those that come meanwhile the last, or the first, is kept.
    slow = make_candidate(0, "device", head_s=0.0024)
    timeline = simulate([stream_of(slow, periodic(0.01, 10), policy=policy, window=1)])
    assert [o.request for o in timeline.outcomes] == list(range(10))
    assert [o.request for o in timeline.outcomes if o.answered == "device"] == kept
    assert {o.answered for o in timeline.outcomes} == ({"device"} if policy == "block" else {"device", "dropped"})


def test_late_is_told_at_the_deadline_and_the_slot_comes_back_later(make_candidate: Callable[..., Candidate]) -> None:
    slow = make_candidate(1, "upload", payload_bytes=10, tail_s=0.05, encode_s=0.0, decode_s=0.0)
    timeline = simulate([stream_of(slow, periodic(0.0, 3), window=1, deadline_s=0.15)])
    lone = estimate(slow, CONDITIONS).latency_s
    assert [o.answered for o in timeline.outcomes] == ["edge", "late", "late"]
    assert latencies(timeline) == pytest.approx([lone, 0.15, 0.15])


# --- the fleet --------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("link", [LINK, msgspec.structs.replace(LINK, trace=TRACE)], ids=["constant", "trace"])
def test_a_fleet_is_its_devices_one_by_one(workers: int, link: Link) -> None:
    candidate, seconds = exits((0.3, 0.2))
    courses = courses_of(candidate, seconds)
    conditions = msgspec.structs.replace(CONDITIONS, link=link)
    arrivals = np.stack([poisson(20.0, 30, seed=k) for k in range(8)])
    offsets = np.random.default_rng(0).uniform(0, 1, 8)
    fleet = simulate_fleet(courses, arrivals, conditions, workers=workers, offsets_s=offsets, seed=5)
    # Each request of the event simulation takes the course that it took in the fleet.
    streams = [
        Stream(
            candidate.plan, (courses[c]._replace(share=1.0),), arrivals[d : d + 1, k], conditions,
            device=f"{d}", window=10**6, offset_s=offsets[d],
        )
        for d in range(8)
        for k, c in enumerate(fleet.course[d])
    ]  # fmt: skip
    timeline = simulate(streams, workers=workers, spans=False)
    assert latencies(timeline) == pytest.approx(fleet.latency_s.ravel().tolist(), rel=1e-9)
    assert fleet.edge_wait_s.max() > 0 and 0 < fleet.edge_busy_share < 1


def test_devices_begin_anywhere_in_the_trace(split: Candidate) -> None:
    conditions = msgspec.structs.replace(CONDITIONS, link=msgspec.structs.replace(LINK, trace=TRACE))
    arrivals = np.zeros((3, 1))
    result = simulate_fleet(courses_of(split, {}), arrivals, conditions, workers=3, offsets_s=np.array([0.0, 0.3, 0.6]))
    fast, in_outage, slow = result.latency_s[:, 0]
    assert fast < slow < in_outage
    assert result.throughput_hz == pytest.approx(3 / result.duration_s)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: simulate([]), "needs a stream"),
        (lambda s: simulate([s], workers=0), "a worker"),
        (lambda s: simulate([s._replace(window=0)]), "at least 1"),
        (lambda s: simulate([s, s._replace(conditions=Conditions(link=Link(rate_bps=1.0)))]), "share one link"),
        (lambda s: simulate_fleet([], np.zeros((1, 1)), CONDITIONS), "needs a plan"),
        (lambda s: simulate_fleet(s.courses, np.zeros(3), CONDITIONS), "must be .devices, requests."),
        (lambda s: simulate_fleet(s.courses, np.array([[1.0, 0.5]]), CONDITIONS), "rising"),
    ],
)
def test_what_cannot_be_simulated_is_refused(split: Candidate, call: Callable, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        call(stream_of(split, periodic(1.0, 2)))


# --- the model of waiting ---------------------------------------------------------------------------


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
@pytest.mark.parametrize("workers", [1, 4])
def test_devices_wait_at_the_edge_as_the_model_says(
    make_candidate: Callable[..., Candidate], load: float, workers: int
) -> None:
    slow = make_candidate(1, "upload", payload_bytes=10, tail_s=0.01, encode_s=0.0, decode_s=0.0)
    devices, service_s = 60, 0.02
    rate_hz = load * workers / (devices * service_s)
    conditions = msgspec.structs.replace(CONDITIONS, edge_workers=workers)
    crowd = msgspec.structs.replace(conditions, arrivals=Arrivals(rate_hz=rate_hz, is_random=True, devices=devices))
    said_s = estimate(slow, crowd).latency_s - estimate(slow, conditions).latency_s
    arrivals = np.stack([poisson(rate_hz, 2000, seed=k) for k in range(devices)])
    seen_s = simulate_fleet(courses_of(slow, {}), arrivals, conditions, workers=workers).edge_wait_s.mean()
    assert said_s == pytest.approx(seen_s, rel=0.12, abs=2e-4)


# --- batches ----------------------------------------------------------------------------------------


def batched(make_candidate: Callable[..., Candidate], fixed_s: float, each_s: float) -> Candidate:
    slow = make_candidate(1, "upload", payload_bytes=10, tail_s=fixed_s + each_s, encode_s=0.0, decode_s=0.0)
    line = {size: fixed_s + size * each_s for size in (1, 2, 4, 8)}
    return msgspec.structs.replace(slow, evidence=msgspec.structs.replace(slow.evidence, tail_batch_s=line))


def test_what_waits_is_served_together(make_candidate: Callable[..., Candidate]) -> None:
    candidate = batched(make_candidate, 0.01, 0.002)
    link = Link(rate_bps=1e12)
    arrivals = np.array([[0.0], [0.001], [0.002], [0.003], [0.1]])
    for most, waits in ((100, [0, 11, 10, 9, 0]), (2, [0, 11, 10, 23, 0]), (1, [0, 11, 22, 33, 0])):
        result = simulate_fleet(courses_of(candidate, {}), arrivals, Conditions(link=link), max_batch=most)
        assert result.edge_wait_s[:, 0] == pytest.approx([1e-3 * wait for wait in waits])


@pytest.mark.parametrize("load", [0.2, 0.8, 1.5, 3.0])
@pytest.mark.parametrize("workers", [1, 2])
def test_batches_take_as_long_as_the_model_says(
    make_candidate: Callable[..., Candidate], load: float, workers: int
) -> None:
    """`load` is that of single requests: above 1 only batches keep up."""
    candidate = batched(make_candidate, 0.008, 0.002)
    devices, most = 80, 64
    rate_hz = load * workers / (devices * 0.01)
    conditions = Conditions(link=Link(rate_bps=1e12), edge_workers=workers, max_batch=most)
    crowd = msgspec.structs.replace(conditions, arrivals=Arrivals(rate_hz=rate_hz, is_random=True, devices=devices))
    said_s = estimate(candidate, crowd).latency_s
    arrivals = np.stack([poisson(rate_hz, 1500, seed=k) for k in range(devices)])
    fleet = simulate_fleet(courses_of(candidate, {}), arrivals, conditions, workers=workers, max_batch=most)
    seen_s = fleet.latency_s.mean()
    # The model is a bound of the mean; with several workers each is taken for a queue of its own.
    assert 0.97 * seen_s < said_s < (1.1 if workers == 1 else 1.6) * seen_s


@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_small_batches_near_saturation_wait_as_the_model_says(
    make_candidate: Callable[..., Candidate], share: float
) -> None:
    candidate = batched(make_candidate, 0.008, 0.002)
    devices, most = 40, 4
    rate_hz = share * 250.0 / devices
    conditions = Conditions(link=Link(rate_bps=1e12), max_batch=most)
    crowd = msgspec.structs.replace(conditions, arrivals=Arrivals(rate_hz=rate_hz, is_random=True, devices=devices))
    said_s = estimate(candidate, crowd).latency_s
    arrivals = np.stack([poisson(rate_hz, 4000, seed=k) for k in range(devices)])
    seen_s = simulate_fleet(courses_of(candidate, {}), arrivals, conditions, max_batch=most).latency_s.mean()
    assert said_s == pytest.approx(seen_s, rel=0.25)


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_of_events_are_those_of_the_fleet(make_candidate: Callable[..., Candidate], workers: int) -> None:
    candidate = batched(make_candidate, 0.008, 0.002)
    # Of each device at most one at a time, for a fleet's replies do not overtake.
    arrivals = np.random.default_rng(1).uniform(0, 0.4, (60, 1)) + periodic(0.4, 12)
    fleet = simulate_fleet(courses_of(candidate, {}), arrivals, CONDITIONS, workers=workers, max_batch=5)
    streams = [stream_of(candidate, row, device=f"{d}", window=10**6) for d, row in enumerate(arrivals)]
    timeline = simulate(streams, workers=workers, max_batch=5)
    assert latencies(timeline) == pytest.approx(fleet.latency_s.ravel().tolist(), rel=1e-9)
    assert fleet.edge_wait_s.max() > 0.02
    # Those that are computed together are so at the same time.
    spans = [(span.start_s, span.end_s) for span in timeline.spans if span.stage == "tail"]
    assert 1 < max(map(spans.count, spans)) <= 5
    with pytest.raises(PlanError, match="batches of 1 or more, got 1, 1 and 0"):
        simulate(streams[:1], max_batch=0)


def test_only_requests_of_one_plan_are_computed_together(make_candidate: Callable[..., Candidate]) -> None:
    candidate = batched(make_candidate, 0.01, 0.002)
    other = msgspec.structs.replace(candidate, plan=msgspec.structs.replace(candidate.plan, number=9))
    fast = Conditions(link=Link(rate_bps=1e12))
    streams = [
        stream_of(which, np.array([at_s]), fast, device=f"{at_s}{which.plan.number}")
        for which, at_s in ((candidate, 0.0), (candidate, 0.001), (other, 0.002), (candidate, 0.003))
    ]
    ends = [outcome.end_s for outcome in simulate(streams, max_batch=8).outcomes]
    assert ends == pytest.approx([0.012, 0.026, 0.038, 0.026])


def test_a_rate_that_full_batches_cannot_serve_is_infinite(make_candidate: Callable[..., Candidate]) -> None:
    candidate = batched(make_candidate, 0.008, 0.002)
    base = Conditions(link=Link(rate_bps=1e12), max_batch=4)
    for rate_hz, is_served in ((249.0, True), (251.0, False)):
        crowd = msgspec.structs.replace(base, arrivals=Arrivals(rate_hz=rate_hz / 10, is_random=True, devices=10))
        found = estimate(candidate, crowd)
        assert np.isfinite(found.latency_s) == is_served
        # One device's share of what the edge can do: 4 requests in 16 ms, for ten devices.
        assert found.throughput_hz == pytest.approx(25.0)
