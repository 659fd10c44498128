"""What the machine takes from its supply, where it has a sensor that says so.

    RAPL          x86: a counter of the processor package's energy, in microjoules, that wraps
    INA (hwmon)   Jetson and other boards: power at this moment, or volts times amperes; looked at every 10 ms

A sensor counts the whole package or board, not one process: keep the machine quiet.  Where there is none, `find_sensor`
gives None, and energy stays "not measured".
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from time import perf_counter
from types import TracebackType
from typing import NamedTuple, Protocol, Self

_LOOK_EVERY_S = 0.01


class Sensor(Protocol):
    """A source of power readings."""

    @property
    def name(self) -> str:
        """Which sensor this is, for a table."""
        ...

    def start(self) -> None:
        """Begin to count."""
        ...

    def stop(self) -> float | None:
        """Joules since `start`; None where it could not be read all the while."""
        ...


class Rapl:
    """The energy counter of one processor package (Linux powercap)."""

    def __init__(self, folder: Path) -> None:
        self._counter = folder / "energy_uj"
        self._range_uj = int((folder / "max_energy_range_uj").read_text())
        self.name = f"RAPL {(folder / 'name').read_text().strip()}"
        self._began_uj = self._read()

    def start(self) -> None:
        """Begin to count."""
        self._began_uj = self._read()

    def stop(self) -> float:
        """Joules since `start`; right across one wrap of the counter."""
        counted_uj = self._read() - self._began_uj
        return (counted_uj + self._range_uj if counted_uj < 0 else counted_uj) * 1e-6

    def _read(self) -> int:
        return int(self._counter.read_text())


class Hwmon:
    """A power monitor of the board, integrated by a thread of its own.

    `files` are one file of microwatts (INA219, INA226 and others), or a channel's millivolts and milliamperes (the
    INA3221 of Jetson boards).
    """

    def __init__(self, *files: Path) -> None:
        self._files = files
        first = files[0]
        label = first.with_name(first.name.replace("_input", "_label"))
        channel = label.read_text().strip() if label.is_file() else first.name.removesuffix("_input")
        self.name = f"{(first.parent / 'name').read_text().strip()} {channel}"
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._joules = 0.0
        self._has_failed = False
        self._watts()

    def start(self) -> None:
        """Begin to look."""
        self._joules, self._has_failed = 0.0, False
        self._stop.clear()
        self._thread = threading.Thread(target=self._look, name="power", daemon=True)
        self._thread.start()

    def stop(self) -> float | None:
        """Joules since `start`, by the trapezoidal rule; None where the monitor could not be read all the while."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        return None if self._has_failed else self._joules

    def _look(self) -> None:
        try:
            watts, at_s = self._watts(), perf_counter()
            is_last = False
            while not is_last:
                is_last = self._stop.wait(_LOOK_EVERY_S)
                next_watts, next_s = self._watts(), perf_counter()
                self._joules += (watts + next_watts) / 2 * (next_s - at_s)
                watts, at_s = next_watts, next_s
        except (OSError, ValueError):
            self._has_failed = True

    def _watts(self) -> float:
        """Microwatts, or millivolts times milliamperes, as watts."""
        return math.prod(int(file.read_text()) for file in self._files) * 1e-6


def find_sensor(root: Path = Path("/")) -> Sensor | None:
    """The first sensor that can be read: RAPL's package, else a power monitor of the board; None: there is none."""
    monitors = root / "sys/class/hwmon"
    attempts: list[Callable[[], Sensor]] = [
        *(partial(Rapl, folder) for folder in sorted((root / "sys/class/powercap").glob("intel-rapl:?"))),
        *(partial(Hwmon, file) for file in sorted(monitors.glob("hwmon*/power?_input"))),
        *(partial(_ina_channel, volts) for volts in sorted(monitors.glob("hwmon*/in?_input"))),
    ]
    for make in attempts:
        try:
            return make()
        except (OSError, ValueError):
            # Absent, or readable by root alone: the next one may be open.
            continue
    return None


def _ina_channel(volts: Path) -> Hwmon:
    """A channel of an INA monitor that has no power of its own; other chips' voltages are of no current."""
    if not (volts.parent / "name").read_text().startswith("ina"):
        raise ValueError(f"{volts} is no power monitor's")
    return Hwmon(volts, volts.with_name(volts.name.replace("in", "curr", 1)))


class Power(NamedTuple):
    """Mean power over a stretch of time, and the sensor that measured it."""

    watts: float
    sensor: str


class PowerMeter:
    """Mean power of what runs while it is entered; `power` is None where no sensor measured it.

    with PowerMeter(find_sensor()) as meter:
        ...
    meter.power
    """

    def __init__(self, sensor: Sensor | None) -> None:
        self._sensor = sensor
        self._began_s = 0.0
        self.power: Power | None = None

    def __enter__(self) -> Self:
        if self._sensor is not None:
            self._sensor.start()
        self._began_s = perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._sensor is not None:
            took_s = perf_counter() - self._began_s
            joules = self._sensor.stop()
            self.power = None if joules is None else Power(joules / max(took_s, 1e-9), self._sensor.name)
