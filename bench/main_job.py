"""The main job's tables: build, measure over a shaped link, report on images that no choice has seen.

python -m bench.main_job build NAME     a bundle and its workshop under out/
python -m bench.main_job measure NAME   cells, reported accuracy; raw logs under docs/results/raw/main-job/
python -m bench.main_job streams NAME   streams and overhead of a network that was measured
python -m bench.main_job all            every NAME; then `python -m bench.results` makes the tables
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from coinfer.build.make import assemble, build
from coinfer.bundle import Bundle, load_bundle
from coinfer.data import Images
from coinfer.lab.bench import measure_overhead, run_cells
from coinfer.lab.cell import Cell, Effort
from coinfer.lab.choose import fixed_plans
from coinfer.profile import Slowdown
from coinfer.search.goal import Goal
from coinfer.search.solve import baselines

from .cells import OUT, Study, Workshop, conditions_of, job_of, measure, pictures_of, show, workshop_of

RAW = Path("docs/results/raw/main-job")
RATES_BPS = (30e3, 100e3, 300e3, 1e6, 3e6, 10e6, 30e6, 100e6)
SLOWDOWNS = (3.0, 30.0, 100.0)
GRID = tuple((rate, slowdown) for slowdown in SLOWDOWNS for rate in RATES_BPS)
MAP_CELLS = (
    *((rate, 3.0) for rate in (300e3, 1e6, 10e6, 100e6)),
    *((rate, 10.0) for rate in (1e6, 10e6, 30e6, 100e6)),
    *((rate, 30.0) for rate in (1e6, 3e6, 10e6, 30e6)),
)
# Larger pictures take seconds each on the slow links: fewer requests.
STUDIES = {
    "scenes": Study("scenes", GRID, RAW, requests=15),
    "resnet20": Study("resnet20", GRID, RAW),
    "resnet56": Study("resnet56", GRID, RAW),
    "mobilenetv2": Study("mobilenetv2", MAP_CELLS, RAW, requests=12),
}
STREAM = 500


def streams_and_overhead(name: str) -> None:
    """Streams, and what a request takes beyond its stages, of a network that was measured."""
    images, bundle = pictures_of(name), load_bundle(OUT / f"{name}.bench")
    streams(workshop_of(name), bundle, images)
    measure_overhead(bundle, images.pixels, RAW / "overhead.jsonl.gz")


def streams(workshop: Workshop, bundle: Bundle, images: Images) -> None:
    """500 pictures in a device-bound, a link-bound and an unslowed edge-bound cell.

    Each by a bundle of that one plan, so that its times are calibrated as warm as the stream runs.
    """
    ratio = bundle.manifest.int8_slowdown_ratio
    goal = Goal(max_loss_points=bundle.manifest.max_loss_points)
    alive = {c.plan.number: c for c in bundle.candidates()}
    candidates = [alive[plan.number] for plan in bundle.manifest.menu]
    cells = {"device": (100e6, 30.0, "split"), "link": (300e3, 3.0, "upload"), "edge": (1e9, 1.0, "upload")}
    for bound, (rate_bps, slowdown, kind) in cells.items():
        conditions = conditions_of(bundle.manifest, rate_bps, slowdown)
        best = candidates[baselines(candidates, conditions, goal)[kind]].plan.number  # type: ignore[index]
        device = Slowdown() if slowdown == 1 else Slowdown(fp32=slowdown, int8=slowdown * ratio)
        cell = Cell(link=conditions.link, slowdown=device)
        log = RAW / f"stream-{bound}.jsonl.gz"
        effort = Effort(stream=STREAM, requests=10, slow_requests=10, finalists=False)
        pick = fixed_plans(best)
        alone = assemble(workshop.folder, [best], OUT / f"stream-{bound}")
        run_cells(alone, images.pixels, images.labels, [cell], log, goal=goal, pick=pick, effort=effort, tell=show)


def main(words: list[str]) -> None:
    """Run one step."""
    steps: dict[str, Callable[[str], object]] = {
        "build": lambda name: build(job_of(name), OUT / name, progress=show),
        "measure": lambda name: measure(STUDIES[name]),
        "streams": streams_and_overhead,
    }
    if words == ["all"]:
        for step in ("build", "measure"):
            for name in STUDIES:
                steps[step](name)
        steps["streams"]("resnet56")
        return
    if len(words) != 2 or words[0] not in steps or words[1] not in STUDIES:
        raise SystemExit(f"usage: python -m bench.main_job build|measure|streams {'|'.join(STUDIES)}, or all")
    steps[words[0]](words[1])


if __name__ == "__main__":
    main(sys.argv[1:])
