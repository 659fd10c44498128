"""Exits: how sure an answer is by hand, thresholds as if they had been run, choices as if all had been tried."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from coinfer.errors import Infeasible, PlanError
from coinfer.exits import ExitEvidence, certainty, choose, is_sure
from coinfer.plan import ExitRule

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5 - 1e-9, 1e-9]]))


def test_certainty_by_hand() -> None:
    assert certainty(LOGITS, "confidence") == pytest.approx([0.7, 1 / 3, 0.5], abs=1e-6)
    assert certainty(LOGITS, "margin") == pytest.approx([0.5, 0.0, 0.0], abs=1e-6)
    entropy = -(0.7 * np.log(0.7) + 0.2 * np.log(0.2) + 0.1 * np.log(0.1))
    by_hand = [1 - entropy / np.log(3), 0.0, 1 - np.log(2) / np.log(3)]
    assert certainty(LOGITS, "entropy") == pytest.approx(by_hand, abs=1e-6)
    # A temperature of 2 takes the square root of the odds.
    assert certainty(LOGITS, temperature=2.0)[0] == pytest.approx(0.7**0.5 / (0.7**0.5 + 0.2**0.5 + 0.1**0.5))
    # Logits of any size are no trouble.
    assert certainty(np.array([[1e4, 0.0]]))[0] == 1.0


def test_a_rule_answers_from_its_threshold_on() -> None:
    assert is_sure(LOGITS, ExitRule(threshold=0.5)).tolist() == [True, False, True]
    assert is_sure(LOGITS, ExitRule(threshold=0.0)).all() and not is_sure(LOGITS, ExitRule(threshold=1.5)).any()


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"threshold": -0.1}, "must be 0 .* to 1, above 1 never, got -0.1"),
        ({"threshold": float("nan")}, "got nan"),
        ({"threshold": 0.5, "rule": "hunch"}, 'one of confidence, margin, entropy, got "hunch"'),
        ({"threshold": 0.5, "temperature": 0.0}, "above 0, got 0.0"),
    ],
)
def test_a_rule_that_makes_no_sense_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ExitRule(**fields)


def evidence_of(seed: int, *, exits: int, count: int = 60, on_device: tuple[bool, ...] | None = None) -> ExitEvidence:
    """Surer exits are more often right, later ones more often than earlier ones."""
    rng = np.random.default_rng(seed)
    sure = rng.uniform(0, 1, (exits, count)).round(2)
    right = rng.uniform(0, 1, (exits, count)) < 0.3 + 0.5 * sure + 0.1 * np.arange(exits)[:, None]
    sent = rng.integers(50, 200, count).astype(float)
    return ExitEvidence(sure, right, rng.uniform(0, 1, count) < 0.9, sent, on_device or (True,) * exits)


def run_one_by_one(evidence: ExitEvidence, thresholds: tuple[float, ...]) -> tuple[float, list[float], float]:
    """As a device would: image after image, exit after exit."""
    count = len(evidence.is_right_at_end)
    right, counts, sent = 0, [0] * (evidence.num_exits + 1), 0.0
    for image in range(count):
        crossed = False
        for place in range(evidence.num_exits):
            crossed = crossed or not evidence.is_on_device[place]
            if evidence.certainty[place, image] >= thresholds[place]:
                right += evidence.is_right[place, image]
                counts[place] += 1
                break
        else:
            crossed = True
            right += evidence.is_right_at_end[image]
            counts[-1] += 1
        sent += evidence.payload_bytes[image] if crossed else 0.0
    return 100 * right / count, [n / count for n in counts], sent / count


@pytest.mark.parametrize("on_device", [(True, True), (True, False), (False, False)])
def test_looking_up_equals_running(on_device: tuple[bool, bool]) -> None:
    evidence = evidence_of(1, exits=2, on_device=on_device)
    for thresholds in product((0.0, 0.3, 0.77, 2.0), repeat=2):
        accuracy, shares, sent = run_one_by_one(evidence, thresholds)
        found = evidence.at(thresholds)
        assert found.accuracy == pytest.approx(accuracy) and found.mean_bytes == pytest.approx(sent)
        assert found.shares == pytest.approx(shares)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("exits", [1, 2])
def test_chosen_thresholds_are_the_best_that_keep_the_loss(seed: int, exits: int) -> None:
    evidence = evidence_of(seed, exits=exits, count=30)
    costs = (1.0, 4.0, 10.0)[: exits] + (10.0,) if exits == 1 else (1.0, 4.0, 10.0)
    least = evidence.accuracy_at_end - 5.0
    every = [sorted({*row.tolist(), 2.0}) for row in evidence.certainty]
    tried = [(evidence.at(t), t) for t in product(*every)]
    best = min(float(np.dot(o.shares, costs)) for o, _ in tried if o.accuracy >= least - 1e-9)
    chosen = choose(evidence, costs, max_loss=5.0)
    assert chosen.outcome == evidence.at(chosen.thresholds)
    assert chosen.outcome.accuracy >= least - 1e-9
    assert chosen.cost == pytest.approx(best)


@pytest.mark.parametrize("seed", range(4))
def test_of_more_exits_none_alone_can_be_set_better(seed: int) -> None:
    evidence = evidence_of(seed, exits=4, count=200, on_device=(True, True, False, False))
    costs = (1.0, 2.0, 6.0, 8.0, 10.0)
    chosen = choose(evidence, costs, max_loss=5.0)
    least = evidence.accuracy_at_end - 5.0
    assert chosen.outcome == evidence.at(chosen.thresholds) and chosen.outcome.accuracy >= least - 1e-9
    for place in range(4):
        two = evidence.of([place])
        alone = choose(two, (costs[place], 10.0), max_loss=5.0)
        assert chosen.cost <= alone.cost + 1e-9 or place > 1
        for level in np.linspace(0, 1, 21):
            moved = (*chosen.thresholds[:place], float(np.quantile(evidence.certainty[place], level)),
                     *chosen.thresholds[place + 1 :])  # fmt: skip
            outcome = evidence.at(moved)
            if outcome.accuracy >= least:
                # Quantiles of 48 levels lie between: not a level better than by a few images.
                assert float(np.dot(outcome.shares, costs)) >= chosen.cost - 0.5


def test_a_threshold_lies_between_the_images_that_it_tells_apart() -> None:
    evidence = evidence_of(5, exits=1, count=40)
    (threshold,) = choose(evidence, (1.0, 10.0), max_loss=10.0).thresholds
    assert threshold not in evidence.certainty[0]
    above, below = evidence.certainty[0] >= threshold, evidence.certainty[0] < threshold
    if above.any() and below.any():
        lowest, highest = evidence.certainty[0][above].min(), evidence.certainty[0][below].max()
        assert threshold == pytest.approx((lowest + highest) / 2)


def test_costs_may_be_of_several_resources_or_the_bytes_of_each_image() -> None:
    evidence = evidence_of(6, exits=2, count=60, on_device=(True, False))
    every = [sorted({*row.tolist(), 2.0}) for row in evidence.certainty]
    least = evidence.accuracy_at_end - 5.0
    allowed = [o for o in (evidence.at(t) for t in product(*every)) if o.accuracy >= least - 1e-9]
    rows = ((1.0, 1.0, 1.0), (0.0, 3.0, 3.0), (0.0, 1.0, 5.0))
    best = min(max(float(np.dot(o.shares, row)) for row in rows) for o in allowed)
    assert choose(evidence, rows, max_loss=5.0).cost == pytest.approx(best, abs=0.15)
    fewest = min(o.mean_bytes for o in allowed)
    found = choose(evidence, None, max_loss=5.0)
    assert found.cost == found.outcome.mean_bytes == pytest.approx(fewest, rel=0.1)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, 2.1, math.nan])
def test_thresholds_out_of_range_are_refused(threshold: float) -> None:
    with pytest.raises(PlanError, match="thresholds must be 0 to 1, or 2 for never, got"):
        evidence_of(1, exits=1).at((threshold,))


def test_what_is_no_number_is_refused() -> None:
    evidence = evidence_of(1, exits=1)
    for costs, loss in (((1.0, 2.0), math.nan), ((1.0, 2.0), math.inf), ((1.0, math.nan), 1.0)):
        with pytest.raises(PlanError, match="a number of points that may be lost, and costs"):
            choose(evidence, costs, max_loss=loss)


def test_no_loss_at_all_can_be_had_without_exits() -> None:
    evidence = evidence_of(3, exits=1)
    wrong = evidence._replace(is_right=np.zeros_like(evidence.is_right))
    chosen = choose(wrong, (1.0, 9.0), max_loss=0.0)
    # What the end gets wrong as well may still be answered early.
    assert chosen.outcome.accuracy == wrong.accuracy_at_end
    with pytest.raises(Infeasible, match=r"without any exit 10.00 are lost; relax the loss"):
        choose(wrong, (1.0, 9.0), max_loss=1.0, reference=wrong.accuracy_at_end + 10)
    with pytest.raises(PlanError, match="1 exits need 2 costs, got 3"):
        choose(wrong, (1.0, 2.0, 3.0), max_loss=1.0)
    with pytest.raises(PlanError, match="1 exits need as many thresholds, got 2"):
        wrong.at((0.5, 0.5))
