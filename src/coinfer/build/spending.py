"""What a build may spend on trainings, and on which of them it spends that.

    Task        one thing to train: what it takes, what it may bring at best, how to do it, what can follow
    scaled      the main network's candidates as those of a smaller network
    Gains       how much candidates would better the best known plan, over the conditions that a menu covers
    Ledger      what was spent, in which order: a build that goes on does the same again, from files
    spend       without limits every task in turn; with a limit, whatever promises most for what it takes

A gain is the mean of log(best objective known / best with the task's candidates), of losses, which may be below 0, that
of what they fall by: half of it over the grid of conditions of a menu, half at the conditions that the job names.
Before a training its candidates are in proportion to what is left of the network and lose nothing; afterwards they
count only where the accuracy was kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count, product
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from ..files import write_atomically
from ..plan import Candidate, Value
from ..profile import Conditions
from ..search.estimate import Table
from ..search.goal import Goal
from ..search.menu import LOADS, RATES_BPS, SLOWDOWNS, at
from ..search.solve import price_table
from .progress import Progress

# Seconds between two notes of a task that runs.
_TICK_S = 5.0


class Outcome(NamedTuple):
    """What a task brought: candidates that count from now on, and tasks that have become possible."""

    candidates: list[Candidate]
    following: list[Task]


@dataclass
class Task:
    """One thing to train.

    `trainings` it takes; `seconds` it is expected to take; `prospects` are the candidates that it may bring, all going
    well; `run` does it, or finds it done; `otherwise` gives what can begin where it is not done.
    """

    name: str
    trainings: int
    seconds: float
    prospects: Callable[[], list[Candidate]]
    run: Callable[[], Outcome]
    otherwise: Callable[[], list[Task]] | None = None


class Entry(Value, frozen=True, kw_only=True):
    """One task that was begun: what it has taken so far."""

    task: str
    trainings: int
    seconds: float
    expected_s: float


class Ledger:
    """What was spent, in order, kept in a file; a ledger of another `key` is begun anew.

    `key` stands for all that the tasks depend on.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key = path, key
        try:
            before, entries = msgspec.json.decode(path.read_bytes(), type=tuple[str, list[Entry]])
        except (OSError, msgspec.MsgspecError):
            before, entries = "", []
        self.entries = entries if before == key else []
        self._place: int | None = None
        self._since_s = 0.0

    @property
    def seconds(self) -> float:
        """Spent altogether."""
        return sum(entry.seconds for entry in self.entries)

    @property
    def trainings(self) -> int:
        """Spent altogether."""
        return sum(entry.trainings for entry in self.entries)

    @property
    def pace(self) -> float:
        """How much longer tasks took than was expected."""
        expected_s = sum(entry.expected_s for entry in self.entries)
        return self.seconds / expected_s if expected_s > 0 else 1.0

    def begin(self, place: int, task: Task) -> None:
        """The task at `place` begins, or goes on."""
        before_s = self.entries[place].seconds if place < len(self.entries) else 0.0
        entry = Entry(task=task.name, trainings=task.trainings, seconds=before_s, expected_s=task.seconds)
        self.entries[place : place + 1] = [entry]
        self._place, self._since_s = place, time.monotonic()
        self._write()

    def insert(self, place: int, task: Task) -> None:
        """A task comes before those that were begun from `place` on."""
        self.entries.insert(place, Entry(task=task.name, trainings=0, seconds=0.0, expected_s=0.0))

    def tick(self, *, is_done: bool = False) -> None:
        """Note what the task has taken by now, if the last note is some seconds old or it is done."""
        now_s = time.monotonic()
        if self._place is not None and (is_done or now_s - self._since_s > _TICK_S):
            entry = self.entries[self._place]
            took_s = entry.seconds + now_s - self._since_s
            self.entries[self._place] = msgspec.structs.replace(entry, seconds=took_s)
            self._since_s = now_s
            self._place = None if is_done else self._place
            self._write()

    def ticking(self, progress: Progress) -> Progress:
        """The same progress, which also notes the time."""

        def show(stage: str, done: int, total: int, detail: str) -> None:
            self.tick()
            progress(stage, done, total, detail)

        return show

    def _write(self) -> None:
        write_atomically(self._path, msgspec.json.encode((self._key, self.entries)))


class Gains:
    """How much candidates better each other over the conditions that a menu covers, and the job's own."""

    def __init__(self, goal: Goal, own: Conditions, *, int8_ratio: float) -> None:
        self._goal = goal
        grid = product(RATES_BPS, SLOWDOWNS, LOADS)
        self._conditions = [own, *(at(own, *point, int8_ratio=int8_ratio) for point in grid)]
        points = len(self._conditions) - 1
        self._weights = np.array([0.5, *[0.5 / points] * points])

    def best(self, candidates: Sequence[Candidate]) -> NDArray[np.float64]:
        """(conditions,) the least objective of those that keep the goal; infinite where none does."""
        if not candidates:
            return np.full(len(self._conditions), np.inf)
        table, least = Table(candidates), []
        for conditions in self._conditions:
            priced = price_table(table, conditions, self._goal)
            keeps = np.logical_and.reduce([constraint.is_met for constraint in priced.constraints])
            least.append(float(np.min(priced.objective, where=keeps, initial=np.inf)))
        return np.array(least)

    def of(self, best: NDArray[np.float64], candidates: Sequence[Candidate]) -> float:
        """What these would gain on the best known."""
        with_them = np.minimum(best, self.best(candidates))
        is_kept = np.isfinite(with_them)
        before, after = best[is_kept], with_them[is_kept]
        if self._goal.minimise != "accuracy":
            # The device alone sends no byte at all.
            before, after = (np.log(x + float(self._goal.minimise == "bytes")) for x in (before, after))
        # Where nothing kept the goal, anything that does gains 1: as much as one of a factor e.
        gains = np.where(np.isinf(before), 1.0, before - after)
        return float(self._weights[is_kept] @ gains)


class Limits(NamedTuple):
    """Seconds and trainings that may be spent, in earlier runs of the build too; None: as many as there are."""

    seconds: float | None = None
    trainings: int | None = None

    def allow(self, task: Task, spent: Ledger) -> bool:
        """Whether the task fits into what is left."""
        left_s = math.inf if self.seconds is None else self.seconds - spent.seconds
        is_in_time = left_s > 0 and task.seconds * spent.pace <= left_s
        return is_in_time and (self.trainings is None or spent.trainings + task.trainings <= self.trainings)


def spend(
    tasks: Sequence[Task],
    limits: Limits,
    ledger: Ledger,
    known: Sequence[Candidate],
    gains: Gains | None,
    *,
    progress: Progress,
) -> list[str]:
    """Run tasks, and those that follow from them, within the limits; lines for the build's log.

    Args:
        tasks: what can be trained now.
        limits: what may be spent.
        ledger: what was spent before; its tasks are done first, in their order.
        known: candidates that there are without any training.
        gains: what tasks are ranked by; None: there are no limits, and they run in turn.
        progress: is told which task runs.
    """
    waiting, notes = list(tasks), list[str]()
    best = None if gains is None else gains.best(known)
    for place in count():
        task = _next(waiting, place, limits, ledger, best, gains, notes)
        if task is None:
            break
        waiting.remove(task)
        progress("trainings", place, place + 1 + len(waiting), task.name)
        ledger.begin(place, task)
        outcome = task.run()
        ledger.tick(is_done=True)
        if gains is not None and best is not None:
            best = np.minimum(best, gains.best(outcome.candidates))
        # What follows comes first: a series is finished before the next begins.
        waiting = [*outcome.following, *waiting]
    if ledger.trainings:
        notes.append(f"{ledger.trainings} trainings in {ledger.seconds / 60:.1f} minutes")
    return notes


def scaled(
    known: Sequence[Candidate], *, time: float, crossing: float, cuts: Sequence[str] | None = None
) -> list[Candidate]:
    """Candidates of the main network as those of a smaller one that loses nothing would be, if all went in proportion.

    What an upload sends is a picture: that stays as it is.

    Args:
        known: measured.
        time: of both machines' times, what is left.
        crossing: of a split's payloads and coding times, what is left.
        cuts: the splits of these alone (None: all of them, the uploads and the device alone).
    """
    found = []
    for candidate in known:
        plan, evidence = candidate.plan, candidate.evidence
        if cuts is not None and plan.cut not in cuts:
            continue
        sent = 1.0 if plan.kind == "upload" else crossing
        smaller = msgspec.structs.replace(
            evidence,
            head_s=time * evidence.head_s,
            tail_s=time * evidence.tail_s,
            encode_s=sent * evidence.encode_s,
            decode_s=sent * evidence.decode_s,
            payload_bytes=sent * evidence.payload_bytes,
            loss_points=0.0,
            device_bytes=None if evidence.device_bytes is None else time * evidence.device_bytes,
            device_memory_bytes=(
                None if evidence.device_memory_bytes is None else crossing * evidence.device_memory_bytes
            ),
        )
        found.append(msgspec.structs.replace(candidate, evidence=smaller))
    return found


def _next(
    waiting: list[Task],
    place: int,
    limits: Limits,
    ledger: Ledger,
    best: NDArray[np.float64] | None,
    gains: Gains | None,
    notes: list[str],
) -> Task | None:
    """The task to run now; those that the limits forbid, or that would bring nothing, leave `waiting`."""
    worth: dict[str, float] = {}

    def gave_up(task: Task) -> bool:
        """Whether it is not to be done: then what can begin without it has taken its place."""
        if not limits.allow(task, ledger):
            why = "beyond the limit"
        elif gains is None or best is None:
            return False
        else:
            worth[task.name] = gains.of(best, task.prospects())
            if worth[task.name] > 0:
                return False
            why = "no condition would gain"
        notes.append(f"not trained, {why}: {task.name}")
        at = waiting.index(task)
        waiting[at : at + 1] = [] if task.otherwise is None else task.otherwise()
        return True

    while place < len(ledger.entries):
        before = next((task for task in waiting if task.name == ledger.entries[place].task), None)
        if before is not None:
            return before
        # It may be one that could begin when another task had been given up, which may be possible now.
        other = next((task for task in waiting if task.otherwise is not None), None)
        if other is None:
            del ledger.entries[place:]
        elif not gave_up(other):
            ledger.insert(place, other)
            return other
    looked = 0
    while looked < len(waiting):
        looked += not gave_up(waiting[looked])
    if gains is None:
        return waiting[0] if waiting else None
    by_time = limits.seconds is not None
    return max(
        waiting,
        key=lambda task: worth[task.name] / (max(task.seconds, 1.0) if by_time else task.trainings),
        default=None,
    )
