"""What a build spends on trainings: the order follows from gains, limits hold, a stopped build spends no twice."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest

from coinfer.build import spending
from coinfer.build.progress import quiet
from coinfer.build.spending import Gains, Ledger, Limits, Outcome, Task, scaled, spend
from coinfer.plan import Candidate, CodecSpec, Evidence, Plan
from coinfer.profile import Conditions, Link, Slowdown
from coinfer.search.goal import Goal

OWN = Conditions(link=Link(rate_bps=1e6, delay_s=0.005), device=Slowdown(fp32=10.0, int8=20.0))
GAINS = Gains(Goal(), OWN, int8_ratio=2.0)


def device(seconds: float, *, loss: float = 0.0) -> Candidate:
    evidence = Evidence(
        split="validation", num_images=0, accuracy=None, accuracy_ci=None, loss_points=loss, loss_ci_points=None,
        payload_bytes=0.0, payload_bytes_p95=0.0, reply_bytes=0.0,
        head_s=seconds, encode_s=0.0, decode_s=0.0, tail_s=0.0,
    )  # fmt: skip
    return Candidate(plan=Plan(number=0, kind="device", variant="net", head="net.onnx"), evidence=evidence)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(spending.time, "monotonic", lambda: now[0])
    return now


class Bench:
    """Tasks that take as long as they say and bring a device plan as fast as they promise."""

    def __init__(self, clock: list[float], path: Path) -> None:
        self.clock, self.path, self.ran = clock, path, list[str]()

    def task(
        self, name: str, brings_s: float, *, takes_s: float = 60.0, trainings: int = 1,
        real_s: float | None = None, following: Callable[[], list[Task]] = list,
    ) -> Task:  # fmt: skip
        def run() -> Outcome:
            self.ran.append(name)
            self.clock[0] += takes_s if real_s is None else real_s
            return Outcome([device(brings_s)], following())

        return Task(name, trainings, takes_s, lambda: [device(brings_s)], run)

    def spend(self, tasks: list[Task], limits: Limits, *, known_s: float = 1.0) -> list[str]:
        self.ran = []
        gains = None if limits == Limits() else GAINS
        return spend(tasks, limits, Ledger(self.path, "key"), [device(known_s)], gains, progress=quiet)


@pytest.fixture
def bench(clock: list[float], tmp_path: Path) -> Bench:
    return Bench(clock, tmp_path / "spent.json")


def test_a_gain_is_the_log_of_what_the_objective_falls_by() -> None:
    # Nothing crosses: the device's time alone, the same factor under all conditions.
    best = GAINS.best([device(1.0)])
    assert GAINS.of(best, [device(0.25)]) == pytest.approx(np.log(4))
    assert GAINS.of(best, [device(2.0)]) == 0.0
    assert GAINS.of(best, [device(0.25, loss=3.0)]) == 0.0
    assert GAINS.of(best, []) == 0.0
    assert GAINS.of(GAINS.best([]), [device(1.0)]) == pytest.approx(1.0)


def test_gains_in_bytes_and_losses_are_numbers_where_the_best_is_none_at_all() -> None:
    # The device alone sends nothing; a loss may be below 0.
    raw = CodecSpec(transform="raw", coder="none")
    upload = Candidate(
        plan=Plan(number=1, kind="upload", variant="net", tail="net.onnx", codec=raw),
        evidence=msgspec.structs.replace(device(1.0).evidence, payload_bytes=1000.0),
    )
    bytes_alone = Gains(Goal(minimise="bytes"), OWN, int8_ratio=2.0)
    assert bytes_alone.of(bytes_alone.best([device(1.0)]), [upload]) == 0.0
    gain = bytes_alone.of(bytes_alone.best([upload]), [device(1.0)])
    assert gain == pytest.approx(np.log(1 + float(bytes_alone.best([upload])[0])))
    accuracy = Gains(Goal(minimise="accuracy"), OWN, int8_ratio=2.0)
    assert accuracy.of(accuracy.best([device(1.0, loss=0.5)]), [device(2.0, loss=-0.25)]) == pytest.approx(0.75)
    assert accuracy.of(accuracy.best([]), [device(1.0, loss=-0.25)]) == pytest.approx(1.0)


def test_without_limits_all_run_in_turn_and_what_follows_comes_first(bench: Bench) -> None:
    first = bench.task("first", 5.0, following=lambda: [bench.task("then", 5.0)])
    notes = bench.spend([first, bench.task("second", 0.5)], Limits())
    assert bench.ran == ["first", "then", "second"]
    assert notes == ["3 trainings in 3.0 minutes"]


def test_trainings_go_where_the_most_is_gained(bench: Bench) -> None:
    tasks = [bench.task("little", 0.9), bench.task("much", 0.2), bench.task("none", 1.5), bench.task("less", 0.3)]
    notes = bench.spend(tasks, Limits(trainings=2))
    # With "much" done, neither "less" nor "little" would gain: they are left out though one more is allowed.
    assert bench.ran == ["much"]
    left_out = {note.rpartition(": ")[2] for note in notes if "no condition would gain" in note}
    assert left_out == {"little", "none", "less"}


def test_a_task_of_many_trainings_must_gain_so_much_more(bench: Bench) -> None:
    bench.spend([bench.task("grid", 0.5, trainings=4), bench.task("one", 0.8)], Limits(trainings=4))
    assert bench.ran == ["one"]


def test_minutes_are_kept_at_the_pace_that_tasks_have_shown(bench: Bench) -> None:
    def tasks(real_s: float) -> list[Task]:
        following = [bench.task("next", 0.2)]
        return [bench.task("first", 0.5, real_s=real_s, following=lambda: following)]

    bench.spend(tasks(60.0), Limits(seconds=180.0))
    assert bench.ran == ["first", "next"]
    bench.path.unlink()
    # Two times as long as expected, and so would be the next: 4 minutes in all.
    notes = bench.spend(tasks(120.0), Limits(seconds=180.0))
    assert bench.ran == ["first"] and "not trained, beyond the limit: next" in notes


def test_without_time_nothing_begins_whatever_it_takes(bench: Bench) -> None:
    notes = bench.spend([bench.task("free", 0.5, takes_s=0.0)], Limits(seconds=0.0))
    assert bench.ran == [] and not any("trainings" in note for note in notes)


def test_a_stopped_build_goes_on_with_what_it_had_begun(bench: Bench, clock: list[float]) -> None:
    def tasks(*, brings: float) -> list[Task]:
        return [bench.task("a", brings, following=lambda: [bench.task("b", 0.3)]), bench.task("c", 0.6)]

    def stopped() -> Outcome:
        clock[0] += 30.0
        raise KeyboardInterrupt

    first = tasks(brings=0.5)
    first[0].run = stopped
    with pytest.raises(KeyboardInterrupt):
        bench.spend(first, Limits(trainings=2))
    # What was begun comes first, though another promises more by now.
    bench.spend(tasks(brings=0.8), Limits(trainings=2))
    assert bench.ran == ["a", "b"]
    ledger = Ledger(bench.path, "key")
    assert [(entry.task, entry.trainings) for entry in ledger.entries] == [("a", 1), ("b", 1)]
    # With more allowed, what is new comes behind what was done.
    bench.spend(tasks(brings=0.8), Limits(trainings=3), known_s=100.0)
    assert bench.ran[:2] == ["a", "b"]
    assert Ledger(bench.path, "other").entries == []


def test_what_can_begin_without_a_task_begins_where_that_is_given_up(bench: Bench) -> None:
    def tasks(*, brings_s: float = 0.5) -> list[Task]:
        def series() -> list[Task]:
            return [bench.task("series", 0.4)]

        def next_share() -> list[Task]:
            share = bench.task("0.4", brings_s, takes_s=600.0, following=series)
            share.otherwise = series
            return [share]

        return [bench.task("0.7", 0.8, following=next_share)]

    notes = bench.spend(tasks(), Limits(seconds=180.0))
    assert bench.ran == ["0.7", "series"] and "not trained, beyond the limit: 0.4" in notes
    # A build that goes on finds both; with more allowed the share is made before, and nothing spent is forgotten.
    bench.spend(tasks(), Limits(seconds=300.0))
    assert bench.ran == ["0.7", "series"]
    bench.spend(tasks(), Limits(seconds=3000.0))
    assert bench.ran == ["0.7", "0.4", "series"]
    entries = Ledger(bench.path, "key").entries
    assert [(entry.task, entry.trainings, entry.seconds) for entry in entries] == [
        ("0.7", 1, 180.0), ("0.4", 1, 600.0), ("series", 1, 180.0),
    ]  # fmt: skip
    bench.path.unlink()
    notes = bench.spend(tasks(brings_s=2.0), Limits(seconds=3000.0))
    assert bench.ran == ["0.7", "series"] and "not trained, no condition would gain: 0.4" in notes


def test_time_is_noted_while_a_task_runs(bench: Bench, clock: list[float]) -> None:
    ledger = Ledger(bench.path, "key")
    show = ledger.ticking(quiet)
    show("nothing runs", 0, 1, "")
    ledger.begin(0, bench.task("a", 0.5))
    clock[0] += 7.0
    show("epoch", 1, 9, "")
    clock[0] += 1.0
    show("epoch", 2, 9, "")
    assert Ledger(bench.path, "key").seconds == 7.0
    ledger.tick(is_done=True)
    assert Ledger(bench.path, "key").seconds == 8.0


def test_candidates_of_a_smaller_network_are_in_proportion() -> None:
    (half,) = scaled([device(2.0, loss=3.0)], time=0.5, crossing=0.25)
    assert (half.evidence.head_s, half.evidence.loss_points) == (1.0, 0.0)
    sends = msgspec.structs.replace(device(0.0).evidence, payload_bytes=1000.0, encode_s=2.0, tail_s=4.0)
    plan = Plan(
        number=1, kind="upload", variant="net", tail="net.onnx", codec=CodecSpec(transform="raw", coder="none")
    )
    upload = Candidate(plan=plan, evidence=sends)
    (still,) = scaled([upload], time=0.5, crossing=0.25)
    assert (still.evidence.payload_bytes, still.evidence.encode_s, still.evidence.tail_s) == (1000.0, 2.0, 2.0)
    assert scaled([device(2.0), upload], time=0.5, crossing=0.25, cuts=("here",)) == []
