"""What ends a command, and the exit status that goes with it."""

from __future__ import annotations

import errno
import signal

WRONG_INPUT = 2  # as argparse has it
FAILED = 1

# In errors of PyTorch's allocators, of CUDA's libraries, of the operating system, and of loaders
# whose processes the system has ended.
_LACK = (
    "out of memory",
    "can't allocate memory",
    "not enough memory",
    "Cannot allocate memory",
    "MemoryError",
    "ALLOC_FAILED",
    "killed by signal: Killed",
    "out of shared memory",
)


class UsageError(Exception):
    """The command cannot be carried out as it was given, or with what it was given."""


class DataError(UsageError):
    """A data set is not there, or its files are not what their format says."""


class TrainingError(Exception):
    """The command cannot go on: a loss is not finite, a process is lost, a network is too large."""


class StoppedError(Exception):
    """A signal ended the command; what it had done by then is in the checkpoint `saved`."""

    def __init__(self, number: int, saved: str) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}; {saved}")
        self.status = 128 + number


def lack_of_memory(error: Exception) -> str:
    """What an error says of memory that could not be had; "" for other errors.

    An error of a loader's worker ends with the worker's own words, below its traceback.
    """
    if not isinstance(error, (MemoryError, OSError, RuntimeError)):
        return ""
    if isinstance(error, OSError) and error.errno != errno.ENOMEM:
        return ""
    lines = [line for line in str(error).splitlines() if any(text in line for text in _LACK)]
    if lines:
        return lines[-1].removeprefix("RuntimeError: ")
    return "out of memory" if isinstance(error, MemoryError) else ""


def flag(name: str) -> str:
    """The flag of an attribute."""
    return "--" + name.replace("_", "-")
