"""Who is measured in a cell, and on which pictures.

Both are fixed before anything is measured, by seed and by estimate alone.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..bundle import Bundle
from ..errors import PlanError
from ..plan import Candidate
from ..profile import Conditions, Slowdown
from ..search.estimate import as_table
from ..search.goal import Goal
from ..search.solve import KINDS, baselines, search
from ..stages import Course, courses_of
from .worker import Request

# Plan numbers to the roles for which they are measured; the plan with the role "chosen" comes first.
Picks = Mapping[int, tuple[str, ...]]
Pick = Callable[[Sequence[Candidate], Conditions, Goal], Picks]
CHOSEN = "chosen"


def menu_candidates(bundle: Bundle) -> list[Candidate]:
    """The candidates that the bundle can run, in the order of the menu.

    Raises:
        PlanError: the bundle has no evidence for a plan of its menu.
    """
    known = {candidate.plan.number: candidate for candidate in bundle.candidates()}
    missing = [str(plan.number) for plan in bundle.manifest.menu if plan.number not in known]
    if missing:
        raise PlanError(f"no evidence for plans {', '.join(missing)} (bundle {bundle.folder})")
    return [known[plan.number] for plan in bundle.manifest.menu]


def pick_plans(each: int = 3, random: int = 3, *, seed: int = 0, networks: Sequence[str] = ()) -> Pick:
    """The chosen plan, the best of every way, the `each` best estimates of every way, and `random` others.

    Of each of `networks` (variants) its best split as well.  All of them keep the goal's constraints.
    """

    def pick(candidates: Sequence[Candidate], conditions: Conditions, goal: Goal) -> Picks:
        ranking = search(candidates, conditions, goal)
        feasible = [candidates[index] for index in ranking.order[: ranking.num_feasible]]
        roles: dict[int, list[str]] = {feasible[0].plan.number: [CHOSEN]}
        for kind, index in baselines(candidates, conditions, goal).items():
            roles.setdefault(candidates[index].plan.number, []).append(f"best {kind}")
        for kind in KINDS:
            best = [candidate for candidate in feasible if candidate.plan.kind == kind][:each]
            for place, candidate in enumerate(best):
                roles.setdefault(candidate.plan.number, []).append(f"{kind} {place + 1}")
        for network in networks:
            splits = [c.plan.number for c in feasible if c.plan.kind == "split" and c.plan.variant == network]
            for number in splits[:1]:
                roles.setdefault(number, []).append(best_split_of(network))
        others = [candidate.plan.number for candidate in feasible if candidate.plan.number not in roles]
        chance = np.random.default_rng([seed, int(conditions.link.rate_bps), int(conditions.device.fp32 * 1000)])
        for number in chance.permutation(others)[:random]:
            roles[int(number)] = ["random"]
        return {number: tuple(names) for number, names in roles.items()}

    return pick


def best_split_of(network: str) -> str:
    """The role of a network's own best split."""
    return f"best split of {network}"


def fixed_plans(*numbers: int) -> Pick:
    """Exactly these plans; the first stands for the chosen one.

    Raises:
        PlanError: no plan is given.
    """
    if not numbers:
        raise PlanError("a cell needs at least one plan, got none")

    def pick(candidates: Sequence[Candidate], conditions: Conditions, goal: Goal) -> Picks:
        table = as_table(candidates)
        have = {int(number) for number in table.numbers}
        missing = [str(number) for number in numbers if number not in have]
        if missing:
            raise PlanError(f"plans {', '.join(missing)} are not on the menu")
        best = {candidates[index].plan.number: kind for kind, index in baselines(table, conditions, goal).items()}
        roles = {number: ((CHOSEN,) if number == numbers[0] else ("named",)) for number in numbers}
        return {n: (*names, *((f"best {best[n]}",) if n in best else ())) for n, names in roles.items()}

    return pick


def pick_images(pixels: NDArray[Any], num: int, *, seed: int = 0, among: int = 2000) -> tuple[int, ...]:
    """`num` rows of `pixels` (N, H, W, C) that stand for all: spread evenly over how well pictures compress.

    The first `among` pictures (in a random order) are sorted by their zlib size and cut into `num` equal
    parts; one is drawn from each.  So the payloads of a few requests have the median of many.  Where `num` is
    larger than N, pictures come again.
    """
    chance = np.random.default_rng(seed)
    pool = chance.permutation(len(pixels))[: max(among, num)]
    sizes = [len(zlib.compress(np.ascontiguousarray(pixels[row]).tobytes(), 1)) for row in pool]
    ordered = pool[np.argsort(sizes, kind="stable")]
    borders = np.linspace(0, len(ordered), min(num, len(ordered)) + 1).astype(int)
    drawn = [int(ordered[chance.integers(a, b)]) for a, b in zip(borders[:-1], borders[1:], strict=True)]
    mixed = [int(row) for row in chance.permutation(drawn)]
    return tuple(mixed[k % len(mixed)] for k in range(num))


def calibrated(
    candidate: Candidate,
    requests: Sequence[Request],
    slowdown: Slowdown,
    load: float,
    seconds: Mapping[str, float] | None = None,
) -> Candidate:
    """The candidate with the times that were measured here, of this device and edge, without their factors.

    The device's reading of the reply counts as encoding: it is fp32 work of the same core.  `seconds` of the bundle's
    segments are needed for a plan with exits.
    """
    done = [request for request in requests if request.error is None]
    if not done:
        return candidate
    head = slowdown.int8 if candidate.plan.precision == "int8" else slowdown.fp32
    if candidate.plan.exits:
        times = _by_courses(candidate, done, seconds or {}, head, slowdown.fp32, load)
    else:
        times = {
            "head_s": float(np.median([r.head_s for r in done])) / head,
            "encode_s": float(np.median([r.encode_s + r.finish_s for r in done])) / slowdown.fp32,
            "decode_s": float(np.median([r.decode_s for r in done])) / load,
            "tail_s": float(np.median([r.tail_s for r in done])) / load,
        }
    evidence = msgspec.structs.replace(candidate.evidence, times_how="measured", **times)
    return msgspec.structs.replace(candidate, evidence=evidence)


def _by_courses(
    candidate: Candidate, done: Sequence[Request], seconds: Mapping[str, float], head: float, fp32: float, load: float
) -> dict[str, float]:
    """Times of the mean request of a plan with exits, from a few whose shares of exits are not those of many.

    What they took over what the courses that they took were expected to take is what all courses take of that.
    """
    courses = courses_of(candidate, seconds)
    by_exit = {course.exit: course.work for course in courses}
    crossed = [request for request in done if request.answered == "edge"]

    def scaled(name: str, took_s: float, those: Sequence[Request]) -> float:
        expected_s = sum(float(getattr(by_exit[request.exit], name)) for request in those)
        mean_s = mean_of(courses, name)
        return mean_s * took_s / expected_s if expected_s > 0 else mean_s

    times = {
        "head_s": scaled("head_s", sum(r.head_s for r in done) / head, done),
        "exit_s": scaled("exit_s", sum(r.exit_s for r in done) / fp32, done),
        "tail_s": scaled("tail_s", sum(r.tail_s for r in crossed) / load, crossed),
    }
    if crossed:
        times["encode_s"] = float(np.median([r.encode_s + r.finish_s for r in crossed])) / fp32
        times["decode_s"] = float(np.median([r.decode_s for r in crossed])) / load
    return times


def mean_of(courses: Sequence[Course], name: str) -> float:
    """A time of the mean request, as `Evidence` has it: "tail_s" is of those that cross, the others of all."""
    there = [course for course in courses if name != "tail_s" or float(course.work.remote_share) > 0]
    share = sum(course.share for course in there)
    return sum(course.share * float(getattr(course.work, name)) for course in there) / share if share else 0.0
