"""Whose turn it is at the edge: requests wait in a line for each device, and the lines are served in turns.

    device a   r1 r4 r5          taken: r1 (a), r2 (b), r3 (c), r4 (a), r5 (a)
    device b   r2
    device c   r3

A device that asks more than others waits longer and takes nothing from them.  How long a request would wait is known
when it comes: before it are those of its own line and, of every other, at most one more than that.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any, NamedTuple, Protocol

from ..engine.sides import Values
from ..protocol import Durations, Request


class Asker(Protocol):
    """Who has asked, and takes the answer: `protocol.EdgeConnection`, or another door of the edge.

    What `reply` and `failure` give is what `Computed.message` holds.
    """

    def reply(self, request: int, durations: Durations, outputs: Any, *, exit: int | None = None) -> Any:
        """The answer: the network's outputs, each (1, *shape), or those of an exit."""
        ...

    def failure(self, request: int, text: str) -> Any:
        """Why there is none, in one line."""
        ...


class Job(NamedTuple):
    """A request that waits to be computed, and who is told what came of it.

    `values` is what its payload holds, where somebody has decoded it already.  `device` is in whose line it waits,
    `foreseen_s` how long it should take from its arrival until it is computed.
    """

    connection: Asker
    request: Request
    arrived_s: float
    future: Future[Any]
    device: str = ""
    values: Values | None = None
    foreseen_s: float = 0.0

    @property
    def plan(self) -> int:
        """The number of its plan: those of one plan are computed together."""
        return self.request.plan.number

    @property
    def num_bytes(self) -> int:
        """Memory that it takes while it waits."""
        if self.values is not None:
            return sum(array.nbytes for array in self.values)
        return len(self.request.payload)


class Turns:
    """The lines.  Not safe from several threads: whoever holds it has a lock."""

    def __init__(self) -> None:
        self._lines: OrderedDict[str, deque[Job]] = OrderedDict()
        # At k: how many lines have more than k requests.
        self._longer_than: list[int] = []
        self._bytes: dict[str, int] = {}
        self._of_plan: Counter[int] = Counter()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def first(self) -> Job:
        """Whose turn is next."""
        return next(iter(self._lines.values()))[0]

    def count(self, plan: int) -> int:
        """Requests of a plan that wait."""
        return self._of_plan[plan]

    def counts(self) -> Mapping[int, int]:
        """How many wait of each plan, by its number; plans of which none does are left out."""
        return self._of_plan

    def bytes_of(self, device: str) -> int:
        """Memory that a device's waiting requests take."""
        return self._bytes.get(device, 0)

    def ahead_of(self, device: str) -> int:
        """At most so many requests are served before a new one of this device, of those that wait.

        All of its line are and, of each other line, as many and one more; of a line whose turn is behind this device's,
        that one more is not.
        """
        own = len(self._lines.get(device, ()))
        # Each other line serves as many as this one has, and its next one before it, where it has that many.
        return sum(self._longer_than[: own + 1])

    def put(self, job: Job) -> None:
        """The last of its line; a new line is the last of all."""
        line = self._lines.setdefault(job.device, deque())
        if len(line) == len(self._longer_than):
            self._longer_than.append(0)
        self._longer_than[len(line)] += 1
        line.append(job)
        self._bytes[job.device] = self._bytes.get(job.device, 0) + job.num_bytes
        self._of_plan[job.plan] += 1
        self._count += 1

    def take(self, most: int) -> list[Job]:
        """Up to `most` requests of one plan, in turns; those of other plans keep their places."""
        batch: list[Job] = []
        plan = self.first().plan
        without: set[str] = set()
        while len(batch) < most and len(without) < len(self._lines):
            device = next(name for name in self._lines if name not in without)
            job = self._pop(device, plan)
            if job is None:
                without.add(device)
                continue
            batch.append(job)
            if device in self._lines:
                self._lines.move_to_end(device)
        return batch

    def _pop(self, device: str, plan: int) -> Job | None:
        line = self._lines[device]
        place = next((place for place, job in enumerate(line) if job.plan == plan), None)
        if place is None:
            return None
        job = line[place]
        del line[place]
        self._longer_than[len(line)] -= 1
        self._count -= 1
        self._of_plan[plan] -= 1
        if not self._of_plan[plan]:
            del self._of_plan[plan]
        self._bytes[device] -= job.num_bytes
        if not line:
            del self._lines[device], self._bytes[device]
        return job

    def clear(self) -> list[Job]:
        """All that waited."""
        left = [job for line in self._lines.values() for job in line]
        for held in (self._lines, self._longer_than, self._bytes, self._of_plan):
            held.clear()
        self._count = 0
        return left
