"""What `convert` did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class ConversionRow:
    """One module that `convert` knows: `reason` says why it was left as it is, or None."""

    name: str  # as in `named_modules()`; empty for the model itself
    type: str  # library and class, as it came
    reason: str | None

    @property
    def converted(self) -> bool:
        """Whether the module runs through densenet_fast now."""
        return self.reason is None


@dataclass(frozen=True)
class ConversionReport:
    """Every network, block and transition that was found. `str()` gives a table.

    Whether what was converted also runs fused, layer by layer, with the parameters' type, device
    and hooks of now, says `densenet_fast.fusion_report(model)`.
    """

    rows: tuple[ConversionRow, ...]

    @property
    def complete(self) -> bool:
        """Whether nothing was left as it is."""
        return all(row.converted for row in self.rows)

    def __iter__(self) -> Iterator[ConversionRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> ConversionRow:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(name)

    def __str__(self) -> str:
        converted = sum(row.converted for row in self.rows)
        names = [row.name or "(the model)" for row in self.rows]
        name_width = max(map(len, names), default=0)
        type_width = max((len(row.type) for row in self.rows), default=0)
        lines = [f"{converted} of {len(self.rows)} parts converted"]
        for name, row in zip(names, self.rows, strict=True):
            how = "converted" if row.converted else f"left as it is: {row.reason}"
            lines.append(f"{name:<{name_width}}  {row.type:<{type_width}}  {how}")
        return "\n".join(lines)
