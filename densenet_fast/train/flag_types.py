"""Types of flags: what argparse makes of their text, or refuses in plain words."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from densenet_fast.train.entries import MOST, MOST_PIXELS

# Float32 holds what comes of numbers in these bounds, a rate in Adam's first step for example.
SMALLEST, LARGEST = 1e-30, 1e30


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A type of argparse: whole numbers from `least` to `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value <= most:
            between = f"of at least {least}" if value < least else f"of at most {most}"
            raise argparse.ArgumentTypeError(f"expected a whole number {between}, got {text!r}")
        return value

    return parse


def real(low: float, high: float = LARGEST, *, above: bool = False) -> Callable[[str], float]:
    """A type of argparse: numbers from `low`, or above it, to `high`.

    Those that float32 could not hold are refused, tiny ones too.
    """

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        held = value == 0 or abs(value) >= SMALLEST
        if held and low <= value <= high and not (above and value == low):
            return value
        least = f"above {low:g}" if above else f"of at least {low:g}"
        smallest = "" if held or math.isnan(value) else f" (not below {SMALLEST:g} unless 0)"
        raise argparse.ArgumentTypeError(
            f"expected a number {least} and at most {high:g}{smallest}, got {text!r}"
        )

    return parse


def path(text: str) -> Path:
    """A type of argparse: paths, of which an empty one would be the current folder."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path, got ''")
    return Path(text)


PIXELS = whole(1, MOST_PIXELS)
SHARE = real(0, 1)
