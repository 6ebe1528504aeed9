"""The plot of a suite: ratios of its tables' compared columns, and the loss curves of its rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.peers import PEERS
from benchmarks.report import Column, Row, Table, is_naive
from benchmarks.suites import case_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW = 10  # steps, of a curve's running mean


def running_means(losses: Sequence[float], window: int = WINDOW) -> list[float]:
    """Mean of each loss and those before it, `window` at most."""
    return [statistics.fmean(losses[max(0, i - window) : i]) for i in range(1, len(losses) + 1)]


def write(path: Path, tables: Sequence[Table], rows: Sequence[Row]) -> list[Path]:
    """Draw a record as PNG and SVG; nothing where there is nothing to draw. Returns the files."""
    bars = _bars(tables)
    curves = [
        (f"{part}, {case_of(row)}", row) for row in rows for part in row if _losses(row, part)
    ]
    panels = len(bars) + bool(curves)
    if not panels:
        return []
    from matplotlib.figure import Figure

    widest = max([2, *(len(panel) for *_, panel in bars)])
    figure = Figure(figsize=(4 + 0.9 * widest, 3.6 * panels), layout="constrained")
    axes = figure.subplots(panels, squeeze=False)[:, 0]
    for place, panel in zip(axes, bars, strict=False):
        _draw_bars(place, *panel)
    for text, row in curves:
        style = "-" if PEERS[row["peer"]].ours else "--"
        losses = running_means(_losses(row, text.split(",")[0]))
        axes[-1].plot(range(1, len(losses) + 1), losses, style, linewidth=1, label=text)
    if curves:
        axes[-1].set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps", yscale="log")
        axes[-1].legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1))
    files = [path.with_suffix(suffix) for suffix in (".png", ".svg")]
    for file in files:
        figure.savefig(file, dpi=130)
    return files


def _losses(row: Row, part: str) -> list[float]:
    figures: Any = row[part]
    return figures.get("losses", []) if isinstance(figures, dict) else []


def _bars(tables: Sequence[Table]) -> list[tuple[str, dict[str, dict[str, float]]]]:
    """Title of a compared column → case → implementation → ratio to naive."""
    panels: dict[str, dict[str, dict[str, float]]] = {}
    for table in tables:
        for case, rows in table.by_case().items():
            for column in (c for c in table.columns if c.ratio and c.rival is None):
                ratios = _ratios(column, rows)
                if ratios:
                    label = case or table.title
                    panels.setdefault(f"{column.title}: {column.ratio}", {})[label] = ratios
    return list(panels.items())


def _ratios(column: Column, rows: Sequence[Row]) -> dict[str, float]:
    naive = [row for row in rows if is_naive(row)]
    found = {row["peer"]: column.over(row, naive) for row in rows if "peer" in row}
    return {peer: ratio for peer, ratio in found.items() if ratio is not None}


def _draw_bars(axes: Axes, title: str, cases: dict[str, dict[str, float]]) -> None:
    peers = [name for name in PEERS if any(name in ratios for ratios in cases.values())]
    width = 0.8 / len(peers)
    for index, name in enumerate(peers):
        at = [i + (index + 0.5) * width - 0.4 for i, r in enumerate(cases.values()) if name in r]
        heights = [ratios[name] for ratios in cases.values() if name in ratios]
        axes.bar(at, heights, width, color=PEERS[name].color, label=name)
    axes.axhline(1.0, color="black", linewidth=0.8)
    axes.set_title(title, loc="left", fontsize="small")
    axes.set_xticks(range(len(cases)), list(cases), rotation=20, ha="right", fontsize="x-small")
    axes.legend(fontsize="xx-small", loc="upper left", bbox_to_anchor=(1, 1))
