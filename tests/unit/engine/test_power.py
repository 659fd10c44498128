"""Power sensors as Linux shows them, in a folder of the test's own."""

import time
from pathlib import Path

import pytest

from coinfer.engine.power import PowerMeter, find_sensor


def rapl(root: Path, counter_uj: int, *, largest_uj: int = 1_000_000) -> Path:
    folder = root / "sys/class/powercap/intel-rapl:0"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("package-0\n")
    (folder / "max_energy_range_uj").write_text(f"{largest_uj}\n")
    (folder / "energy_uj").write_text(f"{counter_uj}\n")
    return folder / "energy_uj"


def ina(root: Path, power_uw: int) -> Path:
    folder = root / "sys/class/hwmon/hwmon3"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "name").write_text("ina219\n")
    (folder / "power1_input").write_text(f"{power_uw}\n")
    return folder / "power1_input"


def test_rapl_counts_across_a_wrap(tmp_path: Path) -> None:
    counter = rapl(tmp_path, 900_000)
    sensor = find_sensor(tmp_path)
    assert sensor is not None and sensor.name == "RAPL package-0"
    sensor.start()
    counter.write_text("950000\n")
    assert sensor.stop() == pytest.approx(0.05)
    counter.write_text("100000\n")
    assert sensor.stop() == pytest.approx(0.2)


def test_a_monitor_of_the_board_is_integrated(tmp_path: Path) -> None:
    ina(tmp_path, 2_500_000)
    sensor = find_sensor(tmp_path)
    assert sensor is not None and sensor.name == "ina219 power1"
    with PowerMeter(sensor) as meter:
        time.sleep(0.05)
    assert meter.power is not None
    # The mean of a constant does not depend on how long it was looked at.
    assert meter.power.watts == pytest.approx(2.5, rel=0.3) and meter.power.sensor == "ina219 power1"


def test_a_channel_without_power_is_volts_times_amperes(tmp_path: Path) -> None:
    folder = tmp_path / "sys/class/hwmon/hwmon1"
    folder.mkdir(parents=True)
    (folder / "name").write_text("ina3221\n")
    (folder / "in1_label").write_text("VDD_IN\n")
    (folder / "in1_input").write_text("5000\n")
    (folder / "curr1_input").write_text("800\n")
    sensor = find_sensor(tmp_path)
    assert sensor is not None and sensor.name == "ina3221 VDD_IN"
    with PowerMeter(sensor) as meter:
        time.sleep(0.05)
    assert meter.power is not None and meter.power.watts == pytest.approx(4.0, rel=0.3)
    with PowerMeter(sensor) as meter:
        (folder / "curr1_input").unlink()
        time.sleep(0.05)
    assert meter.power is None
    (folder / "name").write_text("nct6775\n")
    (folder / "curr1_input").write_text("800\n")
    assert find_sensor(tmp_path) is None


def test_without_a_sensor_nothing_is_measured(tmp_path: Path) -> None:
    assert find_sensor(tmp_path) is None
    with PowerMeter(None) as meter:
        pass
    assert meter.power is None


def test_a_counter_that_is_no_number_is_passed_over(tmp_path: Path) -> None:
    rapl(tmp_path, 0).write_text("denied\n")
    ina(tmp_path, 1_000_000)
    sensor = find_sensor(tmp_path)
    assert sensor is not None and sensor.name.startswith("ina219")
