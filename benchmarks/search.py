"""The largest size that fits a budget, found with few measurements.

A line or a parabola through what was measured last says where to measure next; the search ends when
a size was measured to fit and the next larger one not to.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.measure import MeasurementError, OutOfMemoryError

MOST_MEASUREMENTS = 30
MOST_SIZE = 2**40  # of a curve that hardly rises
FIRST_GROWTH = 4  # of the sizes that make a line, which overshoot least; half of it for a parabola


@dataclass(frozen=True)
class Measured:
    """What one size takes."""

    size: int
    bytes: int | None  # None: more than there was


@dataclass
class Bracket:
    """What is known: sizes from 1 up to `fits` fit, those from `next` on do not."""

    resolution: Callable[[int], int]  # distance to the size below that is close enough
    degree: int  # of the curve that bytes follow: 1 or 2
    measured: list[Measured] = field(default_factory=list)
    fits: Measured | None = None
    next: Measured | None = None

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
        self.measured.append(measured)
        if measured.bytes is not None and measured.bytes <= budget:
            self.fits = measured
        else:
            self.next = measured

    def guess(self, budget: int) -> int:
        """The largest size that fits, by the curve through the last sizes measured."""
        from numpy.polynomial import Polynomial

        points = [(m.size, m.bytes - budget) for m in self.measured if m.bytes is not None]
        points = points[-1 - self.degree :]
        if len(points) <= self.degree:
            return self.low * FIRST_GROWTH // self.degree
        sizes, over = zip(*points, strict=True)
        roots = map(complex, Polynomial.fit(sizes, over, self.degree).roots())
        real = [float(root.real) for root in roots if abs(root.imag) < 1 and root.real > 0]
        nearest = min(real, key=lambda root: abs(root - points[-1][0]), default=0.0)
        return min(int(nearest), MOST_SIZE) or self.low * FIRST_GROWTH // self.degree

    def candidate(self, budget: int) -> int:
        """What to measure next."""
        if not self.measured:
            return 1
        guess, above = self.guess(budget), self.low + self.resolution(self.low)
        if self.next is None:
            return max(guess, above)
        if guess <= self.low:
            return above
        if self.next.bytes is None or len(self.measured) % 4 == 0:  # guesses alone might creep
            return max(above, math.isqrt(self.low * self.next.size))  # from far above soon
        return min(guess, self.next.size - self.resolution(self.next.size))


def search(bracket: Bracket, measure: Callable[[int], int], budget: int) -> None:
    """Close the bracket; what was measured is in it also after an error.

    A size that `measure` has no memory for does not fit.
    """
    while not bracket.closed:
        if len(bracket.measured) == MOST_MEASUREMENTS:
            raise MeasurementError(f"not found within {MOST_MEASUREMENTS} measurements")
        size = bracket.candidate(budget)
        try:
            used: int | None = measure(size)
        except OutOfMemoryError:
            used = None
        bracket.add(Measured(size, used), budget)
