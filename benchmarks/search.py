"""The largest size that fits a budget, found with few measurements.

A prediction says where to measure first. What was measured there corrects it, and the search ends
when a size was measured to fit and the next larger one not to.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.measure import MeasurementError, OutOfMemoryError

MOST_MEASUREMENTS = 20
MOST_CORRECTION = 2.0  # a prediction farther off says nothing


@dataclass(frozen=True)
class Measured:
    """What one size takes."""

    size: int
    bytes: int | None  # None: more than there was


@dataclass
class Bracket:
    """What is known: sizes from 1 up to `fits` fit, those from `next` on do not."""

    resolution: Callable[[int], int]  # distance to the size below that is close enough
    fits: Measured | None = None
    next: Measured | None = None
    measurements: int = 0

    @property
    def low(self) -> int:
        """The largest size that fits, or 0."""
        return self.fits.size if self.fits else 0

    @property
    def closed(self) -> bool:
        """Whether no size in between is left to measure."""
        if self.next is None:
            return False
        return self.next.size - self.low <= (self.resolution(self.next.size) if self.fits else 1)

    def add(self, measured: Measured, budget: int) -> None:
        """Take up a measurement of a size in between."""
        self.measurements += 1
        if measured.bytes is not None and measured.bytes <= budget:
            self.fits = measured
        else:
            self.next = measured

    def candidate(self, guess: int) -> int:
        """What to measure next, given the corrected prediction of the largest size that fits."""
        if not self.measurements:
            return max(1, guess)
        # One measurement closes the bracket if the guess is right; farther off each time if not.
        farther = 2 ** (self.measurements - 1)
        if self.next is None:
            return max(guess, self.low + self.resolution(self.low) * farther)
        high = self.next.size
        if self.fits is None:
            return max(1, min(guess, high - self.resolution(high) * farther))
        if self.measurements % 2:  # the guess alone might creep
            return (self.low + high) // 2
        if guess <= self.low:
            return self.low + self.resolution(self.low)
        return min(guess, high - self.resolution(high))


def largest_within(needs: Callable[[int], int], budget: int) -> int:
    """The largest size from 1 on whose need, which grows with it, is within the budget; or 0."""
    end = 1
    while needs(end) <= budget:
        end *= 2
    return bisect_right(range(1, end), budget, key=needs)


def search(
    bracket: Bracket,
    measure: Callable[[int], int],
    predict: Callable[[int], int],
    budget: int,
) -> None:
    """Close the bracket; what was measured is in it also after an error.

    A size that `measure` has no memory for does not fit.
    """
    correction = 1.0  # measured over predicted, where it was measured last
    while not bracket.closed:
        if bracket.measurements == MOST_MEASUREMENTS:
            raise MeasurementError(f"not found within {MOST_MEASUREMENTS} measurements")
        size = bracket.candidate(largest_within(predict, int(budget / correction)))
        try:
            used = measure(size)
        except OutOfMemoryError:
            bracket.add(Measured(size, None), budget)
        else:
            bracket.add(Measured(size, used), budget)
            correction = min(max(used / predict(size), 1 / MOST_CORRECTION), MOST_CORRECTION)
