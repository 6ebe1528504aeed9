"""The page of the `gate` suite, made from its record alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.report import Page, Table, intro
from benchmarks.suites import step_page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

PARTS = {"memory": "peak memory", "time": "training step", "inference": "inference"}


@dataclass(frozen=True)
class Ratio:
    """The naive network's figure over one of ours, and the floor under it."""

    network: str
    part: str
    peer: str
    value: float
    floor: float

    @property
    def below(self) -> bool:
        """Whether it is under its floor."""
        return self.value < self.floor

    @property
    def text(self) -> str:
        """What is compared."""
        return f"{PARTS[self.part]} of {self.network}, {PEERS[self.peer].label}"


def ratios(record: Record) -> list[Ratio]:
    """All ratios that were measured and have a floor."""
    found = []
    for data in record["settings"]["networks"]:
        network = NetworkSpec.from_json(data).title
        for part, floors in record["settings"]["floors"][network].items():
            if part == "memory":
                values = step_page.memory_of(record, network)
            else:
                values = step_page.minima_of(record, part, network)
            naive = step_page.best_naive(values)
            for peer, floor in floors.items():
                if naive is not None and peer in values:
                    found.append(Ratio(network, part, peer, naive / values[peer], floor))
    return found


def page(record: Record) -> Page:
    """One table: each ratio, its floor, and whether it is above."""
    result = Page("Ratios against the naive network, and their floors")
    result.add(*intro(record))
    result.add(
        "Peak memory as in the `step` suite, gradients allocated before the step; times are the "
        f"minimum of {record['settings']['rounds']} rounds in turn. A ratio of memory below its "
        "floor fails; a speed below its floor is worth a look, with nothing else running."
    )
    table = Table(("naive / this", "measured", "floor", "verdict"))
    for ratio in ratios(record):
        verdict = "**below**" if ratio.below else "above"
        table.rows.append((ratio.text, f"{ratio.value:.2f}×", f"{ratio.floor}×", verdict))
    if table.rows:
        result.add(table)
    result.not_measured(
        f"{text} of {entry['network']}, {entry['peer']}: {entry['error']}"
        for part, text in PARTS.items()
        for entry in record[part]
        if "error" in entry
    )
    return result


def figure(record: Record) -> Figure | None:
    """The step suite's bars."""
    return step_page.figure(record)
