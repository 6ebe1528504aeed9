"""SIGTERM and SIGINT as a request: the step that runs is finished and saved first."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPING = (signal.SIGTERM, signal.SIGINT)


class StopRequest:
    """Whether a signal has asked to stop; the second one acts at once."""

    def __init__(self) -> None:
        self.number = 0

    def receive(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of a signal."""
        if self.number:
            raise KeyboardInterrupt
        self.number = number


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """While it lasts, signals are noted in the request instead of ending the process."""
    request = StopRequest()
    try:
        before = [signal.signal(number, request.receive) for number in STOPPING]
    except ValueError:  # not the main thread: it gets no signals
        yield request
        return
    try:
        yield request
    finally:
        for number, handler in zip(STOPPING, before, strict=True):
            signal.signal(number, handler)


def leave_signals_to_parent(_: int) -> None:
    """For a data loader's worker: a signal to the whole group must not take it from a step.

    It ends when the process that started it does.
    """
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
