"""How long the solvers take: divisions of graphs, the map of a bundle, a fleet of devices.

python -m bench.solvers NAME    with the candidates of a finished build of that job; docs/results/raw/pipeline

Graphs are random: each layer reads one to three values, of the eight layers before it (as networks with branches are)
or of any before it.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from coinfer.lab.trace import load_trace, mean_rate_bps
from coinfer.plan import Candidate
from coinfer.profile import Conditions, Link, Profile
from coinfer.report.results import write_raw
from coinfer.search.dag import Dag, DagValue, heavy_load, light_load
from coinfer.search.goal import Goal
from coinfer.search.menu import at
from coinfer.search.planmap import LOADS, RATES_BPS, plan_map
from coinfer.search.solve import search
from coinfer.simulate.arrivals import periodic
from coinfer.simulate.fleet import simulate_fleet
from coinfer.stages import courses_of

from .cells import Workshop, note_commit, note_machine, workshop_of

RAW = Path("docs/results/raw/pipeline")
SIZES = {200: 20, 2000: 5}
NEAR = 8
LOOK_UPS = 1000
DEVICES, PERIOD_S = 10_000, 10.0
TRACE = Path("../shared/data/traces/mahimahi_lte/ATT-LTE-driving-2016.up")


def random_dag(layers: int, seed: int, *, reach: int) -> Dag:
    """So many layers in order, each reading one to three of the `reach` before it; times as of a slow device."""
    rng = np.random.default_rng(seed)
    readers: dict[int, set[int]] = {k: set() for k in range(-1, layers)}
    for layer in range(layers):
        for made in rng.integers(max(-1, layer - reach), layer, size=rng.integers(1, 4)):
            readers[int(made)].add(layer)
    values = tuple(
        DagValue(f"v{made}", float(rng.lognormal(-6, 1)), None if made < 0 else made, tuple(sorted(found)))
        for made, found in readers.items()
    )
    device_s = rng.lognormal(-7, 1, layers)
    return Dag(tuple(map(float, device_s)), tuple(map(float, device_s / 10)), values, 0.01)


def took(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came of it."""
    began = time.perf_counter()
    found = work()
    return time.perf_counter() - began, found


def graphs() -> Iterator[dict[str, Any]]:
    """A line for each size and kind of graph."""
    # The libraries are loaded with the first.
    heavy_load(random_dag(10, 0, reach=NEAR))
    for layers, tries in SIZES.items():
        for kind, reach in (("near", NEAR), ("any", layers)):
            dags = [random_dag(layers, seed, reach=reach) for seed in range(tries)]
            light_s = [took(lambda dag=dag: light_load(dag))[0] for dag in dags]
            yield {"what": "light_load", "layers": layers, "reads": kind, "n": tries, **_spread(light_s)}
            few = [took(lambda dag=dag: heavy_load(dag, limit_s=10.0)) for dag in dags[:3]]
            gaps = [found.division.period_s / found.bound_s - 1 if found.bound_s else np.inf for _, found in few]
            spread = _spread([seconds for seconds, _ in few])
            yield {"what": "heavy_load", "layers": layers, "reads": kind, "n": len(few), **spread, "gap": max(gaps)}


def _spread(seconds: list[float]) -> dict[str, float]:
    p5_s, p95_s = (float(x) for x in np.percentile(seconds, (5, 95)))
    return {"median_s": statistics.median(seconds), "p5_s": p5_s, "p95_s": p95_s, "most_s": max(seconds)}


def main(words: list[str]) -> None:
    """Time everything and write the raw log."""
    if len(words) != 1:
        raise SystemExit("usage: python -m bench.solvers NAME")
    workshop = workshop_of(words[0])
    lines = list(graphs())
    alive = [candidate for candidate in workshop.candidates if candidate.dropped is None]
    base = Conditions(link=Link(rate_bps=1e6, delay_s=0.005))
    goal = Goal(max_loss_points=workshop.manifest.max_loss_points)
    maps = [took(lambda: plan_map(alive, goal, base)) for _ in range(3)]
    maps_s, made = [seconds for seconds, _ in maps], maps[-1][1]
    rates = np.random.default_rng(0).lognormal(14, 2, LOOK_UPS)
    looks_s = [took(lambda rate=rate: made.at(float(rate), edge_load=3.0, device_load=1.5))[0] for rate in rates]
    points = len(RATES_BPS) * len(LOADS) ** 2
    lines.append({"what": "plan_map", "points": points, "candidates": len(alive), "n": 3, **_spread(maps_s)})
    lines.append({"what": "look_up", "points": points, "n": LOOK_UPS, **_spread(looks_s)})
    lines.append(fleet(workshop, alive, base, goal))
    for line in lines:
        print(line, flush=True)
    note_commit(RAW, "solvers")
    note_machine(RAW)
    write_raw(RAW / "solvers.jsonl.gz", lines)


def fleet(workshop: Workshop, alive: list[Candidate], base: Conditions, goal: Goal) -> dict[str, Any]:
    """10,000 devices for an hour of a recorded link, a request every ten seconds each, on one edge of one worker.

    The plan is the best one for the link's mean rate, on devices 100 times slower; each begins the trace elsewhere.
    """
    trace = load_trace(TRACE)
    rate_bps = mean_rate_bps(trace)
    slow = at(base, rate_bps, 100.0, 1.0, int8_ratio=workshop.manifest.int8_slowdown_ratio)
    conditions = msgspec.structs.replace(slow, link=msgspec.structs.replace(slow.link, trace=trace))
    candidate = alive[search(alive, slow, goal).best]
    seconds = {
        name: timing.median_s
        for name, timing in msgspec.json.decode(
            (workshop.folder / "profile.json").read_bytes(), type=Profile
        ).segments.items()
    }
    chance = np.random.default_rng(0)
    arrivals_s = chance.uniform(0, PERIOD_S, (DEVICES, 1)) + periodic(PERIOD_S, int(3600 / PERIOD_S))
    offsets_s = chance.uniform(0, trace.duration_s, DEVICES)
    simulated_s, found = took(
        lambda: simulate_fleet(courses_of(candidate, seconds), arrivals_s, conditions, offsets_s=offsets_s)
    )
    return {
        "what": "fleet", "devices": DEVICES, "requests": arrivals_s.size, "plan": candidate.plan.label,
        "trace": TRACE.name, "n": 1, **_spread([simulated_s]),
        "latency_p95_s": float(np.percentile(found.latency_s, 95)), "edge_busy_share": found.edge_busy_share,
    }  # fmt: skip


if __name__ == "__main__":
    main(sys.argv[1:])
