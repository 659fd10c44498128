"""Timing by a clock that the test turns itself."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
import pytest

from coinfer.engine import describe_machine, measure, measure_interleaved, pin
from coinfer.errors import EngineError

# The package exports a function of the module's own name.
module = sys.modules["coinfer.engine.measure"]


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "perf_counter", clock)
    return clock


def test_median_and_percentiles_are_of_the_repeats_without_the_warm_up(clock: Clock) -> None:
    durations = iter([9.0, 9.0, *np.arange(1.0, 22.0)])

    def call() -> None:
        clock.now_s += next(durations)

    timing = measure(call, warmup=2, repeats=21)
    assert (timing.median_s, timing.p5_s, timing.p95_s, timing.repeats) == (11.0, 2.0, 20.0, 21)
    assert next(durations, None) is None


def test_interleaved_calls_take_turns(clock: Clock) -> None:
    order: list[str] = []

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.now_s += seconds

    timings = measure_interleaved({"a": lambda: call("a", 1.0), "b": lambda: call("b", 4.0)}, warmup=1, repeats=2)
    assert order == ["a", "b"] * 3
    assert {name: (t.median_s, t.repeats) for name, t in timings.items()} == {"a": (1.0, 2), "b": (4.0, 2)}


@pytest.mark.parametrize(("warmup", "repeats"), [(0, 0), (-1, 1)])
def test_no_repeats_are_refused(warmup: int, repeats: int) -> None:
    with pytest.raises(EngineError, match=f"got {repeats} and {warmup}"):
        measure(lambda: None, warmup=warmup, repeats=repeats)


def test_no_seconds_are_no_timing() -> None:
    with pytest.raises(EngineError, match="at least 1 repeat, got 0"):
        module.timing([])


def test_this_machine_is_described() -> None:
    machine = describe_machine()
    assert machine.name and machine.processor and machine.system
    assert machine.cores == os.cpu_count()
    assert machine.versions["numpy"] == np.__version__
    assert {"coinfer", "numpy", "onnxruntime"} <= set(machine.versions)


def test_processor_is_read_from_cpuinfo(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\n")
    assert module._processor(cpuinfo) == "Some CPU @ 2 GHz"
    cpuinfo.write_text("processor\t: 0\nModel\t\t: Raspberry Pi 4 Model B\n")
    assert module._processor(cpuinfo) == "Raspberry Pi 4 Model B"
    assert module._processor(tmp_path / "none")


needs_affinity = pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="this system does not pin")


@needs_affinity
def test_pin_keeps_to_one_core_and_lets_go() -> None:
    before = os.sched_getaffinity(0)
    core = min(before)
    try:
        pin(core)
        assert os.sched_getaffinity(0) == {core}
        pin(None)
        assert before <= os.sched_getaffinity(0)
    finally:
        os.sched_setaffinity(0, before)


@needs_affinity
def test_a_core_that_is_not_there_is_refused() -> None:
    count = os.cpu_count() or 1
    for core in (-1, count):
        with pytest.raises(EngineError, match=f"core must be 0 to {count - 1}, got {core}"):
            pin(core)


@needs_affinity
def test_a_core_that_is_denied_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def deny(process: int, cores: object) -> None:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "sched_setaffinity", deny)
    with pytest.raises(EngineError, match="may not run on core 0: Invalid argument"):
        pin(0)


def test_a_system_without_pinning_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_setaffinity", raising=False)
    assert pin(0) is None
