"""Machines, links, radios, and measured times: the conditions under which a plan is priced.

A `Profile` is what one machine measured of a bundle's segments and codecs.  A `Link` is rate,
delay and loss, constant or a trace.  `Conditions` is what `stages.cost` needs to price a stage:
the link, how slow the device is, how loaded the edge is.
"""

from __future__ import annotations

import math
from bisect import bisect_right

from .errors import PlanError
from .plan import Value


class Timing(Value, frozen=True, kw_only=True):
    """Seconds of one repeated call: median, 5th and 95th percentile, and how many repeats."""

    median_s: float
    p5_s: float
    p95_s: float
    repeats: int


class Machine(Value, frozen=True, kw_only=True):
    """Where something was measured: enough to judge the figure by."""

    name: str
    processor: str
    cores: int
    system: str
    python: str
    versions: dict[str, str]


class Profile(Value, frozen=True, kw_only=True):
    """Times of one machine, each as deployed (a session per segment, batch size 1).

    `segments` maps a segment's file name to its Timing; `codecs` maps `PLAN_NUMBER` (as text) to the
    pair (encode, decode).  `exchange_s` is the machine pair's fixed cost of one request over an
    unshaped link beyond those stages (framing, system calls, wake-ups), as measured on loopback.
    `batches` has, of segments of the edge, the seconds of a whole batch by its size.  `bundle` is the hash of the
    bundle that was timed, where it was timed as a whole.  `power_w` is what the machine
    took meanwhile by `power_sensor`; None: not measured.
    """

    machine: Machine
    threads: int
    date: str
    segments: dict[str, Timing]
    codecs: dict[str, tuple[Timing, Timing]]
    exchange_s: float = 0.0
    batches: dict[str, dict[int, float]] = {}
    engine: str = "onnxruntime"
    bundle: str | None = None
    power_w: float | None = None
    power_sensor: str | None = None


class Trace(Value, frozen=True, kw_only=True):
    """A recorded bandwidth series: piece k holds `rate_bps[k]` from `start_s[k]` to `start_s[k + 1]`.

    The series repeats after `duration_s`.  Starts are increasing from 0; rates are at least 0 (an
    outage is 0), and some rate is above 0.
    """

    name: str
    start_s: tuple[float, ...]
    rate_bps: tuple[float, ...]
    duration_s: float

    def __post_init__(self) -> None:
        starts = self.start_s
        if not starts or starts[0] != 0 or len(starts) != len(self.rate_bps):
            raise PlanError(f'a trace needs as many starts as rates, the first at 0 (trace "{self.name}")')
        if not all(a < b for a, b in zip(starts, (*starts[1:], self.duration_s), strict=True)):
            raise PlanError(f'starts must increase and end before the duration (trace "{self.name}")')
        if not all(0 <= rate < math.inf for rate in self.rate_bps) or max(self.rate_bps) == 0:
            raise PlanError(f'rates must be at least 0 and some above 0 (trace "{self.name}")')

    def at(self, time_s: float) -> float:
        """Bits per second at `time_s` seconds after the start of the (repeating) trace."""
        return self.rate_bps[bisect_right(self.start_s, time_s % self.duration_s) - 1]


class Link(Value, frozen=True, kw_only=True):
    """What lies between device and edge: rate and one-way delay; a trace overrides the uplink's rate.

    `down_rate_bps` None means the same as `rate_bps`.
    """

    rate_bps: float
    delay_s: float = 0.0
    down_rate_bps: float | None = None
    trace: Trace | None = None

    def __post_init__(self) -> None:
        if not self.rate_bps > 0 or (self.down_rate_bps is not None and not self.down_rate_bps > 0):
            raise PlanError(f"a link's rate must be above 0 bit/s, got {self.rate_bps} (link)")
        if not self.delay_s >= 0:
            raise PlanError(f"a link's delay must be at least 0 s, got {self.delay_s} (link)")


class Radio(Value, frozen=True, kw_only=True):
    """Power of sending, P = alpha x rate + beta, in W with alpha in W per bit/s (Huang et al., MobiSys 2012).

    `tail_j` is what a request costs beyond its sending where the radio stays awake for a while afterwards.
    """

    name: str
    alpha_w_per_bps: float
    beta_w: float
    tail_j: float = 0.0

    def __post_init__(self) -> None:
        if not (self.alpha_w_per_bps >= 0 and self.beta_w >= 0 and self.tail_j >= 0):
            raise PlanError(f'powers and the tail energy must be at least 0 (radio "{self.name}")')

    def power_w(self, rate_bps: float) -> float:
        """Watts while sending at `rate_bps`."""
        return self.alpha_w_per_bps * rate_bps + self.beta_w


# Power of sending, P = alpha x rate + beta: 3G, LTE and Wi-Fi of Huang et al., MobiSys 2012.
RADIOS = {
    "3g": Radio(name="3g", alpha_w_per_bps=868.98e-9, beta_w=0.81788),
    "4g": Radio(name="4g", alpha_w_per_bps=438.39e-9, beta_w=1.28804),
    "wifi": Radio(name="wifi", alpha_w_per_bps=283.17e-9, beta_w=0.13286),
}


class Slowdown(Value, frozen=True, kw_only=True):
    """How many times slower than the measuring machine: one factor for fp32 and all other work, one for int8.

    A slowed x86 core is not an ARM core: int8 gains more here than there, so int8 has a factor of its own.
    """

    fp32: float = 1.0
    int8: float = 1.0

    def __post_init__(self) -> None:
        if not (self.fp32 > 0 and self.int8 > 0):
            raise PlanError(f"a slowdown must be above 0, got fp32 {self.fp32}, int8 {self.int8}")


class Arrivals(Value, frozen=True, kw_only=True):
    """Requests that come on and on: `rate_hz` of each of `devices` devices, evenly, or by chance (`is_random`)."""

    rate_hz: float
    is_random: bool = False
    devices: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.rate_hz < math.inf or self.devices < 1:
            given = f"{self.rate_hz} a second of {self.devices}"
            raise PlanError(f"arrivals need a rate above 0 and at least one device, got {given}")


class Conditions(Value, frozen=True, kw_only=True):
    """Under what a plan is priced: link, device's slowdown, edge's load (a factor on the edge's times).

    `exchange_s` is the fixed cost of one request over the link (see Profile); `device_power_w` prices
    the device's computing, `radio` its sending.  With `arrivals` requests wait for each other (`stages.price`); the
    edge computes `edge_workers` batches of up to `max_batch` requests at a time.
    """

    link: Link
    device: Slowdown = Slowdown()
    edge_load: float = 1.0
    exchange_s: float = 0.0
    device_power_w: float | None = None
    radio: Radio | None = None
    arrivals: Arrivals | None = None
    edge_workers: int = 1
    max_batch: int = 1

    def __post_init__(self) -> None:
        if not self.edge_load > 0:
            raise PlanError(f"the edge's load must be above 0, got {self.edge_load}")
        if min(self.edge_workers, self.max_batch) < 1:
            given = f"{self.edge_workers} and {self.max_batch}"
            raise PlanError(f"an edge needs at least 1 worker and batches of 1 or more, got {given}")
