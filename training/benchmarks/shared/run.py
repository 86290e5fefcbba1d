"""How the benchmarks run: their command lines, and a hard limit on time for a machine that is lent by the minute."""

import argparse
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

GRACE = 15  # seconds after the limit in which a script can write what it has


def create_parser(description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """A parser that prints a module's docstring as it stands."""
    return argparse.ArgumentParser(
        description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def require_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    """End the script with a message where one of these arguments is given and is not > 0."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"{name}={value!r} must be > 0.")


def default_device() -> str:
    """The accelerator's type, or "cpu"."""
    return torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"


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
