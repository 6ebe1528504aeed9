"""What `convert` did."""

from __future__ import annotations

from dataclasses import dataclass

from densenet_fast.reports import NamedRow, Report, table


@dataclass(frozen=True)
class ConversionRow(NamedRow):
    """One module that `convert` knows: `reason` says why it was left as it is, or None."""

    type: str  # library and class, as it came
    reason: str | None

    @property
    def converted(self) -> bool:
        """Whether the module runs through densenet_fast now."""
        return self.reason is None


@dataclass(frozen=True)
class ConversionReport(Report[ConversionRow]):
    """Every network, block and transition that was found. `str()` gives a table.

    Whether what was converted also runs fused, layer by layer, with the parameters' type, device
    and hooks of now, says `densenet_fast.fusion_report(model)`.
    """

    @property
    def complete(self) -> bool:
        """Whether nothing was left as it is."""
        return all(row.converted for row in self.rows)

    def __str__(self) -> str:
        converted = sum(row.converted for row in self.rows)
        rows = [
            (
                row.name or "(the model)",
                row.type,
                "converted" if row.converted else f"left as it is: {row.reason}",
            )
            for row in self.rows
        ]
        lines = [f"{converted} of {len(self.rows)} parts converted", *table(rows, left=3)]
        return "\n".join(lines)
