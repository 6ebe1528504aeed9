"""Where densenet_fast is not first: each of its modes against the best of all others."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from benchmarks.peers import PEERS

Record = dict[str, Any]

# Figure of an entry of `memory` → what it is called here. All of them are better when smaller.
MEMORY = {
    "peak_gradients_allocated": "peak memory, gradients allocated",
    "peak_gradients_freed": "peak memory, gradients freed",
    "saved_for_backward": "memory kept for the backward",
}
# Part of a record → what its seconds are of.
TIMED = {
    "time": "training step",
    "inference": "inference",
    "training": "training step",
    "parity": "step of a parity run",
}
# Parts of a record of `capacity`: the most that fits, better when larger.
CAPACITIES = ("batch", "depth")
PYTORCH = "PyTorch's operators"


@dataclass(frozen=True)
class Place:
    """One figure of ours beside the best of the others."""

    where: str
    ours: str
    other: str
    ratio: float  # the other's over ours: below 1 we are not first

    @property
    def text(self) -> str:
        """A line of a list."""
        return f"{self.where}: {self.ours} is behind {self.other}, {self.ratio:.3f}×"


def places(record: Record) -> list[Place]:
    """Every comparison that a suite's record holds; one without other implementations has none."""
    return [*_implementations(record), *_kernels(record)]


def _case(record: Record, entry: dict[str, Any]) -> str:
    """What an entry was measured on, in the words of its suite."""
    if "network" in entry:
        return str(entry["network"])
    names = {"growth_rate": "k=", "seed": "seed "}
    cases = [f"{text}{entry[key]}" for key, text in names.items() if key in entry]
    return " ".join([f"suite {record['suite']}", *cases])


def _implementations(record: Record) -> Iterator[Place]:
    figures: dict[str, dict[str, float]] = defaultdict(dict)
    for entry in record.get("memory", ()):
        for key, text in MEMORY.items():
            if key in entry:
                figures[f"{text}, {_case(record, entry)}"][entry["peer"]] = entry[key]
    for part, text in TIMED.items():
        for entry in record.get(part, ()):
            if entry["seconds"]:
                figures[f"{text}, {_case(record, entry)}"][entry["peer"]] = min(entry["seconds"])
    for part in CAPACITIES:
        for entry in record.get(part, ()):
            if entry.get("fits"):
                where = f"{entry['title']}, {entry['budget']} MiB"
                figures[where][entry["peer"]] = 1 / entry["fits"]["value"]  # larger is better
    for where, values in figures.items():
        others = {name: value for name, value in values.items() if not PEERS[name].ours}
        if not others:
            continue
        best = min(others, key=others.__getitem__)
        for name, value in values.items():
            if PEERS[name].ours:
                yield Place(where, PEERS[name].label, PEERS[best].label, others[best] / value)


def _kernels(record: Record) -> Iterator[Place]:
    for entry in record.get("kernels", ()):
        times = entry["seconds"]
        if times["ours"] and times["torch"]:
            where = f"kernel {entry['kernel']}, {entry['label']}, {entry['threads']} threads"
            ratio = min(times["torch"]) / min(times["ours"])
            yield Place(where, "the kernel", PYTORCH, ratio)


def summary(records: Iterable[Record]) -> str:
    """The list of all places where a mode of ours is not first, or that there are none."""
    found = [place for record in records for place in places(record)]
    if not found:
        return "Nothing was measured beside another implementation."
    behind = sorted((place for place in found if place.ratio < 1), key=lambda place: place.ratio)
    against = f"{len(found)} comparisons of one of its modes with the best of all others"
    if not behind:
        closest = min(found, key=lambda place: place.ratio)
        return (
            f"**densenet_fast is first in all {against}.** Closest: {closest.where}, "
            f"{closest.ours}, {closest.ratio:.3f}×."
        )
    lines = "\n".join(f"- {place.text}" for place in behind)
    return (
        f"**In {len(behind)} of {against}** (memory as it is, time by minimum; the ratio is the "
        f"other's figure over ours, of what fits ours over the other's):\n\n{lines}"
    )
