"""From options to `Conditions`, and from another machine's profile to candidates with its times."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from ..bundle import Bundle
from ..errors import PlanError, UsageError
from ..profile import RADIOS, Arrivals, Conditions, Link, Profile, Slowdown
from ..units import parse_duration_s, parse_rate_bps


class Options(NamedTuple):
    """The options that make up conditions, as they were typed."""

    rate: str = "1 Mbit/s"
    rtt: str = "10 ms"
    slowdown: float | None = None
    int8_slowdown: float | None = None
    edge_load: float = 1.0
    device_power: float | None = None
    radio: str | None = None
    radio_tail: float = 0.0
    arrivals: Arrivals | None = None
    workers: int = 1
    max_batch: int = 1


def slowdown_of(bundle: Bundle, fp32: float | None, int8: float | None) -> Slowdown | None:
    """The emulated device: None where no factor was given.

    Without a factor of its own, int8 is slowed so that it gains over fp32 no more than the bundle assumes.

    Raises:
        UsageError: a factor is not above 0, or int8's is given alone.
    """
    if fp32 is None:
        if int8 is not None:
            raise UsageError("--int8-slowdown needs --slowdown beside it")
        return None
    for name, factor in (("--slowdown", fp32), ("--int8-slowdown", int8)):
        if factor is not None and not factor > 0:
            raise UsageError(f"{name} must be above 0, got {factor:g}")
    return Slowdown(fp32=fp32, int8=fp32 * bundle.manifest.int8_slowdown_ratio if int8 is None else int8)


def conditions_of(bundle: Bundle, options: Options) -> Conditions:
    """The conditions that the options describe, with the bundle's own cost of an exchange.

    Powers are the bundle's own where none are given.

    Raises:
        UsageError: a value is not understood or out of range.
    """
    if not options.edge_load > 0:
        raise UsageError(f"--edge-load must be above 0, got {options.edge_load:g}")
    if options.device_power is not None and not options.device_power >= 0:
        raise UsageError(f"--device-power must be at least 0 W, got {options.device_power:g}")
    if options.radio is not None and options.radio not in RADIOS:
        raise UsageError(f'--radio must be one of {", ".join(RADIOS)}, got "{options.radio}"')
    if options.radio_tail and options.radio is None:
        raise UsageError("--radio-tail needs --radio beside it")
    if not options.radio_tail >= 0:
        raise UsageError(f"--radio-tail must be at least 0 J, got {options.radio_tail:g}")
    radio = None if options.radio is None else msgspec.structs.replace(RADIOS[options.radio], tail_j=options.radio_tail)
    link = Link(rate_bps=parse_rate_bps(options.rate), delay_s=parse_duration_s(options.rtt) / 2)
    return Conditions(
        link=link,
        device=slowdown_of(bundle, options.slowdown, options.int8_slowdown) or Slowdown(),
        edge_load=options.edge_load,
        exchange_s=bundle.profile().exchange_s,
        device_power_w=bundle.manifest.device_power_w if options.device_power is None else options.device_power,
        radio=radio or bundle.manifest.radio,
        arrivals=options.arrivals,
        edge_workers=options.workers,
        max_batch=options.max_batch,
    )


def load_profile(path: Path, bundle: Bundle) -> Profile:
    """The profile of `bundle` in a file that `coinfer profile -o` wrote.

    Raises:
        PlanError: the file cannot be read, is not a profile, or is of another bundle.
    """
    try:
        profile = msgspec.json.decode(path.read_bytes(), type=Profile)
        if profile.bundle not in (None, bundle.digest):
            raise PlanError(f"profile {path} is of bundle {profile.bundle:.12}, this one is {bundle.digest:.12}")
        return profile
    except OSError as error:
        raise PlanError(f"profile {path} cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise PlanError(f"profile {path} is not what `coinfer profile -o` writes: {error}") from error
