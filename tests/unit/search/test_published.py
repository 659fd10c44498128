"""Published systems as restrictions of the search: each chooses among its own, and more choice is never worse."""

from __future__ import annotations

import msgspec
import pytest

from coinfer.plan import CodecSpec, TensorSpec
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.search import Goal, estimate
from coinfer.search.published import SYSTEMS, choices
from tiny_bundle import exit_at

FLOAT, RAW = CodecSpec(transform="float32"), CodecSpec(transform="image")
X, Y = TensorSpec(name="x", shape=(4, 8, 8)), TensorSpec(name="y", shape=(4, 8, 8))


@pytest.fixture
def candidates(make_candidate) -> list:
    def made(number: int, kind: str, *, codec=None, crossing=(X,), exits=(), shares=(), variant="net", **options):
        candidate = make_candidate(number, kind, **options)
        plan = msgspec.structs.replace(
            candidate.plan, variant=variant, exits=exits, crossing=crossing,
            **({} if codec is None else {"codec": codec}),
        )  # fmt: skip
        evidence = msgspec.structs.replace(candidate.evidence, exit_shares=shares)
        return msgspec.structs.replace(candidate, plan=plan, evidence=evidence)

    early = (exit_at("device", "early#0", "b", 0.5),)
    return [
        made(0, "device", head_s=0.02),
        made(1, "upload", codec=RAW, payload_bytes=3000, tail_s=0.002),
        made(2, "split", codec=FLOAT, payload_bytes=9000, head_s=0.004, loss_points=None, dropped="beaten"),
        made(3, "split", codec=FLOAT, crossing=(X, Y), payload_bytes=2000, head_s=0.002),
        made(4, "split", payload_bytes=400, head_s=0.004, loss_points=0.5),
        made(5, "split", codec=FLOAT, payload_bytes=9000, head_s=0.004, exits=early, shares=(0.9,), loss_points=0.3),
        made(6, "split", payload_bytes=100, head_s=0.001, variant="net.c8", loss_points=0.8),
        made(7, "device", head_s=0.009, precision="int8", loss_points=0.1),
    ]


def test_each_system_chooses_among_its_own(candidates: list) -> None:
    base = Conditions(link=Link(rate_bps=1e6, delay_s=0.001), device=Slowdown(fp32=10, int8=10))
    seen: dict[str, set[int]] = {name: set() for name in SYSTEMS}
    for rate_bps in (1e4, 1e5, 1e6, 1e7, 1e8, 1e9):
        for slow in (1.0, 10.0, 100.0):
            link = msgspec.structs.replace(base.link, rate_bps=rate_bps)
            conditions = msgspec.structs.replace(base, link=link, device=Slowdown(fp32=slow, int8=slow))
            found = choices(candidates, "net", conditions, Goal())
            took = {name: estimate(candidate, conditions).latency_s for name, candidate in found.items()}
            for name, candidate in found.items():
                seen[name].add(candidate.plan.number)
            # Whoever may choose from more is never slower.
            assert took["coinfer"] <= took["codes"] <= took["DADS"] <= took["Neurosurgeon"] + 1e-12
            assert took["coinfer"] <= took["Edgent"] <= took["Neurosurgeon"] + 1e-12
    assert seen["Neurosurgeon"] <= {0, 1, 2} and seen["Edgent"] <= {0, 1, 2, 5} and seen["DADS"] <= {0, 1, 2, 3}
    assert seen["codes"] <= {0, 1, 2, 3, 4, 7} and 6 in seen["coinfer"]
    assert 5 in seen["Edgent"] and 3 in seen["DADS"]


def test_what_loses_nothing_may_be_chosen_though_the_build_dropped_it(candidates: list) -> None:
    only = [candidates[2], candidates[0]]
    conditions = Conditions(link=Link(rate_bps=1e9), device=Slowdown(fp32=100, int8=100))
    assert choices(only, "net", conditions, Goal())["Neurosurgeon"].plan.number == 2
    assert choices(only[:1], "net", conditions, Goal(max_latency_s=1e-9)) == {}
