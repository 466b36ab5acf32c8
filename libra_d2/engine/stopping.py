"""How a run is asked to stop, and how it says that it did."""

import os
import shlex
import signal
import sys
import time
from types import FrameType

__all__ = [
    "REQUEUE_STATUS",
    "STATUSES",
    "FinishedEarly",
    "NonFiniteError",
    "Signals",
    "StoppedError",
    "how_to_resume",
]

# Of a job that is to be put into its queue again: sysexits.h, EX_TEMPFAIL.
REQUEUE_STATUS = 75
_SAME = 0.5  # seconds in which two signals are one
# The exit statuses of the signals that a run answers to.
STATUSES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGUSR1: REQUEUE_STATUS}


class StoppedError(SystemExit):
    """Ends a run with a sentence and an exit status; no error of the program, so no traceback.

    Args:
        sentence: for the user.
        status: of the process.
    """

    def __init__(self, sentence: str, status: int = 2):
        super().__init__(status)
        self.sentence = sentence


class FinishedEarly(SystemExit):
    """Ends the loop of a training that has nothing to gain.

    Args:
        reason: for the log.
    """

    def __init__(self, reason: str):
        super().__init__(0)
        self.reason = reason


class NonFiniteError(ValueError):
    """Losses, gradients or weights are not finite."""


class Signals:
    """Remembers that SIGINT, SIGTERM or SIGUSR1 came, while it is entered.

    A second SIGINT stops at once, as a first does anywhere else.
    """

    def __init__(self):
        self.received = 0
        self.at_once = False  # whether to raise what came, where nothing can be lost
        self._before, self._depth = {}, 0
        self._process = os.getpid()
        self._when = 0.0

    def __enter__(self) -> "Signals":
        if not self._depth:
            self._before = {number: signal.signal(number, self._receive) for number in STATUSES}
        self._depth += 1
        return self

    def __exit__(self, *_) -> None:
        self._depth -= 1
        if not self._depth:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a process that loads data; its parent tells it when to end
        if self.received:
            # A terminal sends one to all processes, which a parent hands on once more.
            if number == signal.SIGINT and time.monotonic() - self._when > _SAME:
                raise KeyboardInterrupt
            return
        self.received, self._when = number, time.monotonic()
        if self.at_once:
            name = signal.Signals(number).name
            raise StoppedError(f"stopped by {name} before the first step", STATUSES[number])


def how_to_resume() -> str:
    """The command line of this process, made to go on with its run."""
    arguments = [a for a in sys.argv[1:] if a not in ("--overwrite", "--resume")]
    program = [sys.argv[0], "--resume", *arguments]  # before the overrides, which come last
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return f"torchrun ... {shlex.join(program)}"
    return shlex.join(["python", *program])
