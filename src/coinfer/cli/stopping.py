"""How a command that may run for ever is told to end."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from ..data.live import Stop


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """SIGTERM or Ctrl-C sets `stop`, and what is under way goes on.  A second one ends that as well."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    # Who started us may want one ignored.
    before = {number: handler for number, handler in handlers.items() if handler is not signal.SIG_IGN}

    times = itertools.count()

    def told(number: int, frame: FrameType | None) -> None:
        # Handlers stay until the end: one that is changed while both signals wait loses the second.
        if next(times):
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, told)
    # Two signals at once may both go to another thread: then nothing wakes the main one, which is to run the handlers.
    woken = signal.set_wakeup_fd(stop.waker, warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
