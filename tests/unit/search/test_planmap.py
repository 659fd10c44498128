"""The map of plans: the same choices as a search at each of its points, and the nearest point in between."""

from __future__ import annotations

import itertools
from typing import Any

import msgspec
import pytest

from coinfer.errors import PlanError
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.search import Goal, search
from coinfer.search.planmap import PlanMap, loaded, plan_map

BASE = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10, int8=15))
AXES: dict[str, Any] = {"rates_bps": (1e4, 1e6, 1e8), "edge_loads": (1.0, 4.0), "device_loads": (1.0, 3.0)}


@pytest.fixture
def candidates(make_candidate) -> list:
    return [
        make_candidate(0, "device", head_s=0.05),
        make_candidate(1, "upload", payload_bytes=3000, tail_s=0.05),
        make_candidate(2, "split", payload_bytes=300, head_s=0.005, tail_s=0.045),
        make_candidate(3, "split", payload_bytes=30, head_s=0.02, tail_s=0.03, loss_points=5.0),
    ]


def test_each_point_is_what_a_search_chooses(candidates: list) -> None:
    made = plan_map(candidates, Goal(), BASE, **AXES)
    seen = set()
    for rate_bps, edge_load, device_load in itertools.product(*AXES.values()):
        ranking = search(candidates, loaded(BASE, rate_bps, edge_load, device_load), Goal())
        want = candidates[ranking.best].plan.number
        assert made.at(rate_bps, edge_load=edge_load, device_load=device_load) == want
        seen.add(want)
    assert len(seen) >= 3


def test_between_points_the_nearest_by_ratio_counts() -> None:
    fields = {"goal": Goal(), "base": BASE, "edge_loads": (1.0,), "device_loads": (1.0,)}
    made = PlanMap(**fields, rates_bps=(1.0, 100.0), plans=(7, -1))
    assert [made.at(rate) for rate in (0.001, 1, 9.9)] == [7, 7, 7]
    assert [made.at(rate) for rate in (10.1, 100, 1e9)] == [None] * 3
    with pytest.raises(PlanError, match="above 0, got 0"):
        made.at(0)


def test_a_map_is_plain_data(candidates: list) -> None:
    made = plan_map(candidates, Goal(), BASE, **AXES)
    assert msgspec.json.decode(msgspec.json.encode(made), type=PlanMap) == made
    with pytest.raises(PlanError, match="has as many plans, got 11"):
        msgspec.structs.replace(made, plans=made.plans[:-1])
    with pytest.raises(PlanError, match="rates_bps must be numbers above 0 that rise"):
        msgspec.structs.replace(made, rates_bps=(1.0, 1.0, 2.0))


def test_where_nothing_meets_the_goal_there_is_no_plan(candidates: list) -> None:
    made = plan_map(candidates, Goal(max_latency_s=1e-9), BASE, **AXES)
    assert made.at(1e6) is None
