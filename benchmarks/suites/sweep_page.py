"""The page and the plot of the `sweep` suite, made from its record alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.report import Page, Table, intro, mebibytes, ratio, seconds
from benchmarks.suites.step_page import PEAK, best_naive, entries_of, timings_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

# Part of the record → what it measures.
TIMED = {"time": "training step", "inference": "inference"}


@dataclass(frozen=True)
class Comparison:
    """One implementation of ours against the naive network's faster layout."""

    network: str
    part: str
    peer: str
    speed: float  # naive's seconds over ours

    @property
    def text(self) -> str:
        """Where that is."""
        return f"{TIMED[self.part]} of {self.network}, {self.peer}: {self.speed:.3f}×"


def _minima(record: Record, part: str, network: str) -> dict[str, float]:
    return {name: t.minimum for name, t in timings_of(record, part, network).items()}


def comparisons(record: Record) -> list[Comparison]:
    """All that was measured of ours beside a naive network."""
    found = []
    for sweep in record["settings"]["sweeps"]:
        for case in sweep["cases"]:
            for part in TIMED:
                minima = _minima(record, part, case["network"])
                naive = best_naive(minima)
                for name, own in minima.items():
                    if naive is not None and PEERS[name].ours:
                        found.append(Comparison(case["network"], part, name, naive / own))
    return found


def verdict(record: Record) -> str:
    """Where ours is slower than naive, or that it is nowhere."""
    found = sorted(comparisons(record), key=lambda comparison: comparison.speed)
    if not found:
        return "Slower than naive? Nothing was measured side by side."
    slower = [comparison for comparison in found if comparison.speed < 1]
    against = "comparisons with the naive network in its faster layout"
    if not slower:
        return (
            f"**densenet_fast is slower nowhere**, in {len(found)} {against}. "
            f"Closest: {found[0].text}."
        )
    lines = "\n".join(f"- {comparison.text}" for comparison in slower)
    return f"**densenet_fast is slower in {len(slower)} of {len(found)}** {against}:\n\n{lines}"


def page(record: Record) -> Page:
    """A table for each sweep, and the verdict."""
    result = Page("Growth rates and depths: is densenet_fast slower than naive anywhere?")
    settings = record["settings"]
    result.add(*intro(record))
    result.add(
        "DenseNet-BC for 32×32 images, float32. A step is forward, cross entropy and backward, "
        "without an optimizer; inference is without gradients. All implementations start from the "
        "same weights, and densenet_fast gets channels_last input.",
        f"Seconds: the minimum of {settings['rounds']} rounds after an untimed one, in which all "
        "implementations take turns in one process. Speed: the faster naive layout's seconds over "
        "this one's.",
    )
    if record["memory"]:
        result.add(
            "Peak: most memory of a step beyond what was resident before it, in a child process of "
            "its own, with the parameters' gradients allocated before the step; measured as in the "
            "`step` suite, whose page says more."
        )
    for sweep in settings["sweeps"]:
        result.heading(sweep["title"])
        result.add(_table(record, sweep))
    errors = [
        f"- {e['network']}, {e['peer']}: {e['error']}" for e in record["memory"] if "error" in e
    ]
    if errors:
        result.add("Memory was not measured:\n\n" + "\n".join(errors))
    result.heading("Slower than naive?")
    result.add(verdict(record))
    return result


def _table(record: Record, sweep: dict[str, Any]) -> Table:
    networks = {
        spec.title: spec for spec in map(NetworkSpec.from_json, record["settings"]["networks"])
    }
    columns = [f"{sweep['varied']}, implementation", "images"]
    columns += ["step, s", "speed", "inference, s", "speed", "peak, MiB", "naive / this"]
    table = Table(columns if record["memory"] else columns[:-2])
    for case in sweep["cases"]:
        steps, inferences = (_minima(record, part, case["network"]) for part in TIMED)
        peaks = _peaks(record, case["network"])
        for name in record["settings"]["peers"]:
            row = (
                f"{case['value']}, {PEERS[name].label}",
                str(networks[case["network"]].batch_size),
                seconds(steps.get(name)),
                ratio(best_naive(steps), steps.get(name)),
                seconds(inferences.get(name)),
                ratio(best_naive(inferences), inferences.get(name)),
                mebibytes(peaks.get(name)),
                ratio(best_naive(peaks), peaks.get(name)),
            )
            table.rows.append(row[: len(table.columns)])
    return table


def _peaks(record: Record, network: str) -> dict[str, float]:
    entries = entries_of(record, "memory", network).items()
    return {name: entry[PEAK] for name, entry in entries if PEAK in entry}


def figure(record: Record) -> Figure | None:
    """Speed over growth rate and over depth."""
    found = {(c.network, c.part, c.peer): c.speed for c in comparisons(record)}
    if not found:
        return None
    from matplotlib.figure import Figure

    sweeps = record["settings"]["sweeps"]
    plot = Figure(figsize=(1 + 4.5 * len(sweeps), 4), layout="constrained")
    for sweep, axes in zip(sweeps, plot.subplots(1, len(sweeps), squeeze=False)[0], strict=True):
        for peer in record["settings"]["peers"]:
            for part, style in (("time", "-"), ("inference", ":")):
                points = [
                    (case["value"], found[case["network"], part, peer])
                    for case in sorted(sweep["cases"], key=lambda case: case["value"])
                    if (case["network"], part, peer) in found
                ]
                if points:
                    label = f"{peer}, {TIMED[part]}"
                    color = PEERS[peer].color
                    axes.plot(
                        *zip(*points, strict=True), style, marker=".", color=color, label=label
                    )
        axes.set_xticks([case["value"] for case in sweep["cases"]])
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set(xlabel=sweep["varied"], ylabel="speed, naive's faster layout = 1", ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = plot.axes[0].get_legend_handles_labels()
    plot.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    return plot
