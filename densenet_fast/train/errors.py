"""What ends a command, and the exit status that goes with it."""

from __future__ import annotations

import signal

WRONG_INPUT = 2  # as argparse has it
FAILED = 1


class UsageError(Exception):
    """The command cannot be carried out as it was given, or with what it was given."""


class DataError(UsageError):
    """A data set is not there, or its files are not what their format says."""


class TrainingError(Exception):
    """Training cannot go on: its numbers are no longer finite, or a process is lost."""


class StoppedError(Exception):
    """A signal ended the command; what it had done by then is in the checkpoint `saved`."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")
        self.status = 128 + number
