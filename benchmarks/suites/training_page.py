"""The page and the plot of the main job, made from its record alone."""

from __future__ import annotations

import statistics
import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from benchmarks.digits import TEST_IMAGES
from benchmarks.peers import PEERS
from benchmarks.report import (
    MISSING,
    Page,
    Table,
    intro,
    loss_text,
    mebibytes,
    percent,
    ratio,
    seconds,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

Entry = dict[str, Any]

REFERENCE = "naive"
EFFICIENT = "memory-efficient"
LAYOUT_TWIN = "naive-channels-last"  # the same sums in another order: the drift of rounding
DRIFT_FACTOR = 3.0
LEAST_TOLERANCE = 0.02  # of a float32 stage, where the drift happens to be smaller


def stage_losses(losses: list[float], stage_steps: int) -> list[float]:
    """Mean training loss of each stage; a short rest joins the last whole stage."""
    whole = max(1, len(losses) // stage_steps)
    bounds = [i * stage_steps for i in range(whole)] + [len(losses)]
    return [statistics.fmean(losses[a:b]) for a, b in pairwise(bounds) if a < b]


def largest_difference(losses: list[float], reference: list[float]) -> float:
    """Largest relative difference of two lists of stage losses; NaN counts as infinite."""
    pairs = zip(losses, reference, strict=True)
    differences = [abs(a - b) / max(abs(b), sys.float_info.min) for a, b in pairs]
    return max(d if d == d else float("inf") for d in differences)


def _by_peer(entries: list[Entry], rate: int) -> dict[str, Entry]:
    return {entry["peer"]: entry for entry in entries if entry["growth_rate"] == rate}


def _differences(record: Record, part: str) -> dict[tuple[int, str], float]:
    """Largest relative difference from the reference, by growth rate and peer."""
    stage = record["settings"]["parity_stage_steps" if part == "parity" else "stage_steps"]
    found = {}
    for rate in record["settings"]["growth_rates"]:
        peers = _by_peer(record[part], rate)
        if REFERENCE not in peers:
            continue
        # An interrupted run may have one step more of the first peers: compare the common ones.
        common = min(len(entry["losses"]) for entry in peers.values())
        if common == 0:
            continue
        losses = {
            name: stage_losses(entry["losses"][:common], stage) for name, entry in peers.items()
        }
        for name in losses:
            found[rate, name] = largest_difference(losses[name], losses[REFERENCE])
    return found


def _evaluation_differences(record: Record) -> dict[tuple[int, str], float]:
    """Relative difference of the float64 test loss from the reference, by rate and peer."""
    found = {}
    for rate in record["settings"]["growth_rates"]:
        peers = _by_peer(record["parity"], rate)
        reference = peers.get(REFERENCE, {}).get("test_loss")
        for name, entry in peers.items():
            if reference is not None and "test_loss" in entry:
                found[rate, name] = largest_difference([entry["test_loss"]], [reference])
    return found


def float32_tolerance(record: Record) -> float | None:
    """Tolerance of a float32 stage, from the drift between the two naive layouts."""
    differences = _differences(record, "training")
    drift = [value for (_, name), value in differences.items() if name == LAYOUT_TWIN]
    return max(LEAST_TOLERANCE, DRIFT_FACTOR * max(drift)) if drift else None


def failures(record: Record) -> list[str]:
    """Float64 losses that do not agree with the naive network's, and memory not measured.

    In evaluation mode only our own must agree: torchvision's `memory_efficient` cannot.
    """
    tolerance = record["settings"]["float64_tolerance"]
    evaluation = _evaluation_differences(record)
    judged = {
        "training": _differences(record, "parity"),
        "test": {key: value for key, value in evaluation.items() if PEERS[key[1]].ours},
    }
    unmeasured = [
        f"k={entry['growth_rate']}, {entry['peer']}: {entry['error']}"
        for entry in record["memory"]
        if "error" in entry
    ]
    return unmeasured + [
        f"k={rate}: the float64 {kind} loss of {name} differs from {REFERENCE}'s by {value:.1e}, "
        f"more than {tolerance:.0e}"
        for kind, differences in judged.items()
        for (rate, name), value in differences.items()
        if not value <= tolerance
    ]


def page(record: Record) -> Page:
    """Tables of figures, agreement and losses."""
    settings = record["settings"]
    result = Page("Training on handwritten digits: naive against densenet_fast")
    result.add(
        *intro(record),
        f"DenseNet-BC of depth {settings['depth']}, trained on scikit-learn's handwritten digits "
        f"upscaled to 32×32, batches of {settings['batch_size']}, {settings['steps']} steps of "
        f"AdamW, seed {settings['seed']}. All implementations start from the same weights, see the "
        "same batches, and take their steps in turn in one process.",
    )
    _figures_section(result, record)
    _agreement_section(result, record)
    _losses_section(result, record)
    return result


def _figures_section(result: Page, record: Record) -> None:
    result.heading("Memory, speed and accuracy")
    table = Table(
        (
            "growth rate, implementation",
            "peak MiB",
            "of naive",
            "peak MiB, gradients freed",
            "saved MiB",
            "s/step",
            "speed",
            "test loss",
            "test accuracy",
        )
    )
    errors = []
    for rate in record["settings"]["growth_rates"]:
        trained, memory = _by_peer(record["training"], rate), _by_peer(record["memory"], rate)
        medians = {
            name: statistics.median(entry["seconds"])
            for name, entry in trained.items()
            if entry["seconds"]
        }
        naive_time = min((t for name, t in medians.items() if PEERS[name].naive), default=None)
        base = memory.get(REFERENCE, {}).get("peak_gradients_allocated")
        for name in record["settings"]["peers"]:
            figures, time = memory.get(name, {}), medians.get(name)
            peak = figures.get("peak_gradients_allocated")
            table.rows.append(
                (
                    f"k={rate}, {PEERS[name].label}",
                    mebibytes(peak),
                    ratio(peak, base),
                    mebibytes(figures.get("peak_gradients_freed")),
                    mebibytes(figures.get("saved_for_backward")),
                    seconds(time),
                    ratio(naive_time, time),
                    loss_text(trained.get(name, {}).get("test_loss")),
                    percent(trained.get(name, {}).get("test_accuracy")),
                )
            )
            if "error" in figures:
                errors.append(f"- k={rate}, {name}: memory was not measured: {figures['error']}")
    result.add(
        table,
        "Peak: most memory of a step (forward, cross entropy, backward) beyond what was resident "
        "before it, in a child process of its own after a warm-up step, with the parameters' "
        "gradients allocated before the step and zeroed in place; *gradients freed*: they are "
        "created by the step and count. Saved: bytes autograd keeps between forward and backward. "
        "Seconds: median of all training steps, without the optimizer. Speed: the faster naive "
        "layout's seconds over this one's. Test: evaluation mode on images not trained with; "
        f"{_accuracy_noise(record)}",
    )
    if errors:
        result.add("\n".join(errors))


def _accuracy_noise(record: Record) -> str:
    """How much an accuracy means: its standard error, for the least accurate network."""
    rates = [e["test_accuracy"] for e in record["training"] if "test_accuracy" in e]
    accuracy = min(rates, default=0.9)
    error = (accuracy * (1 - accuracy) / TEST_IMAGES) ** 0.5
    return (
        f"with {TEST_IMAGES} of them, accuracies have a standard error of up to {percent(error)}, "
        "and networks that are equal but for rounding come out differently."
    )


def _agreement_section(result: Page, record: Record) -> None:
    settings = record["settings"]
    parity, training = _differences(record, "parity"), _differences(record, "training")
    evaluation = _evaluation_differences(record)
    fine, coarse = settings["float64_tolerance"], float32_tolerance(record)
    table = Table(
        (
            "growth rate, implementation",
            "float64 training",
            "agrees",
            "float64 test",
            "agrees",
            "float32 training",
            "within drift",
        )
    )

    def verdict(value: float | None, tolerance: float | None) -> str:
        if value is None or tolerance is None:
            return MISSING
        return "yes" if value <= tolerance else "**NO**"

    for rate in settings["growth_rates"]:
        for name in settings["peers"]:
            if name == REFERENCE:
                continue
            cells = [f"k={rate}, {PEERS[name].label}"]
            for differences, tolerance in ((parity, fine), (evaluation, fine), (training, coarse)):
                value = differences.get((rate, name))
                cells += [
                    MISSING if value is None else f"{value:.1e}",
                    verdict(value, tolerance),
                ]
            table.rows.append(cells)
    efficient = (
        " torchvision's memory_efficient mode updates the running statistics of each layer's "
        "first norm twice a step, so its test loss cannot agree."
        if EFFICIENT in settings["peers"]
        else ""
    )
    result.heading("Agreement of the losses")
    drift = (
        "The float32 tolerance needs both naive layouts."
        if coarse is None
        else f"Tolerance in float32: {coarse:.1e}, {DRIFT_FACTOR:g} times the largest drift "
        f"between the two naive layouts (at least {LEAST_TOLERANCE:g})."
    )
    result.add(
        "Largest relative difference, over all stages, of the mean training loss of a stage from "
        "that of the naive network (contiguous), and of the test loss from its.",
        table,
        f"float64: the first {settings['parity_steps']} steps in stages of "
        f"{settings['parity_stage_steps']}, batches of {settings['parity_batch_size']}, then the "
        f"loss of {settings['parity_test_images']} test images in evaluation mode, which depends "
        f"on the running statistics; tolerance {fine:.0e}.{efficient} float32: the "
        "whole training; rounding errors grow as a network trains, also "
        f"between two layouts of the naive network, which is the measure here. {drift}",
    )


def _losses_section(result: Page, record: Record) -> None:
    result.heading("Loss of each stage")
    _losses_tables(result, record, "parity", "parity_stage_steps", "float64", 9)
    _losses_tables(result, record, "training", "stage_steps", "float32", 4)


def _losses_tables(
    result: Page, record: Record, part: str, stage: str, dtype: str, digits: int
) -> None:
    rows = []
    stage_steps = record["settings"][stage]
    for entry in record[part]:
        if entry["losses"]:
            losses = stage_losses(entry["losses"], stage_steps)
            name = f"k={entry['growth_rate']}, {PEERS[entry['peer']].label}"
            rows.append((name, *(f"{loss:.{digits}f}" for loss in losses)))
    if not rows:
        return
    stages = max(len(row) for row in rows) - 1
    table = Table((f"{dtype}, stages of {stage_steps} steps", *map(str, range(1, stages + 1))))
    table.rows.extend((*row, *[MISSING] * (stages + 1 - len(row))) for row in rows)
    result.add(table)


def figure(record: Record) -> Figure | None:
    """Loss curves of each growth rate, and memory and time of a step."""
    settings = record["settings"]
    rates = [r for r in settings["growth_rates"] if _by_peer(record["training"], r)]
    if not rates:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(4.2 * max(2, len(rates)), 8), layout="constrained")
    curves, bars = plot.subfigures(2, 1, squeeze=False)[:, 0]
    for rate, axes in zip(rates, curves.subplots(1, len(rates), squeeze=False)[0], strict=True):
        for name, entry in _by_peer(record["training"], rate).items():
            losses = stage_losses(entry["losses"], settings["stage_steps"])
            style = "-" if PEERS[name].ours else "--"
            axes.plot(range(1, len(losses) + 1), losses, style, color=PEERS[name].color, label=name)
        axes.set(title=f"k={rate}", xlabel="stage", ylabel="training loss", ylim=(0, None))
    memory_axes, time_axes = bars.subplots(1, 2)
    width = 0.8 / len(settings["peers"])
    for index, name in enumerate(settings["peers"]):
        places = [i + (index + 0.5) * width - 0.4 for i in range(len(rates))]
        memory = [_by_peer(record["memory"], rate).get(name, {}) for rate in rates]
        peaks = [entry.get("peak_gradients_allocated", 0) / 2**20 for entry in memory]
        trained = [_by_peer(record["training"], rate).get(name, {}) for rate in rates]
        times = [statistics.median(e["seconds"]) if e.get("seconds") else 0.0 for e in trained]
        for axes, heights in ((memory_axes, peaks), (time_axes, times)):
            axes.bar(places, heights, width, color=PEERS[name].color, label=name)
    for axes, label in ((memory_axes, "peak memory of a step, MiB"), (time_axes, "seconds a step")):
        axes.set_xticks(range(len(rates)), [f"k={rate}" for rate in rates])
        axes.set_ylabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = memory_axes.get_legend_handles_labels()
    plot.legend(handles, names, loc="outside lower center", ncols=len(names), fontsize="small")
    return plot
