"""`coinfer simulate`: many devices on one edge, over a constant link or a recorded one, in simulated time."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import typer

from ..bundle import Bundle, load_bundle
from ..errors import UsageError
from ..plan import Candidate
from ..profile import Arrivals, Conditions
from ..units import format_duration, parse_duration_s
from .conditions import Options, conditions_of
from .options import BundleFolder, EdgeLoad, Int8Slowdown, Json, Rate, RoundTrip, Slowdown
from .output import print_json, print_table

if TYPE_CHECKING:
    from ..simulate.fleet import FleetResult

# Requests of all devices together that are still simulated: their arrays take some gigabytes.
MOST_REQUESTS = 40_000_000


def simulate(
    bundle: BundleFolder,
    devices: Annotated[int, typer.Option("--devices", min=1, help="Devices on the one edge.")] = 1,
    trace: Annotated[
        Path | None,
        typer.Option(
            "--trace",
            metavar="FILE",
            help="Recorded bandwidth of every device's uplink, each from a place of its own.",
            show_default=False,
        ),
    ] = None,
    rate: Rate = "1Mbit/s",
    rtt: RoundTrip = "10ms",
    period: Annotated[str, typer.Option("--period", help="Time between the requests of a device.")] = "1s",
    poisson: Annotated[
        bool, typer.Option("--poisson", help="Requests come by chance, at that mean distance, not evenly.")
    ] = False,
    arrivals: Annotated[
        Path | None,
        typer.Option(
            "--arrivals",
            metavar="FILE",
            help="When requests come: recorded seconds, one a line; every device begins somewhere in them.",
            show_default=False,
        ),
    ] = None,
    duration: Annotated[str, typer.Option("--duration", help="Time that requests come for.")] = "60s",
    plan: Annotated[
        str, typer.Option("--plan", metavar="N|auto", help="Number of a plan, or the best that serves all devices.")
    ] = "auto",
    workers: Annotated[int, typer.Option("--workers", min=1, help="Requests that the edge computes at a time.")] = 1,
    max_batch: Annotated[
        int, typer.Option("--max-batch", min=1, help="Requests that the edge computes together at most.")
    ] = 1,
    deadline: Annotated[
        str | None,
        typer.Option("--deadline", help="Count answers that take longer, such as 100ms.", show_default=False),
    ] = None,
    slowdown: Slowdown = None,
    int8_slowdown: Int8Slowdown = None,
    edge_load: EdgeLoad = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of chance: arrivals, places in the trace, exits.")] = 0,
    json: Json = False,
) -> None:
    """Simulate many devices on one edge.

    All devices run one plan, each with its own core and link; their requests meet in the edge's queue, first come
    first served. Prints latency, the edge's load and what waits there. Times are those of the bundle's evidence under
    these conditions; nothing is computed or sent.
    """
    import numpy as np

    from ..search.machines import with_profiles
    from ..simulate.arrivals import anywhere, by_chance, load_arrivals, periodic
    from ..simulate.fleet import simulate_fleet
    from ..stages import courses_of

    loaded = load_bundle(bundle)
    period_s, duration_s = parse_duration_s(period), parse_duration_s(duration)
    count = int(duration_s / period_s) if period_s > 0 else 0
    if arrivals is not None and poisson:
        raise UsageError("requests come as recorded or by chance: give --arrivals or --poisson")
    recorded_s = None if arrivals is None else load_arrivals(arrivals)
    count = count if recorded_s is None else len(recorded_s)
    if not 1 <= count * devices <= MOST_REQUESTS:
        raise UsageError(
            f"--duration over --period times --devices must be 1 to {MOST_REQUESTS} requests, got {count * devices}"
        )
    conditions = _conditions(loaded, Options(rate, rtt, slowdown, int8_slowdown, edge_load), trace)
    profile, on_menu = loaded.profile(), {entry.number for entry in loaded.manifest.menu}
    candidates = [candidate for candidate in loaded.candidates() if candidate.plan.number in on_menu]
    if max_batch > 1:
        candidates = with_profiles(candidates, edge=profile)
    mean_s = period_s if recorded_s is None else float(recorded_s[-1]) / max(1, count - 1)
    asked = Arrivals(rate_hz=1 / mean_s, is_random=poisson, devices=devices) if mean_s > 0 else None
    crowd = msgspec.structs.replace(conditions, arrivals=asked, edge_workers=workers, max_batch=max_batch)
    number = _plan_number(loaded, plan, candidates, crowd)
    candidate = next(c for c in candidates if c.plan.number == number)
    seconds = {name: timing.median_s for name, timing in profile.segments.items()}
    chance = np.random.default_rng(seed)
    if recorded_s is not None:
        arrivals_s = anywhere(recorded_s, devices, chance)
    elif poisson:
        arrivals_s = np.stack([by_chance(count * period_s, count, seed=seed + k) for k in range(devices)])
    else:
        # Cameras do not wait for each other: each begins somewhere within its period.
        arrivals_s = chance.uniform(0, period_s, (devices, 1)) + periodic(period_s, count)
    length_s = 0.0 if conditions.link.trace is None else conditions.link.trace.duration_s
    offsets_s = chance.uniform(0, length_s, devices) if length_s else None
    result = simulate_fleet(
        courses_of(candidate, seconds), arrivals_s, conditions,
        workers=workers, max_batch=max_batch, offsets_s=offsets_s, seed=seed,
    )  # fmt: skip
    limit_s = None if deadline is None else parse_duration_s(deadline)
    found = _summary(loaded, number, devices, result, limit_s)
    if json:
        print_json(found)
    else:
        _print(found)


def _conditions(bundle: Bundle, options: Options, trace: Path | None) -> Conditions:
    conditions = conditions_of(bundle, options)
    if trace is None:
        return conditions
    from ..lab.trace import load_trace, mean_rate_bps

    recorded = load_trace(trace)
    link = msgspec.structs.replace(conditions.link, rate_bps=mean_rate_bps(recorded), trace=recorded)
    return msgspec.structs.replace(conditions, link=link)


def _plan_number(bundle: Bundle, plan: str, candidates: list[Candidate], conditions: Conditions) -> int:
    """The plan that was named, or the best one that serves all these devices."""
    if plan != "auto":
        if not plan.isdigit():
            raise UsageError(f'--plan must be a number of the menu or auto, got "{plan}"')
        return bundle.plan(int(plan)).number
    from ..search.solve import search
    from .plan import goal_of

    return candidates[search(candidates, conditions, goal_of(bundle, None, None)).best].plan.number


def _summary(
    bundle: Bundle, number: int, devices: int, result: FleetResult, limit_s: float | None
) -> dict[str, Any]:
    import numpy as np

    latency_s = result.latency_s
    p50_s, p95_s, p99_s = (float(value) for value in np.percentile(latency_s, (50, 95, 99)))
    crossed = result.edge_wait_s[result.crossed]
    return {
        "plan": number,
        "label": bundle.plan(number).label,
        "how": "simulated",
        "devices": devices,
        "requests": int(latency_s.size),
        "latency_mean_s": float(latency_s.mean()),
        "latency_p50_s": p50_s,
        "latency_p95_s": p95_s,
        "latency_p99_s": p99_s,
        "throughput_hz": result.throughput_hz,
        "edge_busy_share": result.edge_busy_share,
        "edge_wait_p95_s": float(np.percentile(crossed, 95)) if crossed.size else 0.0,
        "late_share": None if limit_s is None else float((latency_s > limit_s).mean()),
    }


def _print(found: dict[str, Any]) -> None:
    from ..report.table import TextTable

    rows = [
        ("requests", f"{found['requests']} of {found['devices']} devices"),
        *((f"latency {key}", format_duration(found[f"latency_{key}_s"])) for key in ("mean", "p50", "p95", "p99")),
        ("answers", f"{found['throughput_hz']:.3g} a second"),
        ("edge busy", f"{100 * found['edge_busy_share']:.3g} %"),
        ("wait at the edge, p95", format_duration(found["edge_wait_p95_s"])),
    ]
    if found["late_share"] is not None:
        rows.append(("later than the deadline", f"{100 * found['late_share']:.3g} %"))
    title = f"plan {found['plan']} ({found['label']}), simulated"
    print_table(TextTable(title=title, columns=("", ""), rows=tuple(rows), right=()))
