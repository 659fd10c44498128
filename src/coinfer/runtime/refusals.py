"""One warning line for each peer that is refused, and no more of them than a log can bear.

Whoever asks for nothing but refusals would fill a disk with them.  So only the first `LINES_PER_S` of a second have a
line of their own; the others are one line together, about a second later.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from math import inf

from ..protocol.messages import one_line

_LOG = logging.getLogger("coinfer.edge")
LINES_PER_S = 50


class Refusals:
    """The lines of one edge.  Not safe from several threads: the event loop's alone.

    Args:
        lines_per_s: so many lines of single refusals in a second.
        clock: tells seconds; another one than the machine's is for tests in made-up time.
    """

    def __init__(self, *, lines_per_s: int = LINES_PER_S, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = lines_per_s, clock
        self._since_s, self._count = -inf, 0

    def note(self, peer: str, why: str, **known: object) -> None:
        """Log that a peer was refused; `known` are more fields of the line's record, None where one is not known."""
        if self._clock() - self._since_s >= 1:
            self.sum_up()
            self._since_s = self._clock()
        self._count += 1
        if self._count <= self._most:
            _LOG.warning("refused %s: %s", peer, one_line(why), extra={"peer": peer, **known})

    def sum_up(self) -> None:
        """Log how many had no line of their own, once their second is over."""
        if self._clock() - self._since_s < 1:
            return
        if self._count > self._most:
            _LOG.warning("refused %d more: a second has %d lines of them", self._count - self._most, self._most)
        self._count = 0
