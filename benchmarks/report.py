"""Tables of declared columns, the pages made of them, and where densenet_fast is not first.

A row is plain data. A column says where its figure stands in a row and how it is written; one that
is compared has a second column, the best of the naive network's rows of the same case over it.
"""

from __future__ import annotations

import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.peers import PEERS
from densenet_fast.train.storage import write_atomically

MISSING = "—"

Row = dict[str, Any]
Record = dict[str, Any]
Figure = Callable[[Row], Any]


# ---- Figures of a row, and how they are written


def at(*path: str) -> Figure:
    """What stands in a row under these keys."""

    def figure(row: Row) -> Any:
        found: Any = row
        for key in path:
            found = found[key]
        return found

    return figure


def fastest(part: str) -> Figure:
    """The shortest time of a part."""
    return lambda row: min(row[part]["seconds"])


def typical(part: str) -> Figure:
    """The median time of a part."""
    return lambda row: statistics.median(row[part]["seconds"])


def spread(part: str) -> Figure:
    """Distance of the quartiles of a part's times, of the median."""

    def figure(row: Row) -> float:
        low, middle, high = statistics.quantiles(row[part]["seconds"], n=4, method="inclusive")
        return (high - low) / middle

    return figure


def scaled(unit: float) -> Callable[[float], str]:
    """Writes figures in that unit, with three digits or all before the point."""

    def write(value: float) -> str:
        value /= unit
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"

    return write


plain, millions, billions = scaled(1), scaled(1e6), scaled(1e9)
mebibytes, milliseconds = scaled(2**20), scaled(1e-3)
times, four_digits = "{:.2f}×".format, "{:.4f}".format


def percent(value: float) -> str:
    """A fraction in percent."""
    return f"{100 * value:.1f} %"


# ---- Tables


@dataclass(frozen=True)
class Column:
    """One figure of each row; where it has none, `figure` raises KeyError or ValueError."""

    title: str
    figure: Figure
    write: Callable[[Any], str] = str
    ratio: str = ""  # title of the ratios to what it is compared with; "": it is not
    larger: bool = False  # is better
    rival: Figure | None = None  # what it is compared with, where that is no row of its own

    def of(self, row: Row) -> Any:
        """The figure, or None where there is none."""
        try:
            return self.figure(row)
        except (KeyError, ValueError):
            return None

    def over(self, row: Row, others: Iterable[Row]) -> float | None:
        """How many times better a row is than the best of others, or than its rival."""
        rows = [(self.rival, row)] if self.rival else [(self.figure, other) for other in others]
        found = [Column("", figure).of(other) for figure, other in rows]
        known, own = [value for value in found if value], self.of(row)
        if not known or not own:
            return None
        return own / max(known) if self.larger else min(known) / own

    def cells(self, row: Row, rows: Iterable[Row]) -> list[str]:
        """A row's figure, and its ratio to the naive network's among the rows of its case."""
        value = self.of(row)
        cells = [MISSING if value is None else self.write(value)]
        if self.ratio:
            ratio = self.over(row, [other for other in rows if is_naive(other)])
            cells.append(MISSING if ratio is None else times(ratio))
        return cells


def is_naive(row: Row) -> bool:
    """Whether a row is of the usual network, in whichever layout."""
    return "peer" in row and PEERS[row["peer"]].naive


@dataclass(frozen=True)
class Table:
    """Rows under declared columns; those of the same `case` are compared with each other."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    case: Figure = lambda row: ""
    names: str = "implementation"  # what the first column holds

    def shown(self) -> tuple[list[Column], list[Row]]:
        """The columns and rows that have figures."""
        columns = [c for c in self.columns if any(c.of(row) is not None for row in self.rows)]
        rows = [row for row in self.rows if any(c.of(row) is not None for c in columns)]
        return columns, rows

    def by_case(self) -> dict[str, list[Row]]:
        """The rows of each case."""
        cases: dict[str, list[Row]] = defaultdict(list)
        for row in self.rows:
            cases[str(self.case(row))].append(row)
        return cases

    def markdown(self) -> str:
        """In Markdown, padded so that it also reads well as plain text; "" without any figure."""
        columns, rows = self.shown()
        if not rows:
            return ""
        head = [self.names]
        for column in columns:
            head += [column.title, column.ratio] if column.ratio else [column.title]
        lines, cases = [head], self.by_case()
        for row in rows:
            case = str(self.case(row))
            label = [case, PEERS[row["peer"]].label if "peer" in row else ""]
            lines.append(
                [
                    ", ".join(filter(None, label)),
                    *(cell for c in columns for cell in c.cells(row, cases[case])),
                ]
            )
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(head))]
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]

        def render(cells: Sequence[str]) -> str:
            padded = [cells[0].ljust(widths[0])]
            padded += [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
            return f"| {' | '.join(padded)} |"

        return "\n".join(render(line) for line in (lines[0], rule, *lines[1:]))


# ---- Where densenet_fast is not first


def places(tables: Iterable[Table]) -> Iterator[tuple[float, str]]:
    """Every comparison of one of ours with others that are none of ours: its ratio, and where.

    Below 1 ours is not first.
    """
    for table in tables:
        for case, rows in table.by_case().items():
            others = [row for row in rows if "peer" in row and not PEERS[row["peer"]].ours]
            for column in (c for c in table.columns if c.ratio):
                for row in rows:
                    ratio = None if row in others else column.over(row, others)
                    if ratio is not None:
                        where = (column.title, table.title, case, row.get("peer", ""))
                        yield ratio, ", ".join(filter(None, where))


def ranking(tables: Iterable[Table]) -> str:
    """All places where one of ours is not first, or that there is none; "" of no comparison."""
    found = sorted(places(tables))
    if not found:
        return ""
    against = f"{len(found)} comparisons of one of its modes with the best of all others"
    lines = [f"- {where}: {ratio:.3f}×" for ratio, where in found]
    behind = sum(ratio < 1 for ratio, _ in found)
    if not behind:
        closest = lines[0].removeprefix("- ")
        return f"**densenet_fast is first in all {against}.** Closest: {closest}."
    text = f"**densenet_fast is not first in {behind} of {against}:**"
    return "\n\n".join([text, "\n".join(lines[:behind])])


# ---- Pages


def environment_text(environment: dict[str, Any]) -> str:
    """Two paragraphs about the machine and the versions of a result."""
    own = environment["densenet_fast"]
    versions = ", ".join(f"{name} {text}" for name, text in environment["versions"].items() if text)
    if environment["device"].startswith("cuda"):
        obstacle, compiler = own["cuda_reason"], own["cuda_nvcc"]
        compiled = f"CUDA kernels for {', '.join(own['cuda_architectures'])}"
    else:
        obstacle, compiler = own["extension_error"], own["compiler"]
        compiled = f"CPU kernels for {own['cpu_isa']}"
    kernels = f"{compiled}, built by {compiler}"
    if obstacle:
        kernels = f"**its reference implementation ran** ({obstacle})"
    return (
        f"{settings_text(environment)}\n\n"
        f"Versions: {versions}; densenet_fast {own['version']}: {kernels}."
    )


def settings_text(settings: dict[str, Any]) -> str:
    """The settings that are numbers or names, or lists of such."""
    lists = {key: value if isinstance(value, list) else [value] for key, value in settings.items()}
    return "; ".join(
        f"{key.replace('_', ' ')}: {', '.join(map(str, values))}"
        for key, values in lists.items()
        if values not in ([], [None]) and not any(isinstance(value, dict) for value in values)
    )


def page(
    name: str,
    title: str,
    record: Record,
    tables: Sequence[Table],
    findings: Sequence[str],
    errors: Sequence[str],
) -> str:
    """The page of a suite's record, in Markdown."""
    blocks = [f"# {title}", f"Command: `{record['command']}`"]
    if not record["complete"]:
        reason = f"Stopped by {record['error']}" if "error" in record else "Interrupted"
        blocks.append(f"**{reason}: the results below are partial.**")
    blocks += [environment_text(record["environment"]), settings_text(record["settings"])]
    blocks.append(f"How this is measured and what the columns are: docs/benchmarks.md, `{name}`.")
    for table in tables:
        text = table.markdown()
        blocks += [f"## {table.title}"] if text and table.title else []
        blocks += [text] if text else []
    blocks += ["## Findings", *findings] if findings else []
    blocks += ["Not measured:", "\n".join(f"- {error}" for error in errors)] if errors else []
    ranked = ranking(tables)
    blocks += ["## Where densenet_fast is not first", ranked] if ranked else []
    return "\n\n".join(blocks) + "\n"


def write_json(output: Path, name: str, record: Record) -> Path:
    """Write the raw figures."""
    path = output / f"{name}.json"
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    write_atomically(path, text.encode())
    return path
