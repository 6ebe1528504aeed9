"""The page and the plot of the `latency` suite, made from its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks import ranking
from benchmarks.measure import summarize
from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.plots import peer_bars
from benchmarks.report import Page, Table, intro, milliseconds, percent, ratio
from benchmarks.suites import step_page
from benchmarks.suites.step_page import best_naive, numbers

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

PARTS = {"time": "training step", "inference": "inference, no_grad"}


def page(record: Record) -> Page:
    """A table for training steps and one for inference, the host's share, and where we lose."""
    settings = record["settings"]
    result = Page("Small work: latency of a step and of inference")
    result.add(
        *intro(record),
        f"{numbers(settings['amp'])}; a step is forward, cross entropy and backward, without an "
        "optimizer. All implementations start from the same weights, and their logits agree. They "
        f"take turns in one process, {settings['rounds']} rounds after an untimed one, with the "
        "threads named above, engines for inference too. Figures are medians in milliseconds; "
        "speed is against torchvision's network in its faster memory layout.",
    )
    for part, text in PARTS.items():
        _times(result, record, part, text)
    missing = settings["not_installed"]
    if missing:
        result.add(f"Not compared, as not installed: {', '.join(missing)}.")
    _host(result, record)
    result.heading("Where densenet_fast is not first")
    result.add(ranking.summary([record]))
    return result


def _medians(record: Record, part: str) -> dict[NetworkSpec, dict[str, float]]:
    """By network and implementation, of the networks that were measured."""
    specs = [NetworkSpec.from_json(data) for data in record["settings"]["networks"]]
    medians = {spec: step_page.medians_of(record, part, spec.title) for spec in specs}
    return {spec: values for spec, values in medians.items() if values}


def _images(spec: NetworkSpec) -> str:
    return "×".join(map(str, spec.input_shape))


def _times(result: Page, record: Record, part: str, text: str) -> None:
    """A row for each implementation, two columns for each input."""
    medians = _medians(record, part)
    columns = [f"{text}, ms"]
    for spec in medians:
        columns += [_images(spec), "speed"]
    table = Table(columns)
    for name in record["settings"]["peers"]:
        if any(name in values for values in medians.values()):
            row = [PEERS[name].label]
            for values in medians.values():
                own = values.get(name)
                row += [milliseconds(own), ratio(best_naive(values), own)]
            table.rows.append(row)
    if table.rows:
        name = next(iter(medians)).name
        result.heading(f"{name}: {text}")
        result.add(table)
    result.not_measured(
        f"{data['network']}, {data['peer']}: {data['error']}"
        for data in record[part]
        if "error" in data
    )


def _host(result: Page, record: Record) -> None:
    """What a step needs of the host, and its share of the step of the same images."""
    if not record["host"]:
        return
    spec = NetworkSpec.from_json(record["settings"]["host"])
    result.heading("The host's share of a step")
    result.add(
        f"{spec.name}'s training step on {_images(spec)} in a process of its own, in which every "
        "operator of densenet_fast on the CPU returns at once: what remains is Python, PyTorch's "
        "dispatcher and autograd, allocations, and the stem's convolution and the classifier, "
        "which are PyTorch's. Calls: of operators in one step, those of PyTorch with the ones "
        "they call."
    )
    columns = ("host, ms", "minimum", "median", "of a step", "own calls", "PyTorch's calls")
    table = Table(columns)
    steps = step_page.medians_of(record, "time", spec.title)
    for entry in record["host"]:
        if "error" not in entry:
            timing = summarize(entry["seconds"])
            step = steps.get(entry["peer"])
            table.rows.append(
                (
                    PEERS[entry["peer"]].label,
                    milliseconds(timing.minimum),
                    milliseconds(timing.median),
                    percent(timing.median / step if step else None),
                    f"{entry['calls']['densenet_fast']:,}",
                    f"{entry['calls']['aten']:,}",
                )
            )
    if table.rows:
        result.add(table)
    result.not_measured(entry["error"] for entry in record["host"] if "error" in entry)


def figure(record: Record) -> Figure | None:
    """Bars of the medians, a panel for each case."""
    panels = [
        (f"{text}, {_images(spec)}, median ms", {n: 1e3 * value for n, value in values.items()})
        for part, text in PARTS.items()
        for spec, values in _medians(record, part).items()
    ]
    if not panels:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(6, 2.4 * len(panels)), layout="constrained")
    for axes, (text, values) in zip(
        plot.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
    ):
        peer_bars(axes, list(values), values, text, named=True)
    return plot
