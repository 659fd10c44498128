"""What a plan does to each resource, and what that costs: the only reading and the only price list.

    device compute   head, exit, encode
    uplink           send
    edge compute     decode, tail
    downlink         reply

`stages` reads a plan with its evidence (or a table of many: every number may be an array of equal
length) into a list of `Stage`; `cost` prices one stage under `Conditions`.  Latency is the sum of the
stages (the longest path of this chain) plus the exchange; the steady period of a stream is the
largest sum of occupied time on one resource.  A link's delay adds to latency and occupies nothing.
Estimate, simulation and run all go through here, so the three cannot drift apart.

Early exits weight what is behind them by the share of requests that get there: of a plan with exits all prices are
means over its requests.  What a segment takes of the mean request is `segment_times`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from .plan import SIDES, Candidate, Plan, Side
from .profile import Conditions
from .protocol import wire_bytes

Resource = Literal["device", "uplink", "edge", "downlink"]
Number = float | NDArray[np.float64]
RESOURCES: tuple[Resource, ...] = ("device", "uplink", "edge", "downlink")


class Work(NamedTuple):
    """The measured amounts of one plan (floats) or of a table of plans (arrays of one length).

    Times in seconds, unslowed; bytes are whole payloads (their mean) and reply bodies.  `typical_bytes` is the
    payloads' median where it is known: what one request waits for; a stream waits for the mean.  `exit_s` is the
    classifiers of exits on the device; a batch of n takes the edge `batch_fixed_s` + n `batch_each_s` (not a number
    where it was not measured); `remote_share` the share of requests that cross the link (0 of a device plan,
    less than 1 behind exits), of which encoding, bytes, decoding and tail are means.
    """

    head_s: Number
    encode_s: Number
    decode_s: Number
    tail_s: Number
    payload_bytes: Number
    reply_bytes: Number
    is_int8: bool | NDArray[np.bool_]
    remote_share: Number
    typical_bytes: Number | None = None
    exit_s: Number = 0.0
    batch_fixed_s: Number = math.nan
    batch_each_s: Number = math.nan


class Stage(NamedTuple):
    """One serial resource's share of a plan: measured seconds, or bytes to carry (frames included).

    `share` of the requests get there.
    """

    name: Literal["head", "exit", "encode", "send", "decode", "tail", "reply"]
    resource: Resource
    work_s: Number
    num_bytes: Number
    is_int8: bool | NDArray[np.bool_]
    share: Number = 1.0


class Cost(NamedTuple):
    """Of a request that gets there: seconds a stage occupies its resource, and then waits without occupying it."""

    busy_s: Number
    delay_s: Number


def work_of(candidates: list[Candidate]) -> Work:
    """The table of amounts of many candidates, one row each.

    Raises:
        ValueError: `candidates` is empty.
    """
    columns = np.array(
        [
            (
                *(e.head_s, e.encode_s, e.decode_s, e.tail_s, e.payload_bytes, e.reply_bytes),
                e.payload_bytes if e.payload_bytes_p50 is None else e.payload_bytes_p50,
                e.exit_s,
                remote_share(c.plan, e.exit_shares),
                *batch_line(e.tail_batch_s, e.decode_s),
            )
            for c, e in ((c, c.evidence) for c in candidates)
        ],
        dtype=np.float64,
    ).T
    head_s, encode_s, decode_s, tail_s, payload_bytes, reply_bytes, typical_bytes, exit_s, crossing = columns[:9]
    is_int8 = np.array([c.plan.precision == "int8" for c in candidates])
    return Work(
        head_s, encode_s, decode_s, tail_s, payload_bytes, reply_bytes, is_int8, crossing, typical_bytes, exit_s,
        *columns[9:],
    )  # fmt: skip


def batch_line(tail_batch_s: Mapping[int, float], decode_s: float) -> tuple[float, float]:
    """Seconds of a batch and of each request in it, fitted to whole batches; each is decoded for itself.

    Neither is negative; (nan, nan) where fewer than two sizes were measured.

    >>> batch_line({1: 0.003, 2: 0.004, 4: 0.006}, 0.001)
    (0.002, 0.002)
    """
    if len(tail_batch_s) < 2:
        return math.nan, math.nan
    sizes, took_s = (np.array(column, np.float64) for column in zip(*sorted(tail_batch_s.items()), strict=True))
    # By relative error, so that small batches count as much as large ones.
    each_s, fixed_s = np.polyfit(sizes, took_s, 1, w=1 / took_s)
    if fixed_s < 0:
        fixed_s, each_s = 0.0, float(np.mean(took_s / sizes))
    return round(float(fixed_s), 12), round(max(0.0, float(each_s)) + decode_s, 12)


def remote_share(plan: Plan, exit_shares: Sequence[float]) -> float:
    """The share of a plan's requests that cross the link, of the shares that its exits answer."""
    if plan.kind == "device":
        return 0.0
    return 1.0 - sum(share for exit, share in zip(plan.exits, exit_shares, strict=True) if exit.side == "device")


class SideTimes(NamedTuple):
    """Seconds of segments, and of exits' classifiers, that the mean request takes of one machine."""

    segments_s: float
    classifiers_s: float


def segment_times(plan: Plan, side: Side, exit_shares: Sequence[float], seconds: Mapping[str, float]) -> SideTimes:
    """What one machine computes of the mean request that gets there, codecs left out.

    Args:
        plan: with or without exits.
        side: which machine.
        exit_shares: the share of all requests that each of the plan's exits answers.
        seconds: of each segment, by its file name.

    A head of 3 ms, an exit of 1 ms that answers half, a rest of 4 ms: 3 + 4 / 2 and 1.
    """
    first = plan.head if side == "device" else plan.tail
    if first is None:
        return SideTimes(0.0, 0.0)
    got_there = 1.0 if side == "device" else remote_share(plan, exit_shares)
    left, segments_s, classifiers_s = 1.0, seconds[first], 0.0
    for exit, share in zip(plan.exits, exit_shares, strict=True):
        if exit.side == side:
            classifiers_s += left * seconds[exit.classifier]
            left = max(0.0, left - (share / got_there if got_there > 0 else 0.0))
            segments_s += left * (0.0 if exit.rest is None else seconds[exit.rest])
    return SideTimes(segments_s, classifiers_s)


class Course(NamedTuple):
    """One course that a request of a plan can take: to an exit (its place in the plan), or to the end (None)."""

    exit: int | None
    share: float
    work: Work


def courses_of(candidate: Candidate, seconds: Mapping[str, float]) -> tuple[Course, ...]:
    """The courses that requests take, each with its share and what it costs alone; one of a plan without exits.

    Their prices, weighted by the shares, are the plan's own.

    Args:
        candidate: a plan with its evidence.
        seconds: of each of its segments, by file name; a plan without exits needs none.
    """
    plan, evidence = candidate.plan, candidate.evidence
    if not plan.exits:
        return (Course(None, 1.0, row_of(work_of([candidate]), 0)),)
    found = []
    shares = (*evidence.exit_shares, max(0.0, 1.0 - sum(evidence.exit_shares)))
    for place, share in enumerate(shares):
        alone = tuple(float(place == other) for other in range(len(plan.exits)))
        here, there = (segment_times(plan, side, alone, seconds) for side in SIDES)
        only = msgspec.structs.replace(
            evidence,
            exit_shares=alone,
            head_s=here.segments_s,
            exit_s=here.classifiers_s,
            tail_s=there.segments_s + there.classifiers_s,
        )
        work = row_of(work_of([Candidate(plan=plan, evidence=only)]), 0)
        found.append(Course(place if place < len(plan.exits) else None, share, work))
    return tuple(found)


def row_of(work: Work, index: int) -> Work:
    """One row of a table of amounts, as scalars."""
    columns: list[Any] = [None if column is None else np.asarray(column)[index] for column in work]
    return Work(*columns)


def stages(work: Work, *, is_typical: bool = False) -> tuple[Stage, ...]:
    """The stages of a plan in order; a stage that a plan does not have costs nothing.

    With `is_typical` the payload is the median one, else the mean.
    """
    payload_bytes = work.payload_bytes
    if is_typical and work.typical_bytes is not None:
        payload_bytes = work.typical_bytes
    share = work.remote_share
    up = np.where(np.asarray(share) > 0, wire_bytes(payload_bytes, masked=True), 0.0)
    down = np.where(np.asarray(share) > 0, wire_bytes(work.reply_bytes, masked=False), 0.0)
    return (
        Stage("head", "device", work.head_s, 0.0, work.is_int8),
        Stage("exit", "device", work.exit_s, 0.0, False),
        Stage("encode", "device", work.encode_s, 0.0, False, share),
        Stage("send", "uplink", 0.0, up, False, share),
        Stage("decode", "edge", work.decode_s, 0.0, False, share),
        Stage("tail", "edge", work.tail_s, 0.0, work.is_int8, share),
        Stage("reply", "downlink", 0.0, down, False, share),
    )


def cost(stage: Stage, conditions: Conditions) -> Cost:
    """What one stage costs under these conditions."""
    link = conditions.link
    if stage.resource == "device":
        factor = np.where(stage.is_int8, conditions.device.int8, conditions.device.fp32)
        return Cost(stage.work_s * factor, 0.0)
    if stage.resource == "edge":
        return Cost(stage.work_s * conditions.edge_load, 0.0)
    rate_bps = link.rate_bps
    if stage.resource == "downlink" and link.down_rate_bps is not None:
        rate_bps = link.down_rate_bps
    crosses = np.asarray(stage.num_bytes) > 0
    return Cost(np.asarray(stage.num_bytes) * 8.0 / rate_bps, np.where(crosses, link.delay_s, 0.0))


class Price(NamedTuple):
    """Latency of a typical request (a mean over exits), period of a stream, busy seconds, device energy; per plan.

    `wait_s` is what of the latency is waiting for others; `period_s` is what one device must leave between its
    requests, so that all devices' are served.
    """

    latency_s: NDArray[np.float64]
    period_s: NDArray[np.float64]
    busy_s: dict[Resource, NDArray[np.float64]]
    energy_j: NDArray[np.float64]
    wait_s: NDArray[np.float64]


def price(work: Work, conditions: Conditions) -> Price:
    """The whole price of one plan or of every row of a table, arrays of the table's length (or 0-d).

    Energy is the device's: compute at `device_power_w`, sending at the radio's power and its tail; NaN where the
    conditions do not say both.  Where requests arrive on and on, latency has the mean wait for every resource
    (`waiting_s`), and is infinite where one cannot keep up.
    """
    shape = np.shape(work.head_s)
    latency_s = np.zeros(shape)
    busy_s: dict[Resource, NDArray[np.float64]] = {name: np.zeros(shape) for name in RESOURCES}
    for stage in stages(work, is_typical=True):
        stage_cost = cost(stage, conditions)
        latency_s = latency_s + stage.share * (stage_cost.busy_s + stage_cost.delay_s)
    for stage in stages(work):
        busy_s[stage.resource] = busy_s[stage.resource] + stage.share * cost(stage, conditions).busy_s
    latency_s = latency_s + work.remote_share * np.asarray(conditions.exchange_s)
    wait_s = waiting_s(work, busy_s, conditions)
    latency_s = latency_s + wait_s
    if conditions.max_batch > 1:
        busy_s["edge"] = _batched_s(work, busy_s["edge"], conditions)
    period_s = np.maximum.reduce([busy_s[name] * sharers(name, conditions) for name in RESOURCES])
    energy_j = np.zeros(shape) + device_energy_j(busy_s, work.remote_share, conditions)
    return Price(latency_s, period_s, busy_s, energy_j, wait_s)


def device_energy_j(busy_s: Mapping[Resource, Number], remote_share: Number, conditions: Conditions) -> Number:
    """The device's energy of a request that keeps resources busy for so long; NaN where a power is not known."""
    if conditions.device_power_w is None or conditions.radio is None:
        return math.nan
    sending_w = conditions.radio.power_w(conditions.link.rate_bps)
    own_j = busy_s["device"] * conditions.device_power_w + busy_s["uplink"] * sending_w
    return own_j + np.asarray(remote_share) * conditions.radio.tail_j


def sharers(resource: Resource, conditions: Conditions) -> float:
    """Devices for each server of a resource: the edge's workers serve all of them."""
    devices = 1 if conditions.arrivals is None else conditions.arrivals.devices
    return devices / conditions.edge_workers if resource == "edge" else 1.0


def _batched_s(work: Work, busy_s: NDArray[np.float64], conditions: Conditions) -> NDArray[np.float64]:
    """What a request takes of the edge when its batches are full; alone where batches were not measured."""
    full_s = np.asarray(work.batch_fixed_s) / conditions.max_batch + np.asarray(work.batch_each_s)
    batched_s = np.asarray(work.remote_share) * full_s * conditions.edge_load
    return np.where(np.isnan(batched_s), busy_s, np.minimum(batched_s, busy_s))


def waiting_s(
    work: Work, busy_s: Mapping[Resource, NDArray[np.float64]], conditions: Conditions
) -> NDArray[np.float64]:
    """What the mean request waits for others, at all resources together; infinite where one cannot keep up.

    Every resource is a queue of its own with a constant time of service, first come first served:

        one server, by chance      W = r s / (2 (1 - r))                     M/D/1, r = arrivals x s
        several servers            W = Erlang's C / (2 (c / s - arrivals))   M/D/c by half of M/M/c's wait
        batches                    Inoue's bound of the mean (2019, arXiv:1912.06322), for what waits taken together
        evenly, n devices          the edge: (n - 1) / n of it; a device's own resources: none

    Approximations: what leaves one queue is more even than chance, so later queues wait less than said; the devices'
    even arrivals at the edge are near chance where there are many; with exits a device's mean service time counts.
    """
    arrivals = conditions.arrivals
    total = np.zeros(np.shape(work.head_s))
    if arrivals is None:
        return total
    remote = np.asarray(work.remote_share, np.float64)
    for resource in RESOURCES:
        visits = np.ones_like(total) if resource == "device" else np.broadcast_to(remote, total.shape)
        with np.errstate(divide="ignore", invalid="ignore"):
            service_s = np.where(visits > 0, busy_s[resource] / visits, 0.0)
        is_shared = resource == "edge"
        devices = arrivals.devices if is_shared else 1
        uneven = 1.0 if arrivals.is_random else (devices - 1) / devices
        servers = conditions.edge_workers if is_shared else 1
        rate_hz = arrivals.rate_hz * devices * visits
        wait_s = _mean_wait_s(rate_hz, service_s, servers)
        if is_shared and conditions.max_batch > 1:
            wait_s = _batch_wait_s(rate_hz / servers, service_s, work, conditions, wait_s)
        # Even arrivals wait for nobody, as long as they are served, if only just; what does not come here waits for
        # nothing.
        is_just_served = (uneven == 0) & (rate_hz * service_s <= servers * (1 + 1e-9))
        is_served = np.isfinite(wait_s) | (visits == 0) | is_just_served
        mean_s = visits * uneven * np.where(np.isfinite(wait_s), wait_s, 0.0)
        total = total + np.where(is_served, mean_s, np.inf)
    return total


def _mean_wait_s(rate_hz: NDArray[np.float64], service_s: NDArray[np.float64], servers: int) -> NDArray[np.float64]:
    """Mean wait in a queue of Poisson arrivals and constant service; infinite from a load of 1 on."""
    load = rate_hz * service_s / servers
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if servers == 1:
            waits = load * service_s / (2 * (1 - load))
        else:
            offered = rate_hz * service_s
            terms = [offered**k / math.factorial(k) for k in range(servers)]
            last = offered**servers / math.factorial(servers) / (1 - load)
            waits = last / (np.sum(terms, axis=0) + last) * service_s / (2 * servers * (1 - load))
    return np.where(load < 1, np.where(service_s > 0, waits, 0.0), np.inf)


def _batch_wait_s(
    rate_hz: NDArray[np.float64],
    service_s: NDArray[np.float64],
    work: Work,
    conditions: Conditions,
    single_s: NDArray[np.float64],
) -> NDArray[np.float64]:
    """Mean time beyond its own service that a request spends where what waits is computed together.

    A batch of n takes t + n a.  The mean time there is at most the less of

        (a + t) / (2 (1 - r a)) (1 + 2 r t + (1 - r t) / (1 + r a))
        3 t / (2 (1 - r a)) + a (r a + 2) / (2 (1 - (r a)^2))

    (Inoue, 2019, theorem 2), and near it, for batches without a limit.  With one it is no less than the wait for single
    requests that take the part of a full batch each, which is what is left of it near saturation; infinite beyond.
    """
    fixed_s, each_s = (np.asarray(x) * conditions.edge_load for x in (work.batch_fixed_s, work.batch_each_s))
    load = rate_hz * each_s
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        low = (each_s + fixed_s) / (2 * (1 - load)) * (1 + 2 * rate_hz * fixed_s + (1 - rate_hz * fixed_s) / (1 + load))
        high = 1.5 * fixed_s / (1 - load) + each_s * (load + 2) / (2 * (1 - load**2))
    mean_s = np.minimum(low, high)
    # Where batches are mostly full, no more than `max_batch` leave at a time: as of single requests that take so long.
    full_s = fixed_s / conditions.max_batch + each_s
    full_wait_s = _mean_wait_s(rate_hz, full_s, 1)
    waits = np.where(np.isfinite(full_wait_s), np.maximum(mean_s - service_s, full_wait_s), np.inf)
    return np.where(np.isnan(fixed_s + each_s), single_s, waits)
