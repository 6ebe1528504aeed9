"""Reports: rows about the parts of a network, also found by name, and text tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar


@dataclass(frozen=True)
class NamedRow:
    """A row about one part of a network, called as in `named_modules()`."""

    name: str


Row = TypeVar("Row", bound=NamedRow)


@dataclass(frozen=True)
class Report(Generic[Row]):
    """Iterable over its rows; `report[name]` is one of them."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)


def table(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Lines with aligned columns, the first `left` of them at their left ends."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if at < left else text.rjust(width)
            for at, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
