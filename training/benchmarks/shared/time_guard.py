"""A hard limit on time, for benchmarks on a machine that is lent by the minute."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

GRACE = 15  # seconds after the limit in which a script can write what it has


class OutOfTime(BaseException):
    """The time is used up; no Exception, so that code which survives failures does not survive this one."""


class Clock:
    """Counts down.

    Args:
        seconds: From now on.
    """

    def __init__(self, seconds: float):
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        """Seconds that are left; negative when the time is used up."""
        return self.end - time.monotonic()

    @contextmanager
    def limit(self) -> Iterator[None]:
        """Raise OutOfTime in the block when the time is used up, and end the process where that does not help.

        A long call into a library returns to Python late; everything is on disk by then, so the process may go.

        Raises:
            OutOfTime: Also at once, where no time is left.
        """
        if self.left() <= 0:
            raise OutOfTime

        def interrupt(number, frame):
            raise OutOfTime

        before = signal.signal(signal.SIGALRM, interrupt)
        killer = threading.Timer(self.left() + GRACE, os._exit, (3,))
        killer.daemon = True
        killer.start()
        signal.setitimer(signal.ITIMER_REAL, self.left())
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
            killer.cancel()
