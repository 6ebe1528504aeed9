"""What the suites' plots share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from benchmarks.peers import PEERS

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def peer_bars(
    axes: Axes,
    peers: Sequence[str],
    values: Mapping[str, float],
    text: str,
    *,
    named: bool,
) -> None:
    """A bar for each implementation; `named`: with its name beside it.

    What was not measured has a place and no bar.
    """
    bars = axes.barh(
        [place for place, name in enumerate(peers) if name in values],
        [values[name] for name in peers if name in values],
        color=[PEERS[name].color for name in peers if name in values],
    )
    axes.bar_label(bars, fmt=_figure, fontsize="small", padding=2)
    axes.set_yticks(range(len(peers)), peers if named else [""] * len(peers))
    axes.set_ylim(-0.6, len(peers) - 0.4)
    axes.invert_yaxis()
    axes.margins(x=0.18)
    axes.set_xlabel(text)
    axes.spines[["top", "right"]].set_visible(False)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
