"""The page and the plot of the suites `growth` and `depth`, made from a record alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.report import MISSING, Page, Table, intro, mebibytes, percent, ratio, seconds
from benchmarks.suites.step_page import best_naive, memory_of, minima_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

# Part of the record → what it measures.
TIMED = {"time": "training step", "inference": "inference"}
LEAST_POINTS = 4  # of a quadratic fit that says something
Values = dict[str, float]


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


def comparisons(record: Record) -> list[Comparison]:
    """All that was measured of ours beside a naive network."""
    found = []
    for case in record["settings"]["cases"]:
        for part in TIMED:
            minima = minima_of(record, part, case["network"])
            naive = best_naive(minima)
            for name, own in minima.items():
                if naive is not None and PEERS[name].ours:
                    found.append(Comparison(case["network"], part, name, naive / own))
    return found


def verdict(record: Record) -> str:
    """In which of the comparisons ours is slower than naive."""
    found = sorted(comparisons(record), key=lambda comparison: comparison.speed)
    if not found:
        return "Slower than naive? Nothing was measured side by side."
    slower = [comparison for comparison in found if comparison.speed < 1]
    against = "comparisons with the naive network in its faster layout"
    if not slower:
        return (
            f"**densenet_fast is slower in none of {len(found)}** {against}. "
            f"Closest: {found[0].text}."
        )
    lines = "\n".join(f"- {comparison.text}" for comparison in slower)
    return f"**densenet_fast is slower in {len(slower)} of {len(found)}** {against}:\n\n{lines}"


def page(record: Record) -> Page:
    """A table of all cases, how the figures grow, and the verdict."""
    settings = record["settings"]
    result = Page(f"{settings['title']}: memory and speed")
    result.add(*intro(record))
    result.add(
        f"{_networks_text(settings)}, float32. A step is forward, cross entropy and backward, "
        "without an optimizer; inference is without gradients. All implementations start from the "
        "same weights, and densenet_fast gets channels_last input.",
        f"Seconds: the minimum of {settings['rounds']} rounds after an untimed one, in which all "
        "implementations take turns in one process. Speed: the faster naive layout's seconds over "
        "this one's. GFLOP: of the usual network's convolutions and classifier in one step, two "
        "for each multiplication.",
    )
    if record["memory"]:
        result.add(
            "Peak: most memory of a step beyond what was resident before it, in a child process of "
            "its own, with the parameters' gradients allocated before the step. Kept: what "
            "autograd saves between forward and backward. Both as in the `step` suite, whose page "
            "says more."
        )
    result.heading(settings["title"])
    result.add(_networks(settings), _table(record))
    result.not_measured(
        f"{text} of {e['network']}, {e['peer']}: {e['error']}"
        for part, text in (("memory", "memory"), *TIMED.items())
        for e in record[part]
        if "error" in e
    )
    if settings["varied"] == "depth":
        _growth_section(result, record)
    result.heading("Slower than naive?")
    result.add(verdict(record))
    return result


def _networks_text(settings: dict[str, Any]) -> str:
    images = "×".join(map(str, NetworkSpec.from_json(settings["networks"][0]).input_shape[2:]))
    if settings["dims"] == 2:
        return f"DenseNet-BC for {images} images"
    return f"MONAI's DenseNet with three equal blocks for inputs of {images}, as the naive network"


def _networks(settings: dict[str, Any]) -> Table:
    table = Table([settings["varied"], "images", "parameters, M", "GFLOP a step"])
    for case in settings["cases"]:
        parameters, flops = f"{case['parameters'] / 1e6:.2f}", f"{case['flops'] / 1e9:.1f}"
        table.rows.append((str(case["value"]), str(case["images"]), parameters, flops))
    return table


def _table(record: Record) -> Table:
    settings = record["settings"]
    columns = [f"{settings['varied']}, implementation"]
    columns += ["step, s", "speed", "images/s", "inference, s", "speed"]
    memory = ["peak, MiB", "naive / this", "kept, MiB"] if record["memory"] else []
    table = Table(columns + memory)
    for case in settings["cases"]:
        steps, inferences = (minima_of(record, part, case["network"]) for part in TIMED)
        peaks = memory_of(record, case["network"])
        kept = memory_of(record, case["network"], "saved_for_backward")
        for name in settings["peers"]:
            row = (
                f"{case['value']}, {PEERS[name].label}",
                seconds(steps.get(name)),
                ratio(best_naive(steps), steps.get(name)),
                f"{case['images'] / steps[name]:.3g}" if name in steps else MISSING,
                seconds(inferences.get(name)),
                ratio(best_naive(inferences), inferences.get(name)),
                mebibytes(peaks.get(name)),
                ratio(best_naive(peaks), peaks.get(name)),
                mebibytes(kept.get(name)),
            )
            table.rows.append(row[: len(table.columns)])
    return table


# How figures grow with depth


def _growth_section(result: Page, record: Record) -> None:
    """A quadratic fitted to each figure of one image, and how much of it is quadratic."""
    cases = record["settings"]["cases"]
    figures: dict[str, Callable[[str], Values]] = {
        "peak memory, MiB": lambda network: _in_mib(memory_of(record, network)),
        "kept, MiB": lambda network: _in_mib(memory_of(record, network, "saved_for_backward")),
        "step, ms": lambda network: {
            name: 1e3 * value for name, value in minima_of(record, "time", network).items()
        },
    }
    table = Table(("of one image", "fit for depth d", "quadratic share at the deepest"))
    for text, get in figures.items():
        for peer in record["settings"]["peers"]:
            points = [
                (case["value"], get(case["network"])[peer] / case["images"])
                for case in cases
                if peer in get(case["network"])
            ]
            if len(points) >= LEAST_POINTS:
                label = f"{text}, {PEERS[peer].label}"
                table.rows.append((label, *fitted(points)))
    if table.rows:
        result.heading("How it grows")
        result.add(
            "A parabola through the figures of one image, by least squares of relative errors. "
            "The arithmetic of a DenseNet itself is quadratic in its depth at one growth rate, as "
            "every layer reads all before it, and so is the time of every implementation; memory "
            "need not be.",
            table,
        )


def _in_mib(values: Values) -> Values:
    return {name: value / 2**20 for name, value in values.items()}


def fitted(points: list[tuple[float, float]]) -> tuple[str, str]:
    """`a + b·d + c·d²` through points (d, value), and the last term's share at the largest d."""
    import numpy as np

    depth, value = (np.array(axis, dtype=float) for axis in zip(*points, strict=True))
    c, b, a = np.polyfit(depth, value, 2, w=1 / value)
    deepest = depth.max()
    share = c * deepest**2 / (a + b * deepest + c * deepest**2)
    return f"{a:.3g} {b:+.3g}·d {c:+.3g}·d²", percent(share)


def figure(record: Record) -> Figure | None:
    """Speed, and peak memory of one image, over what varies."""
    settings = record["settings"]
    speeds = {(c.network, c.part, c.peer): c.speed for c in comparisons(record)}
    peaks = {case["network"]: memory_of(record, case["network"]) for case in settings["cases"]}
    panels = []
    if speeds:
        panels.append("speed, naive's faster layout = 1")
    if any(peaks.values()):
        panels.append("peak memory of a step per image, MiB")
    if not panels:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(1 + 4.5 * len(panels), 4.4), layout="constrained")
    for text, axes in zip(panels, plot.subplots(1, len(panels), squeeze=False)[0], strict=True):
        for peer in settings["peers"]:
            if text.startswith("speed"):
                for part, style in (("time", "-"), ("inference", ":")):
                    values = {
                        case["value"]: speeds.get((case["network"], part, peer))
                        for case in settings["cases"]
                    }
                    _line(axes, values, style, peer, f"{peer}, {TIMED[part]}")
            else:
                values = {
                    case["value"]: peaks[case["network"]][peer] / 2**20 / case["images"]
                    for case in settings["cases"]
                    if peer in peaks[case["network"]]
                }
                _line(axes, values, "-", peer, peer)
        if text.startswith("speed"):
            axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_xticks([case["value"] for case in settings["cases"]])
        axes.set(xlabel=settings["varied"], ylabel=text, ylim=(0, None))
        axes.spines[["top", "right"]].set_visible(False)
        place = "lower right" if text.startswith("speed") else "upper left"
        axes.legend(fontsize="x-small", loc=place)
    return plot


def _line(axes: Any, values: dict[int, float | None], style: str, peer: str, label: str) -> None:
    points = [(x, y) for x, y in sorted(values.items()) if y is not None]
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, style, marker=".", color=PEERS[peer].color, label=label)
