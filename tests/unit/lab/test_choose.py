"""Who is measured, and on which pictures."""

from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.bundle import Bundle
from coinfer.errors import BundleError, Infeasible, PlanError
from coinfer.lab.choose import calibrated, fixed_plans, menu_candidates, pick_images, pick_plans
from coinfer.lab.worker import Request
from coinfer.plan import Candidate, Evidence
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.search.goal import Goal
from coinfer.search.solve import search
from tiny_bundle import DEVICE, EXIT_PLAN, MENU, SECONDS, SPLIT16, SPLIT32, SPLIT_TWO, UPLOAD, make_tiny_bundle

CONDITIONS = Conditions(link=Link(rate_bps=1e6, delay_s=0.005))


def evidence(**changes: object) -> Evidence:
    base = Evidence(
        split="validation",
        num_images=100,
        accuracy=0.9,
        accuracy_ci=0.01,
        loss_points=0.5,
        loss_ci_points=0.1,
        payload_bytes=100.0,
        payload_bytes_p95=120.0,
        reply_bytes=20.0,
        head_s=0.001,
        encode_s=0.0001,
        decode_s=0.0001,
        tail_s=0.001,
    )
    return msgspec.structs.replace(base, **changes)


def candidates(losses: dict[int, float] | None = None) -> list[Candidate]:
    """The tiny menu; plan k has payloads of 100 (k + 1) B and the loss given, else half a point."""
    return [
        Candidate(
            plan=plan,
            evidence=evidence(
                payload_bytes=0.0 if plan.kind == "device" else 100.0 * (plan.number + 1),
                loss_points=(losses or {}).get(plan.number, 0.5),
                head_s=1.0 if plan.kind == "device" else 0.001,
            ),
        )
        for plan in MENU
    ]


def test_the_first_of_the_ranking_is_chosen_and_every_kind_has_its_best() -> None:
    menu = candidates()
    picks = pick_plans(each=1, random=1, seed=3)(menu, CONDITIONS, Goal())
    best = menu[search(menu, CONDITIONS, Goal()).best].plan.number
    assert best == UPLOAD
    assert picks[UPLOAD] == ("chosen", "best upload", "upload 1")
    assert picks[SPLIT32] == ("best split", "split 1")
    assert picks[DEVICE] == ("best device", "device 1")
    assert [roles for roles in picks.values() if roles == ("random",)] == [("random",)]
    assert len(picks) == 4
    assert list(picks)[0] == UPLOAD


def test_a_network_has_its_best_split_measured_whatever_is_chosen() -> None:
    menu = candidates()
    mine = next(candidate for candidate in menu if candidate.plan.number == SPLIT32)
    other = msgspec.structs.replace(mine, plan=msgspec.structs.replace(mine.plan, number=98, variant="other"))
    slower = msgspec.structs.replace(mine.evidence, head_s=0.1)
    worse = msgspec.structs.replace(other, plan=msgspec.structs.replace(other.plan, number=99), evidence=slower)
    slow = msgspec.structs.replace(other, evidence=msgspec.structs.replace(mine.evidence, head_s=0.05))
    picks = pick_plans(each=1, random=0, networks=["other", "unknown"])([*menu, slow, worse], CONDITIONS, Goal())
    assert picks[98] == ("best split of other",) and 99 not in picks


def test_the_same_seed_draws_the_same_plans_and_none_twice() -> None:
    picks = [pick_plans(each=1, random=9, seed=3)(candidates(), CONDITIONS, Goal()) for _ in range(2)]
    assert picks[0] == picks[1]
    assert sorted(picks[0]) == [plan.number for plan in MENU]


def test_who_loses_too_much_is_never_measured() -> None:
    picks = pick_plans(random=99)(candidates({UPLOAD: 1.5}), CONDITIONS, Goal(max_loss_points=1.0))
    assert UPLOAD not in picks
    with pytest.raises(Infeasible):
        pick_plans()(candidates(dict.fromkeys(range(7), 5.0)), CONDITIONS, Goal())


def test_named_plans_keep_their_order_and_learn_whether_they_are_a_best() -> None:
    picks = fixed_plans(SPLIT_TWO, SPLIT32)(candidates(), CONDITIONS, Goal())
    assert picks == {SPLIT_TWO: ("chosen",), SPLIT32: ("named", "best split")}
    with pytest.raises(PlanError, match="99"):
        fixed_plans(SPLIT16, 99)(candidates(), CONDITIONS, Goal())
    with pytest.raises(PlanError, match="at least one"):
        fixed_plans()


def test_pictures_are_spread_evenly_over_how_well_they_compress() -> None:
    chance = np.random.default_rng(0)
    # Picture k has k noisy pixels of 100: the further, the larger when compressed.
    pixels = np.zeros((100, 10, 10, 3), np.uint8)
    for k in range(100):
        pixels[k].reshape(100, 3)[:k] = chance.integers(0, 256, (k, 3))
    rows = pick_images(pixels, 10, seed=1)
    assert len(set(rows)) == 10
    assert [row // 10 for row in sorted(rows)] == list(range(10))
    assert rows == pick_images(pixels, 10, seed=1) != pick_images(pixels, 10, seed=2)


def test_few_pictures_come_again() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), dtype=np.uint8)
    rows = pick_images(pixels, 7)
    assert sorted(rows[:3]) == [0, 1, 2] and rows[3:6] == rows[:3] and len(rows) == 7


def test_calibrated_times_are_medians_without_the_factors() -> None:
    candidate = candidates()[SPLIT32]
    requests = [
        Request(plan=SPLIT32, image=0, answered="edge", head_s=h, encode_s=0.25, finish_s=0.5, decode_s=0.5, tail_s=1.5)
        for h in (2.0, 4.0, 1000.0)
    ]
    failed = Request(plan=SPLIT32, image=0, answered="failed", error="no")
    new = calibrated(candidate, [*requests, failed], Slowdown(fp32=4, int8=8), 2.0).evidence
    assert (new.head_s, new.encode_s, new.decode_s, new.tail_s) == (1.0, 0.1875, 0.25, 0.75)
    assert new.payload_bytes == candidate.evidence.payload_bytes
    int8 = msgspec.structs.replace(candidate, plan=msgspec.structs.replace(candidate.plan, precision="int8"))
    assert calibrated(int8, requests, Slowdown(fp32=4, int8=8), 2.0).evidence.head_s == 0.5
    assert calibrated(candidate, [failed], Slowdown(fp32=4, int8=8), 2.0) is candidate


def test_a_few_requests_of_a_plan_with_exits_speak_for_all_courses() -> None:
    """Everything takes twice as long as expected, and three of four end at the exit that half end at: shares stay."""
    candidate = Candidate(plan=EXIT_PLAN, evidence=evidence(exit_shares=(0.5, 0.25)))
    at_exit = Request(plan=1, image=0, answered="exit", exit=0, head_s=2 * 3 * 10, exit_s=2 * 1 * 10)
    through = Request(
        plan=1, image=0, answered="edge", head_s=2 * 7 * 10, exit_s=2 * 1 * 10, encode_s=5.0, finish_s=5.0,
        decode_s=3.0, tail_s=2 * 10.5 * 3,
    )  # fmt: skip
    new = calibrated(candidate, [at_exit] * 3 + [through], Slowdown(fp32=10, int8=20), 3.0, SECONDS).evidence
    assert new.head_s == pytest.approx(2 * (3 + 4 / 2)) and new.exit_s == pytest.approx(2 * 1)
    assert new.tail_s == pytest.approx(2 * (2.5 + 8 / 2))
    assert (new.encode_s, new.decode_s) == (1.0, 1.0)
    # Where none came to the edge, its times are as expected.
    none = calibrated(candidate, [at_exit], Slowdown(fp32=10, int8=20), 3.0, SECONDS).evidence
    assert none.tail_s == pytest.approx(2.5 + 8 / 2) and none.encode_s == candidate.evidence.encode_s


def test_a_menu_without_evidence_is_refused(
    tiny_bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BundleError, match="evidence.json"):
        menu_candidates(make_tiny_bundle(tmp_path / "unknown"))
    monkeypatch.setattr(Bundle, "candidates", lambda self: candidates()[1:])
    with pytest.raises(PlanError, match="no evidence for plans 0"):
        menu_candidates(tiny_bundle)
    monkeypatch.setattr(Bundle, "candidates", lambda self: list(reversed(candidates())))
    assert [candidate.plan for candidate in menu_candidates(tiny_bundle)] == list(tiny_bundle.manifest.menu)
