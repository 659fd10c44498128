"""Layers that must run on one machine, and accuracy as a goal."""

from __future__ import annotations

import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.profile import Conditions, Link
from coinfer.search import Goal, search
from coinfer.search.goal import pin_of

CUTS = ("conv1#0", "layer1.0.relu#0", "layer1.0.relu#1", "layer1.1#0", "layer2.0#0", "linear#0")
# As in a bundle of a network with branches: divisions of several values come last.
DIVISIONS = ("conv1#0 + layer1.0.relu#1", "layer2.0#0 + layer1.1#0")
SLOW = Conditions(link=Link(rate_bps=1e5))


@pytest.mark.parametrize(
    ("text", "allowed"),
    [
        ("layer1.*=device", CUTS[3:]),
        ("layer1.*=edge", CUTS[:1]),
        ("conv1=device", CUTS),
        ("linear=edge", CUTS[:-1]),
        ("*=device", CUTS[-1:]),
    ],
)
def test_a_pin_allows_the_cuts_behind_its_layers_or_before_them(text: str, allowed: tuple[str, ...]) -> None:
    assert pin_of(text, CUTS).cuts == allowed
    assert pin_of(text, CUTS + DIVISIONS).cuts == allowed


def test_pins_that_contradict_each_other_are_named() -> None:
    pins = (pin_of("layer1.*=edge", CUTS), pin_of("layer2.*=device", CUTS))
    with pytest.raises(PlanError, match=r"layer1\.\*=edge and layer2\.\*=device contradict each other"):
        Goal(pins=pins)
    Goal(pins=(pin_of("layer1.*=device", CUTS), pin_of("layer2.*=edge", CUTS)))
    Goal(pins=(pin_of("layer1.*=edge", CUTS), pin_of("conv1=edge", CUTS)))


@pytest.mark.parametrize("text", ["layer1.*", "layer1.*=cloud", "=device"])
def test_a_pin_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match="a pin must be PATTERN=device or PATTERN=edge"):
        pin_of(text, CUTS)
    with pytest.raises(PlanError, match='cut behind it fits the pin "layer9.*=edge"; cuts are such as conv1#0'):
        pin_of("layer9.*=edge", CUTS)


@pytest.fixture
def candidates(make_candidate) -> list:
    """Splits are named layer2#0 and layer3#0 by their numbers."""
    return [
        make_candidate(0, "device", head_s=0.05, loss_points=0.4),
        make_candidate(1, "upload", payload_bytes=1000, loss_points=0.0),
        make_candidate(2, "split", payload_bytes=30, loss_points=0.3),
        make_candidate(3, "split", payload_bytes=60, loss_points=0.2),
    ]


@pytest.mark.parametrize(
    ("text", "kept"),
    [("layer2=device", {0, 2, 3}), ("layer3=device", {0, 3}), ("layer3=edge", {1, 2}), ("layer2=edge", {1})],
)
def test_pinned_layers_rule_out_the_plans_that_run_them_elsewhere(candidates: list, text: str, kept: set[int]) -> None:
    pin = pin_of(text, ("layer2#0", "layer3#0"))
    ranking = search(candidates, SLOW, Goal(pins=(pin,)))
    assert {candidates[row.index].plan.number for row in ranking.rows if row.rejected is None} == kept
    assert {row.rejected for row in ranking.rows} <= {None, f"not {text}"}


def test_pins_that_contradict_other_limits_are_named(candidates: list) -> None:
    goal = Goal(pins=(pin_of("layer2=edge", ("layer2#0", "layer3#0")),), max_latency_s=0.02)
    with pytest.raises(Infeasible, match=r"relax (max_latency_s from 0.02 to|the pin layer2=edge)"):
        search(candidates, SLOW, goal)


def test_the_most_accurate_plan_within_a_deadline(candidates: list) -> None:
    assert candidates[search(candidates, SLOW, Goal(minimise="accuracy")).best].plan.number == 1
    hurried = search(candidates, SLOW, Goal(minimise="accuracy", max_latency_s=0.02))
    assert candidates[hurried.best].plan.number == 3
    assert "loses 0.20 points and answers in" in hurried.reason
