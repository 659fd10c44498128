"""Transfers along a trace against a walk through its pieces, and arrivals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from coinfer.errors import PlanError
from coinfer.profile import Link, Trace
from coinfer.simulate.arrivals import periodic, poisson, recorded
from coinfer.simulate.transfer import Transfer

TRACE = Trace(name="t", start_s=(0.0, 1.0, 3.0), rate_bps=(8e3, 0.0, 16e3), duration_s=4.0)


def walk(trace: Trace, start_s: float, num_bytes: float, offset_s: float = 0.0) -> float:
    """Piece by piece, as slowly as one likes."""
    left, now = 8 * num_bytes, start_s + offset_s
    edges = [*trace.start_s[1:], trace.duration_s]
    while left > 0:
        rounds, within = divmod(now, trace.duration_s)
        piece = next(k for k, edge in enumerate(edges) if within < edge)
        rate, end = trace.rate_bps[piece], rounds * trace.duration_s + edges[piece]
        if rate and left <= rate * (end - now) * (1 + 1e-12):
            return now + left / rate - offset_s
        left -= rate * (end - now)
        now = end
    return start_s


@pytest.mark.parametrize(
    ("start_s", "num_bytes", "end_s"),
    [(0, 500, 0.5), (0.5, 500, 1.0), (0.5, 501, 3.0005), (1.5, 1000, 3.5), (3.5, 1500, 4.5), (0, 6000, 8.0), (2, 0, 2)],
)
def test_by_hand(start_s: float, num_bytes: float, end_s: float) -> None:
    transfer = Transfer(Link(rate_bps=1.0, trace=TRACE), is_uplink=True)
    assert float(transfer.end_s(start_s, num_bytes)) == pytest.approx(end_s)


@settings(deadline=None, max_examples=200)
@given(
    rates=st.lists(st.sampled_from([0.0, 1e3, 5e3, 2e4]), min_size=1, max_size=6).filter(any),
    start_s=st.floats(0, 50), num_bytes=st.floats(1, 1e5), offset_s=st.floats(0, 10),
)  # fmt: skip
def test_along_any_trace(rates: list[float], start_s: float, num_bytes: float, offset_s: float) -> None:
    trace = Trace(name="t", start_s=tuple(map(float, range(len(rates)))), rate_bps=tuple(rates), duration_s=len(rates))
    transfer = Transfer(Link(rate_bps=1.0, trace=trace), is_uplink=True, offset_s=offset_s)
    got = float(transfer.end_s(start_s, num_bytes))
    want = walk(trace, start_s, num_bytes, offset_s)
    # A transfer that ends where an outage begins may round to either end of it; what it carried is the same.
    carried = abs(float(transfer.end_s(start_s, num_bytes * (1 + 1e-9))) - want) < 1e-4 * max(1.0, want)
    assert got == pytest.approx(want, rel=1e-6, abs=1e-6) or carried


def test_many_at_once_are_as_one_by_one() -> None:
    rng = np.random.default_rng(0)
    starts, sizes, offsets = rng.uniform(0, 9, 50), rng.uniform(1, 5000, 50), rng.uniform(0, 4, 50)
    link = Link(rate_bps=1.0, trace=TRACE)
    together = Transfer(link, is_uplink=True, offset_s=offsets).end_s(starts, sizes)
    rows = zip(starts, sizes, offsets, strict=True)
    alone = [float(Transfer(link, is_uplink=True, offset_s=o).end_s(s, n)) for s, n, o in rows]
    assert together.tolist() == pytest.approx(alone)


def test_a_constant_link_and_its_other_direction() -> None:
    link = Link(rate_bps=8e3, down_rate_bps=16e3, trace=TRACE)
    assert float(Transfer(link, is_uplink=False).end_s(1.5, 1000)) == 2.0
    assert float(Transfer(Link(rate_bps=8e3), is_uplink=True).end_s(1.5, 1000)) == 2.5


def test_arrivals() -> None:
    assert periodic(0.5, 3, start_s=1.0).tolist() == [1.0, 1.5, 2.0]
    times = poisson(10.0, 20_000, seed=1)
    assert np.diff(times).mean() == pytest.approx(0.1, rel=0.03) and times[0] > 0
    assert np.diff(times).std() == pytest.approx(0.1, rel=0.05)
    assert np.array_equal(times, poisson(10.0, 20_000, seed=1))
    assert recorded([0.0, 0.0, 2.5]).tolist() == [0.0, 0.0, 2.5]


@pytest.mark.parametrize(
    "call",
    [
        lambda: periodic(-1.0, 3), lambda: periodic(1.0, 0), lambda: poisson(0.0, 3), lambda: recorded([]),
        lambda: recorded([1.0, 0.5]), lambda: recorded([-1.0]), lambda: recorded([float("nan")]),
    ],
)  # fmt: skip
def test_arrivals_that_are_none_are_refused(call) -> None:
    with pytest.raises(PlanError, match="arrivals"):
        call()
