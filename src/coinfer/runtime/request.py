"""A request's way through the device: handed in, asked of the edge, ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..errors import BusyError, PlanError, RefusedError
from ..plan import Plan
from ..protocol import Busy, Failure, Reply, Result
from ..timeline import Answered, Outcome, Span

Array = NDArray[Any]
# What an edge says of a request.
Event = Reply | Failure | Busy


class Found(NamedTuple):
    """What the device itself computed, and the exit that it comes from."""

    result: Result
    exit: int | None


class Handed(NamedTuple):
    """A request as the caller handed it in, and when on the device's clock."""

    request: int
    x: ArrayLike
    start_s: float


@dataclass(slots=True)
class Asked:
    """A request on its way: framed and ready to be sent, with what has happened to it so far."""

    request: int
    plan: Plan
    start_s: float
    frame: bytes
    payload_bytes: int
    wire_bytes: int
    spans: list[Span] = field(default_factory=list)
    sent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Answer:
    """What came of one request.

    Either `outputs`, the network's output tensors (1, *shape) (of an exit the first alone), or with `plan.top` the best
    `classes` (k,) with their softmax `scores` (k,), best first; nothing of a request that was dropped or late.
    """

    request: int
    outcome: Outcome
    spans: tuple[Span, ...]
    outputs: tuple[Array, ...]
    classes: NDArray[np.int64] | None = None
    scores: NDArray[np.float32] | None = None

    @property
    def answered(self) -> Answered:
        """Which machine answered, or why none did."""
        return self.outcome.answered

    @property
    def is_answered(self) -> bool:
        """Whether there is an answer."""
        return bool(self.outputs) or self.classes is not None

    @property
    def label(self) -> int:
        """The best class.

        Raises:
            PlanError: there is no answer.
        """
        if not self.is_answered:
            raise PlanError(f"request {self.request} has no answer: it was {self.answered}")
        return int(self.outputs[0].argmax()) if self.classes is None else int(self.classes[0])


class Ended(NamedTuple):
    """A request that is over: its Answer, not recorded yet; `error` where the edge could not give one."""

    answer: Answer
    error: RefusedError | None = None


def refusal_of(asked: Asked, event: Failure | Busy) -> RefusedError:
    """Why the edge did not answer a request."""
    which = f"request {asked.request}"
    if isinstance(event, Busy):
        text = f"the edge is busy: ask again after {event.retry_after_s:g} s, {which} ({asked.plan.label})"
        return BusyError(text, retry_after_s=event.retry_after_s)
    return RefusedError(f"the edge could not answer {which}: {event.text} ({asked.plan.label})")
