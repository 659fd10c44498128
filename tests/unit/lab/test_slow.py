"""Slow devices on a clock of the test's own, and the quota on a real process."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from coinfer.errors import PlanError
from coinfer.lab import slow
from coinfer.lab.slow import CpuQuota, SlowedDevice, label
from coinfer.lab.yardstick import LoopTimes, Yardstick, measure_loops
from coinfer.profile import Slowdown


class Clock:
    """Wall and computing time that pass only when told to."""

    def __init__(self) -> None:
        self.wall_s = self.cpu_s = 100.0
        self.waited: list[float] = []

    def compute(self, seconds: float) -> float:
        self.wall_s += seconds
        self.cpu_s += seconds
        return seconds

    def sit(self, seconds: float) -> None:
        self.wall_s += seconds

    def wait_until(self, deadline_s: float) -> None:
        self.waited.append(deadline_s - self.wall_s)
        self.wall_s = deadline_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[Clock]:
    clock = Clock()
    monkeypatch.setattr(slow, "now_s", lambda: clock.wall_s)
    monkeypatch.setattr(slow, "cpu_s", lambda: clock.cpu_s)
    monkeypatch.setattr(slow, "wait_awake", clock.wait_until)
    return clock


def test_each_work_has_its_factor(clock: Clock) -> None:
    device = SlowedDevice(Slowdown(fp32=4, int8=8))
    assert device.run("fp32", lambda: clock.compute(0.5)) == 0.5
    assert clock.wall_s == pytest.approx(102.0)
    device.run("int8", lambda: clock.compute(0.5))
    assert clock.wall_s == pytest.approx(106.0)
    device.slowdown = Slowdown(fp32=2, int8=2)
    device.run("fp32", lambda: clock.compute(0.5))
    assert clock.wall_s == pytest.approx(107.0)
    device.slowdown = Slowdown()
    device.run("fp32", lambda: clock.compute(0.5))
    assert clock.wall_s == pytest.approx(107.5)


def test_a_call_within_a_call_is_slowed_once_by_its_own_factor(clock: Clock) -> None:
    device = SlowedDevice(Slowdown(fp32=4, int8=8))

    lags = []

    def outer() -> None:
        clock.compute(0.25)
        device.run("int8", lambda: clock.compute(0.5))
        # Nothing has been waited for yet but waking: the slow core, awake, would have come as far 0.5 x 7 later.
        lags.append((clock.wall_s, device.lag_s))
        clock.compute(0.25)

    device.run("fp32", outer)
    assert clock.wall_s - 100 == pytest.approx(0.5 * 4 + 0.5 * 8)
    assert lags == [(pytest.approx(100.75 + clock.waited[0]), pytest.approx(0.5 * 7 - clock.waited[0]))]
    assert device.lag_s == 0 and device.busy_s == pytest.approx(6.0)


def test_a_call_that_is_slowed_much_is_rehearsed_within_its_time(clock: Clock) -> None:
    rehearsed = []

    def rehearse() -> None:
        rehearsed.append(clock.compute(0.004))

    device = SlowedDevice(Slowdown(fp32=100, int8=4))
    device.run("fp32", lambda: clock.compute(0.001), rehearse)
    assert clock.wall_s == pytest.approx(100.1) and len(rehearsed) == 1
    device.run("int8", lambda: clock.compute(0.5), rehearse)
    assert clock.wall_s == pytest.approx(102.1) and len(rehearsed) == 1


def test_an_urgent_call_interrupts_the_one_whose_turn_it_is(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    device = SlowedDevice(Slowdown(fp32=100, int8=100))
    ended: dict[str, float] = {}

    def urgent() -> None:
        device.run("fp32", lambda: clock.compute(0.002), is_urgent=True)
        ended["urgent"] = clock.wall_s

    def wait(deadline_s: float) -> None:
        # In the middle of the long call's wait, once.
        if deadline_s - clock.wall_s > 0.5 and not ended:
            clock.wall_s += 0.25
            ended["begun"] = clock.wall_s
            thread = threading.Thread(target=urgent)
            thread.start()
            thread.join()
        clock.wait_until(max(deadline_s, clock.wall_s))

    monkeypatch.setattr(slow, "wait_awake", wait)
    device.run("fp32", lambda: clock.compute(0.01))
    assert ended["urgent"] - ended["begun"] == pytest.approx(0.2)
    assert clock.wall_s - 100 == pytest.approx(0.01 * 100 + 0.2)
    assert device.busy_s == pytest.approx(1.2)
    device.run("fp32", lambda: clock.compute(0.01))
    assert clock.wall_s - 100 == pytest.approx(2.2)


def test_a_core_that_was_woken_is_not_woken_again(clock: Clock) -> None:
    device = SlowedDevice(Slowdown(fp32=100, int8=100))
    device.wake(lambda: clock.compute(0.001))
    waited = len(clock.waited)
    device.run("fp32", lambda: clock.compute(0.001))
    assert clock.waited[waited:] == [pytest.approx(0.0), pytest.approx(0.099)]
    clock.sit(1.0)
    device.run("fp32", lambda: clock.compute(0.001))
    assert clock.waited[-2:] == [pytest.approx(0.00297), pytest.approx(0.09603)]


def test_a_core_that_is_slow_for_a_while_is_no_slower_device(clock: Clock) -> None:
    class Half:
        """An integer unit at half its speed."""

        def speed(self, work: str) -> float:
            return 0.5 if work == "int8" else 1.0

    device = SlowedDevice(Slowdown(fp32=4, int8=8), yardstick=Half())  # type: ignore[arg-type]
    device.run("fp32", lambda: clock.compute(0.5))
    assert clock.wall_s == pytest.approx(102.0)
    device.run("int8", lambda: clock.compute(0.5))
    assert clock.wall_s == pytest.approx(104.0)
    # Where a look would take longer than the wait, the speed is the last that was seen.
    device.run("int8", lambda: clock.compute(1e-6))
    assert clock.wall_s == pytest.approx(104.0 + 4e-6)


def test_the_yardstick_is_its_own_reference() -> None:
    loops = measure_loops(0.05)
    assert 1e-6 < loops.fp32_s < 1e-2 and 1e-6 < loops.int8_s < 1e-2
    twice = Yardstick(LoopTimes(fp32_s=loops.fp32_s * 1e3, int8_s=loops.int8_s * 1e-3))
    assert twice.speed("fp32") > 10 > 0.1 > twice.speed("int8") > 0


def test_int8_segments_feel_a_share_of_what_the_loop_feels(monkeypatch: pytest.MonkeyPatch) -> None:
    yardstick = Yardstick(LoopTimes(fp32_s=1e-3, int8_s=1e-3))
    monkeypatch.setattr(yardstick, "loop_s", lambda work: 2e-3)
    assert yardstick.speed("fp32") == 0.5 and yardstick.speed("int8") == pytest.approx(0.5**0.7)


def test_what_others_compute_is_not_the_devices_work(clock: Clock) -> None:
    def call() -> None:
        clock.compute(0.5)
        clock.sit(3.0)

    SlowedDevice(Slowdown(fp32=4, int8=4), counts="cpu").run("fp32", call)
    assert clock.wall_s - 100 == pytest.approx(0.5 * 4 + 3.0)
    SlowedDevice(Slowdown(fp32=4, int8=4)).run("fp32", call)
    assert clock.wall_s - 105 == pytest.approx(3.5 * 4)


def test_a_call_that_raises_is_not_slowed_and_leaves_the_device_usable(clock: Clock) -> None:
    device = SlowedDevice(Slowdown(fp32=4, int8=4))
    with pytest.raises(ZeroDivisionError):
        device.run("fp32", lambda: 1 / 0)
    device.run("fp32", lambda: clock.compute(1.0))
    assert clock.waited[-1] == pytest.approx(3.0, abs=1e-3)


def test_one_core_serves_threads_in_turn() -> None:
    device = SlowedDevice(Slowdown(fp32=1.5, int8=1.5))
    inside, most = [0], [0]

    def call() -> None:
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        sum(range(20000))
        inside[0] -= 1

    threads = [threading.Thread(target=lambda: [device.run("fp32", call) for _ in range(5)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1]


def test_labels_say_emulated() -> None:
    assert SlowedDevice(Slowdown(fp32=30, int8=60)).label == "emulated: x86 core slowed 30x (fp32), 60x (int8)"
    assert label(Slowdown()) == "x86 core, not slowed"


def test_no_wait_makes_a_machine_faster() -> None:
    with pytest.raises(PlanError, match=r"at least 1, got fp32 0\.5"):
        SlowedDevice(Slowdown(fp32=0.5, int8=1))


@pytest.mark.parametrize("share", [0.0, 1.5, -1.0])
def test_a_share_is_a_part_of_one_core(share: float) -> None:
    with pytest.raises(PlanError, match=str(share)):
        CpuQuota(1, share)


@pytest.fixture
def busy() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    yield process
    process.kill()
    process.wait()


def test_signals_stop_and_continue_a_process(busy: subprocess.Popen[bytes]) -> None:
    stat = Path(f"/proc/{busy.pid}/stat")
    if not stat.exists():
        pytest.skip("no /proc here to read a process's state from")
    seen = set()
    with CpuQuota(busy.pid, 0.1, how="signals") as quota:
        assert quota.label == "emulated: x86 core, CPU quota 0.1 (stop and continue, every 20 ms)"
        while not ({"T"} <= seen and seen & {"R", "S"}):
            seen.add(stat.read_text().rpartition(")")[2].split()[0])
    # It is left running.
    assert stat.read_text().rpartition(")")[2].split()[0] != "T"
    assert busy.poll() is None


def test_a_process_that_is_not_there_cannot_be_slowed(busy: subprocess.Popen[bytes]) -> None:
    busy.kill()
    busy.wait()
    with pytest.raises(PlanError, match=str(busy.pid)), CpuQuota(busy.pid, 0.5, how="signals"):
        pass


def test_where_there_is_no_cgroup_the_reason_is_given(busy: subprocess.Popen[bytes], tmp_path: Path) -> None:
    with (
        pytest.raises(PlanError, match="cgroup v2 is not mounted"),
        CpuQuota(busy.pid, 0.5, how="cgroup", root=tmp_path),
    ):
        pass


def test_a_group_gets_the_quota_and_the_process(busy: subprocess.Popen[bytes], tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu")
    with CpuQuota(busy.pid, 0.25, how="cgroup", root=tmp_path) as quota:
        (group,) = tmp_path.glob("coinfer-*")
        assert (group / "cpu.max").read_text() == "5000 20000"
        assert (group / "cgroup.procs").read_text() == str(busy.pid)
        assert "cgroup quota" in quota.label
    assert (tmp_path / "cgroup.procs").read_text() == str(busy.pid)
