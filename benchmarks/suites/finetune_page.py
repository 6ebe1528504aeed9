"""The page and the plot of the `finetune` suite, made from its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.measure import summarize
from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.report import MISSING, Page, Table, intro, loss_text, mebibytes, percent, ratio
from benchmarks.report import seconds as seconds_text
from benchmarks.suites.quality_page import DATA, running_means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

PEAK = "peak_gradients_allocated"
WINDOW = 10  # steps, of the plot's running mean


def page(record: Record) -> Page:
    """One row for each implementation."""
    settings = record["settings"]
    spec = NetworkSpec.from_json(settings["network"])
    first, later = settings["train_images"]
    result = Page("Fine-tuning: a new classifier on pretrained weights")
    result.add(
        *intro(record),
        f"{spec.title}, float32; images of "
        f"{DATA.get(settings['data'], '`' + settings['data'] + '`')}, resized and of three equal "
        f"channels. torchvision's network is trained for {settings['steps']} steps on the first "
        f"{spec.num_classes} classes ({first:,} images), from which comes a file of weights. "
        f"Every row then starts from that file with the same new classifier for the other "
        f"{spec.num_classes} classes ({later:,} images) and trains all layers for "
        f"{settings['steps']} steps: SGD, learning rate {settings['learning_rate']:g} and a tenth "
        "of it in the last third, momentum 0.9. All see the same batches, and take their steps in "
        "turn in one process. Test: evaluation mode, on "
        f"{settings['test_images'][1]:,} images not trained with.",
    )
    result.add(_table(record))
    result.add(
        "Seconds: median of a step's forward, loss and backward. Peak: most memory of a step "
        "beyond what was resident before it, in a child process of its own, with the parameters' "
        "gradients allocated before the step. All compute the same function; rounding makes each "
        "training a different one after some hundred steps."
    )
    made = [entry for entry in record["pretraining"] if "test_accuracy" in entry]
    if made:
        accuracy = percent(made[0]["test_accuracy"])
        result.add(f"The file's network has a test accuracy of {accuracy} on its own classes.")
    return result


def _table(record: Record) -> Table:
    table = Table(
        (
            "implementation",
            "test accuracy",
            "test loss",
            "last training loss",
            "seconds a step",
            "speed",
            "peak MiB",
            "torchvision / this",
        )
    )
    trained = {entry["peer"]: entry for entry in record["training"]}
    peaks = {e["peer"]: e[PEAK] for e in record["memory"] if PEAK in e}
    medians = {
        name: summarize(entry["seconds"]).median
        for name, entry in trained.items()
        if entry["seconds"]
    }
    base = record["settings"]["peers"][0]
    for name in record["settings"]["peers"]:
        entry: dict[str, Any] = trained.get(name, {})
        losses = running_means(entry.get("losses", []), WINDOW)
        table.rows.append(
            (
                PEERS[name].label,
                percent(entry.get("test_accuracy")),
                loss_text(entry.get("test_loss")),
                loss_text(losses[-1]) if losses else MISSING,
                seconds_text(medians.get(name)),
                ratio(medians.get(base), medians.get(name)),
                mebibytes(peaks.get(name)),
                ratio(peaks.get(base), peaks.get(name)),
            )
        )
    return table


def figure(record: Record) -> Figure | None:
    """The loss curves."""
    entries = [entry for entry in record["training"] if entry["losses"]]
    if not entries:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(7, 4.2), layout="constrained")
    axes = plot.subplots()
    for entry in entries:
        peer = PEERS[entry["peer"]]
        losses = running_means(entry["losses"], WINDOW)
        style = "-" if peer.ours else "--"
        axes.plot(range(1, len(losses) + 1), losses, style, color=peer.color, label=peer.label)
    axes.set(xlabel="step", ylabel=f"training loss, mean of {WINDOW} steps", yscale="log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="small")
    return plot
