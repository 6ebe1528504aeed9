"""The page and the plots of the `quality` suite, made from its record alone."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.peers import PEERS
from benchmarks.report import MISSING, Page, Table, intro, loss_text, mebibytes, percent, seconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

Entry = dict[str, Any]

# Value of `--data` → what it is; every other is a folder.
DATA = {
    "digits": "scikit-learn's handwritten digits upscaled from 8×8 to 32×32",
    "fashion-mnist": "Fashion-MNIST padded from 28×28 to 32×32",
}


@dataclass(frozen=True)
class Difference:
    """Mean accuracy of one implementation less that of another, and what chance allows."""

    value: float
    allowed: float

    @property
    def within_noise(self) -> bool:
        """Whether chance explains it; equal bounds count, whatever their last bits are."""
        return abs(self.value) <= self.allowed * (1 + 1e-9)


def difference(own: list[float], reference: list[float], test_images: int) -> Difference | None:
    """The difference of mean accuracies over seeds; None with fewer than two seeds of each.

    Chance allows two standard errors of the difference, from the spread of both groups, and one
    test image where neither has any spread.
    """
    if min(len(own), len(reference)) < 2:
        return None
    error = sum(statistics.variance(group) / len(group) for group in (own, reference)) ** 0.5
    value = statistics.fmean(own) - statistics.fmean(reference)
    return Difference(value, 2 * error if error else 1 / test_images)


def standard_error(accuracy: float, test_images: int) -> float:
    """Of an accuracy measured on that many images."""
    return (accuracy * (1 - accuracy) / test_images) ** 0.5


def running_means(losses: list[float], window: int) -> list[float]:
    """Mean of each loss and those before it, `window` at most."""
    return [statistics.fmean(losses[max(0, i - window) : i]) for i in range(1, len(losses) + 1)]


def tested(record: Record) -> dict[int, Entry]:
    """Growth rate → its entry, where the training came to its end; in ascending order."""
    entries = sorted(record["growth"], key=lambda entry: entry["growth_rate"])
    return {entry["growth_rate"]: entry for entry in entries if "test_accuracy" in entry}


def accuracies(record: Record, peer: str) -> list[float]:
    """Accuracy of one implementation for each seed that was trained to the end."""
    entries = [entry for entry in record["parity"] if entry["peer"] == peer]
    return [entry["test_accuracy"] for entry in entries if "test_accuracy" in entry]


def reference_of(record: Record) -> str:
    """The naive implementation that the others are compared with."""
    return next(name for name in record["settings"]["parity_peers"] if PEERS[name].naive)


def page(record: Record) -> Page:
    """What both parts found."""
    settings = record["settings"]
    data = DATA.get(settings["data"], f"the images of `{settings['data']}` padded to 32×32")
    result = Page("Quality: accuracy over the growth rate, and against the naive network")
    result.add(
        *intro(record),
        f"DenseNet-BC of depth {settings['depth']}, float32, trained on {data}: "
        f"{settings['train_images']:,} training and {settings['test_images']:,} test images. "
        f"{settings['steps']:,} steps of AdamW with batches of {settings['batch_size']} "
        f"({_rounds_text(settings)}); the learning rate rises to {settings['learning_rate']:g} "
        "over the first tenth of the steps and falls linearly to zero. Nothing is augmented, and "
        "no setting was chosen by accuracy. Test: evaluation mode, after the last step, on images "
        "not trained with. Seconds: all training steps together (forward, cross entropy, "
        "backward), without optimizer and test.",
    )
    if "growth" in settings["parts"]:
        _growth_section(result, record)
    if "parity" in settings["parts"]:
        _parity_section(result, record)
    return result


def _rounds_text(settings: dict[str, Any]) -> str:
    rounds, steps, epoch = (settings[key] for key in ("rounds", "round_steps", "epoch_steps"))
    text = f"{rounds} {'round' if rounds == 1 else 'rounds'} of {steps:,}"
    if steps == epoch:
        return f"{text}: a round is a pass over the training images"
    return (
        f"{text}: in the quick form a round is {percent(steps / epoch)} of a pass over the "
        "training images, with `--full` a whole one"
    )


def _growth_section(result: Page, record: Record) -> None:
    settings, entries = record["settings"], tested(record)
    table = Table(
        ("growth rate", "parameters", "test accuracy", "test loss", "seconds", "peak MiB")
    )
    for rate in settings["growth_rates"]:
        entry = entries.get(rate, {})
        table.rows.append(
            (
                f"k={rate}",
                f"{entry['parameters']:,}" if entry else MISSING,
                percent(entry.get("test_accuracy")),
                loss_text(entry.get("test_loss")),
                seconds(sum(entry["seconds"]) if entry else None),
                mebibytes(entry.get("memory", {}).get("peak_gradients_allocated")),
            )
        )
    result.heading("Growth rates")
    result.add(
        f"{PEERS[settings['growth_peer']].label}, seed {settings['seed']}.",
        table,
        "Peak: most memory of a step beyond what was resident before it, in a child process of its "
        "own, with the parameters' gradients allocated before the step.",
    )
    if entries:
        result.add(growth_verdict(entries, settings["test_images"]))
    errors = [
        f"- k={entry['growth_rate']}: memory was not measured: {entry['memory']['error']}"
        for entry in record["growth"]
        if "error" in entry.get("memory", {})
    ]
    if errors:
        result.add("\n".join(errors))


def growth_verdict(entries: dict[int, Entry], test_images: int) -> str:
    """The best growth rate, and the smallest that may be as good; of at least one entry."""
    accuracy = {rate: entry["test_accuracy"] for rate, entry in entries.items()}
    error = {rate: standard_error(value, test_images) for rate, value in accuracy.items()}
    best = max(accuracy, key=lambda rate: accuracy[rate])
    least = min(
        rate
        for rate in accuracy
        if accuracy[best] - accuracy[rate] <= 2 * (error[best] ** 2 + error[rate] ** 2) ** 0.5
    )
    noise = (
        f"With {test_images:,} test images an accuracy has a standard error of up to "
        f"{percent(max(error.values()))}. Each network was trained once: another seed, or only "
        "the other rounding of another number of threads, moves it too."
    )
    if best == min(accuracy):
        return f"**Most accurate: k={best}, the smallest measured.** {noise}"
    if least == best:
        return (
            f"**Most accurate: k={best}**, by more than two standard errors over every smaller "
            f"one. {noise}"
        )
    share = entries[least]["parameters"] / entries[best]["parameters"]
    return (
        f"**Most accurate: k={best}. k={least} is as accurate within two standard errors, with "
        f"{percent(share)} of its parameters.** {noise}"
    )


def _parity_section(result: Page, record: Record) -> None:
    settings = record["settings"]
    peers, window = settings["parity_peers"], settings["window"]
    entries = {(entry["seed"], entry["peer"]): entry for entry in record["parity"]}
    table = Table(
        ("seed, implementation", "test accuracy", "test loss", "last training loss", "seconds")
    )
    for seed in settings["seeds"]:
        for name in peers:
            entry = entries.get((seed, name), {})
            done = "test_accuracy" in entry
            table.rows.append(
                (
                    f"{seed}, {PEERS[name].label}",
                    percent(entry.get("test_accuracy")),
                    loss_text(entry.get("test_loss")),
                    loss_text(statistics.fmean(entry["losses"][-window:]) if done else None),
                    seconds(sum(entry["seconds"]) if done else None),
                )
            )
    for name in peers:
        found = accuracies(record, name)
        mean = statistics.fmean(found) if found else None
        table.rows.append((f"mean, {PEERS[name].label}", percent(mean), *[MISSING] * 3))
    result.heading("Parity with the naive network")
    result.add(
        f"k={settings['parity_growth_rate']}. With each seed, all implementations start from the "
        "same weights, see the same batches, and take their steps in turn in one process. They "
        "compute the same function, but rounding errors grow exponentially while a network trains: "
        "after some hundred steps these are different networks, as from different seeds. What can "
        "be expected is the same accuracy within the noise of seeds; the `training` suite compares "
        "step by step in float64. Last training loss: mean of the last "
        f"{window} steps.",
        table,
    )
    reference = reference_of(record)
    others = [name for name in peers if name != reference]
    lines = [f"- {parity_verdict(record, name, reference)}" for name in others]
    result.add(
        "\n".join(lines),
        "Within seed noise: the mean accuracies differ by at most two standard errors of that "
        "difference, estimated from the spread over seeds of both; by at most one test image where "
        "neither has any spread. With so few seeds this is a coarse rule, and networks that are "
        "equally good fall outside about once in ten times.",
    )


def parity_verdict(record: Record, name: str, reference: str) -> str:
    """In plain words, whether an implementation is as accurate as the naive network."""
    own, naive = accuracies(record, name), accuracies(record, reference)
    found = difference(own, naive, record["settings"]["test_images"])
    label, against = PEERS[name].label, PEERS[reference].label
    if found is None:
        return f"{label}: not judged, fewer than two seeds were trained to the end."
    spread = (
        f"{abs(found.value) * 100:.2f} percentage points "
        f"{'below' if found.value < 0 else 'above'} {against}, where chance explains "
        f"{found.allowed * 100:.2f}"
    )
    if found.within_noise:
        return f"**{label}: as accurate as naive, within seed noise** ({spread})."
    better = "more" if found.value > 0 else "less"
    return f"**{label}: {better} accurate than naive, outside seed noise** ({spread})."


def figure(record: Record) -> Figure | None:
    """Accuracy over parameters, and the loss curves of both implementations."""
    draw = []
    if tested(record):
        draw.append(_draw_growth)
    if any(entry["losses"] for entry in record["parity"]):
        draw.append(_draw_parity)
    if not draw:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(6 * len(draw), 4.5), layout="constrained")
    for function, axes in zip(draw, plot.subplots(1, len(draw), squeeze=False)[0], strict=True):
        function(axes, record)
        axes.spines[["top", "right"]].set_visible(False)
    return plot


def _draw_growth(axes: Axes, record: Record) -> None:
    settings, entries = record["settings"], tested(record)
    parameters = [entry["parameters"] for entry in entries.values()]
    accuracy = [entry["test_accuracy"] for entry in entries.values()]
    errors = [100 * standard_error(value, settings["test_images"]) for value in accuracy]
    heights = [100 * value for value in accuracy]
    color = PEERS[settings["growth_peer"]].color
    axes.errorbar(parameters, heights, errors, fmt="o-", color=color, capsize=3, linewidth=1)
    for rate, *place in zip(entries, parameters, heights, strict=True):
        axes.annotate(f"k={rate}", tuple(place), (6, -12), textcoords="offset points")
    axes.set(title="growth rates, ± standard error", xscale="log")
    axes.set(xlabel="parameters", ylabel="test accuracy, %")


def _draw_parity(axes: Axes, record: Record) -> None:
    settings = record["settings"]
    labelled = set()
    for entry in record["parity"]:
        name = entry["peer"]
        losses = running_means(entry["losses"], settings["window"])
        axes.plot(
            range(1, len(losses) + 1),
            losses,
            "-" if PEERS[name].ours else "--",
            color=PEERS[name].color,
            linewidth=1,
            label=None if name in labelled else f"{name}, each seed",
        )
        labelled.add(name)
    axes.set(title=f"parity, k={settings['parity_growth_rate']}", xlabel="step", yscale="log")
    axes.set_ylabel(f"training loss, mean of {settings['window']} steps")
    axes.legend(fontsize="small")
