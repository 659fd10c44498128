from __future__ import annotations

import pytest

from coinfer.errors import PlanError
from coinfer.runtime import pace as pace_module
from coinfer.runtime.pace import AsFastAsItGoes, Loaded


class FakeTime:
    """A clock that moves only when somebody works or sleeps."""

    def __init__(self) -> None:
        self.now_s = 10.0

    def perf_counter(self) -> float:
        return self.now_s

    def sleep(self, duration_s: float) -> None:
        self.now_s += max(duration_s, 1e-6)

    def work(self) -> str:
        self.now_s += 0.5
        return "done"


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    clock = FakeTime()
    monkeypatch.setattr(pace_module, "time", clock)
    return clock


def test_as_fast_as_it_goes_adds_nothing(clock: FakeTime) -> None:
    assert AsFastAsItGoes().run("int8", clock.work) == "done"
    assert clock.now_s == 10.5


def test_a_loaded_machine_takes_its_factor_times_as_long(clock: FakeTime) -> None:
    assert Loaded(3.0).run("fp32", clock.work) == "done"
    assert 11.5 <= clock.now_s < 11.5 + 2e-6


def test_a_load_of_one_adds_nothing(clock: FakeTime) -> None:
    Loaded(1.0).run("fp32", clock.work)
    assert clock.now_s == 10.5


@pytest.mark.parametrize("load", [0.5, 0.0, -1.0, float("nan")])
def test_no_load_makes_a_machine_faster(load: float) -> None:
    with pytest.raises(PlanError, match=f"an emulated load must be at least 1, got {load}"):
        Loaded(load)
