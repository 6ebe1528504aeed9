"""The progress bar of a run, in units of estimated work."""

from __future__ import annotations

from types import TracebackType

from tqdm import tqdm

BAR = "{percentage:3.0f}% |{bar}| {elapsed}<{remaining}  {desc}"


class Progress:
    """One bar on standard error; `total` is known once the suite has planned its work."""

    def __init__(self, *, visible: bool = True) -> None:
        self._bar = tqdm(total=1.0, bar_format=BAR, disable=not visible, mininterval=0.5)

    def start(self, total: float) -> None:
        """Set the amount of work, in any unit."""
        self._bar.reset(total=total)

    def describe(self, text: str) -> None:
        """Say what is being done."""
        self._bar.set_description_str(text, refresh=False)

    def advance(self, work: float = 1.0) -> None:
        """Count work as done."""
        self._bar.update(work)

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()
