"""Plain arguments are refused here, in plain words, before anything is made of them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from numbers import Integral, Real
from typing import Any, TypeVar


def integer(name: str, value: Any, minimum: int = 1) -> int:
    """`value` as an int that is at least `minimum`."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__})")
    if value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {value}")
    return int(value)


def share(name: str, value: Any, *, zero: bool) -> float:
    """`value` as a float in [0, 1], or in (0, 1] without `zero`."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r} ({type(value).__name__})")
    number = float(value)
    if not (number >= 0.0 if zero else number > 0.0) or number > 1.0:
        bounds = "between 0 and 1" if zero else "above 0 and at most 1"
        raise ValueError(f"{name} must be {bounds}, got {value}")
    return number


def compressed(num_features: int, share: float) -> int:
    """floor(num_features * share), where 0.29 * 100 is 29 although floating point says less."""
    kept = math.floor(num_features * share + 1e-9)
    if kept < 1:
        raise ValueError(
            f"compression={share} leaves no channel of the {num_features} before a transition"
        )
    return kept


def flag(name: str, value: Any) -> bool:
    """`value` if it is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r} ({type(value).__name__})")
    return value


def layer_counts(name: str, value: Any) -> tuple[int, ...]:
    """The number of layers of every block."""
    unordered = (str, bytes, Mapping, Set)
    if isinstance(value, unordered) or not isinstance(value, Iterable):
        raise TypeError(
            f"{name} must be a sequence of integers, one per block, "
            f"got {value!r} ({type(value).__name__})"
        )
    layers = tuple(integer(f"{name}[{i}]", count) for i, count in enumerate(value))
    if not layers:
        raise ValueError(f"{name} must name at least one block, got none")
    return layers


Choice = TypeVar("Choice", bound=str)


def one_of(name: str, value: Any, choices: Sequence[Choice]) -> Choice:
    """`value` if it is one of the strings `choices`."""
    for choice in choices:
        if value == choice:
            return choice
    wrong = ValueError if isinstance(value, str) else TypeError
    raise wrong(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")


def one_number_of(name: str, value: Any, choices: Collection[int]) -> int:
    """`value` as an int that is one of `choices`."""
    number = integer(name, value)
    if number not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}")
    return number


def memory_budget(mode: str | None, value: Any) -> int | None:
    """`value` in bytes, which "auto" needs and no other mode reads."""
    if value is not None:
        return integer("memory_budget", value)
    if mode == "auto":
        raise ValueError('checkpoint="auto" needs memory_budget, the bytes that a step may take')
    return None
