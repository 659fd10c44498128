"""Which drafts are dropped: exact small cases of the dominance rule, and the losses' intervals."""

import math

import msgspec
import numpy as np
import pytest

from coinfer.build.drafts import Draft, restores_same
from coinfer.build.evaluate import loss_of, proportion_ci
from coinfer.build.rounds import TIME_SLACK, Answers, drop_dominated, drop_hopeless, drop_outdone, keep_rivals
from coinfer.plan import CodecSpec, Plan, TensorSpec

CROSSING = (TensorSpec(name="x", shape=(8,)),)


def split(
    number: int, *, num_bytes: float, head_s: float, tail_s: float = 1.0, right: str = "", precision: str = "fp32"
) -> Draft:
    codec = CodecSpec(transform="uniform", bits=4, coder="range")
    plan = Plan(
        number=number, kind="split", variant="net", precision=precision, cut="c#0", codec=codec,  # type: ignore[arg-type]
        crossing=CROSSING, head="h", tail="t",
    )  # fmt: skip
    correct = np.array([c == "1" for c in right])
    sizes = {"payload_bytes": num_bytes, "head_s": head_s, "tail_s": tail_s}
    return Draft(plan, ("split", str(number)), **sizes, correct=correct)


def device(number: int, *, head_s: float) -> Draft:
    plan = Plan(number=number, kind="device", variant="net", head="h")
    return Draft(plan, ("device", str(number)), head_s=head_s)


def upload(number: int, *, num_bytes: float, encode_s: float) -> Draft:
    codec = CodecSpec(transform="image", coder="png")
    plan = Plan(number=number, kind="upload", variant="net", codec=codec, crossing=CROSSING, tail="t")
    return Draft(plan, ("upload", "exact"), payload_bytes=num_bytes, encode_s=encode_s, tail_s=1.0, is_exact=True)


def dropped(drafts: list[Draft]) -> list[int]:
    return [d.plan.number for d in drafts if d.dropped is not None]


def test_before_any_image_only_exact_drafts_beat_others() -> None:
    drafts = [
        upload(0, num_bytes=100, encode_s=0.1),
        split(1, num_bytes=200, head_s=0.5),
        split(2, num_bytes=50, head_s=0.5),
        split(3, num_bytes=60, head_s=0.6),
    ]
    assert drop_dominated(drafts, 0, 1.0) == 1
    assert dropped(drafts) == [1]
    assert "plan 0" in str(drafts[1].dropped)


def test_equal_answers_for_fewer_bytes_beat_and_better_answers_survive() -> None:
    cheap = split(0, num_bytes=10, head_s=0.5, right="1101" * 50)
    same = split(1, num_bytes=20, head_s=0.5, right="1101" * 50)
    better = split(2, num_bytes=30, head_s=0.5, right="1111" * 50)
    drafts = [cheap, same, better]
    assert drop_dominated(drafts, 200, 1.0) == 1
    assert dropped(drafts) == [1]


def test_what_breaks_the_limit_beats_nothing_that_keeps_it() -> None:
    reference = np.ones(2000, dtype=bool)
    exact = split(0, num_bytes=20, head_s=0.5, right="1" * 2000)
    near = split(1, num_bytes=10, head_s=0.5, right="1" * 1998 + "00")
    assert drop_dominated([exact, near], 2000, 1.0, reference=reference, max_loss_points=0.0) == 0
    assert drop_dominated([exact, near], 2000, 1.0, reference=reference, max_loss_points=0.5) == 1
    assert dropped([exact, near]) == [0]


def test_for_a_stream_less_work_for_the_edge_survives() -> None:
    def drafts() -> list[Draft]:
        early = upload(0, num_bytes=10, encode_s=0.02)
        return [early, split(1, num_bytes=20, head_s=0.5, tail_s=0.5)]

    assert drop_dominated(drafts(), 0, 1.0) == 1
    assert drop_dominated(drafts(), 0, 1.0, is_stream=True) == 0


def test_less_device_time_survives_and_int8_is_priced_at_its_ratio() -> None:
    slow = split(0, num_bytes=10, head_s=1.0, right="1" * 100)
    fast = split(1, num_bytes=20, head_s=0.4, right="1" * 100, precision="int8")
    assert drop_dominated([slow, fast], 100, 2.0) == 0
    assert drop_dominated([slow, fast], 100, 4.0) == 1


def test_the_fastest_split_of_the_unmodified_network_stays_beside_that_of_all() -> None:
    mine, slower = split(1, num_bytes=900, head_s=0.02), split(2, num_bytes=900, head_s=0.03)
    pruned = split(3, num_bytes=90, head_s=0.001, tail_s=0.1)
    pruned.plan = msgspec.structs.replace(pruned.plan, variant="net.pruned")
    keep_rivals([mine, slower, pruned], 1.0, "net")
    assert [draft.is_rival for draft in (mine, slower, pruned)] == [True, False, True]


def test_hopeless_is_beyond_the_bound() -> None:
    reference = np.ones(100, dtype=bool)
    near = split(0, num_bytes=10, head_s=1.0, right="1" * 95 + "0" * 5)
    far = split(1, num_bytes=10, head_s=1.0, right="1" * 50 + "0" * 50)
    drafts = [near, far]
    assert drop_hopeless(drafts, reference, 1.0) == 1
    assert dropped(drafts) == [1]


@pytest.mark.parametrize(("upload_right", "expected"), [("1" * 100, [2, 3]), ("1" * 95 + "0" * 5, [3])])
def test_a_mixture_of_keepers_outdoes_what_lies_above_it(upload_right: str, expected: list[int]) -> None:
    picture = upload(0, num_bytes=100, encode_s=0.0)
    picture.correct = np.array([c == "1" for c in upload_right])
    whole = device(1, head_s=1.0)
    whole.correct = np.ones(100, dtype=bool)
    drafts = [
        picture,
        whole,
        split(2, num_bytes=55, head_s=0.5, tail_s=0.5),  # the mixture at its device time sends 50
        split(3, num_bytes=10, head_s=1.1, tail_s=0.0),  # the device alone takes less
        split(4, num_bytes=45, head_s=0.5, tail_s=0.5),
    ]
    answers = Answers(np.zeros(100, dtype=np.int64), np.ones(100, dtype=bool), {})
    assert drop_outdone(drafts, answers, 1.0, 1.0) == len(expected)
    assert dropped(drafts) == expected


def test_a_mixture_is_never_slower_than_what_it_outdoes() -> None:
    rng = np.random.default_rng(0)
    wholes: list[Draft] = []
    for number in range(6):
        cost = rng.uniform(0, 1, 2)
        made = upload(number, num_bytes=cost[0], encode_s=cost[1])
        made.correct = np.ones(10, dtype=bool)
        wholes.append(made)
    splits = [split(6 + n, num_bytes=rng.uniform(), head_s=rng.uniform(), tail_s=rng.uniform(0, 2)) for n in range(80)]
    answers = Answers(np.zeros(10, dtype=np.int64), np.ones(10, dtype=bool), {})
    assert 0 < drop_outdone([*wholes, *splits], answers, 1.0, 1.0) < 80

    def latency(draft: Draft, slowdown: float, per_byte: float) -> float:
        device_s = draft.head_s + draft.encode_s
        return slowdown * device_s + per_byte * draft.payload_bytes + draft.decode_s + draft.tail_s

    for slowdown in (1.0, 3.0, 30.0):
        for per_byte in (0.0, 0.1, 1.0, 10.0):
            best = min(latency(w, slowdown, per_byte) for w in wholes)
            for made in (s for s in splits if s.dropped is not None):
                assert latency(made, slowdown, per_byte) * TIME_SLACK >= best - 1e-9


def test_loss_is_of_paired_differences() -> None:
    reference = np.array([True] * 90 + [False] * 10)
    correct = np.array([True] * 88 + [False] * 11 + [True])
    loss, half = loss_of(reference, correct)
    assert loss == pytest.approx(1.0)
    assert half == pytest.approx(196 * math.sqrt(0.03 - 0.01**2) / 10)


def test_wilson_half_width() -> None:
    # 90 of 100: the Wilson interval is [82.56, 94.48] (Newcombe 1998's method 3).
    assert proportion_ci(np.array([True] * 90 + [False] * 10)) == pytest.approx((94.477 - 82.563) / 2, abs=0.01)


def uniform(bits: int, coder: str) -> CodecSpec:
    return CodecSpec(transform="uniform", bits=bits, coder=coder)  # type: ignore[arg-type]


def image(coder: str, quality: int | None = None) -> CodecSpec:
    return CodecSpec(transform="image", coder=coder, quality=quality)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (uniform(4, "range"), uniform(4, "zstd"), True),
        (uniform(4, "range"), uniform(3, "range"), False),
        (image("png"), image("webp-lossless"), True),
        (image("jpeg", 90), image("jpeg-bare", 90), True),
        (image("jpeg", 90), image("webp", 90), False),
    ],
)
def test_groups_are_codecs_that_restore_the_same(one: CodecSpec, other: CodecSpec, same: bool) -> None:
    assert (restores_same(one) == restores_same(other)) is same
