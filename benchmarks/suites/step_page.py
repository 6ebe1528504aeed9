"""The page and the plot of the `step` suite, made from its record alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from benchmarks.measure import Timing, summarize
from benchmarks.memory import CHILD_ENVIRONMENT
from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.plots import peer_bars
from benchmarks.report import MISSING, Page, Table, intro, mebibytes, percent, ratio, seconds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

Figures = dict[str, dict[str, Any]]

PEAK = "peak_gradients_allocated"
FREED = "peak_gradients_freed"
PARAMETER_BYTES = 4  # float32 whatever autocast computes with


def peers_of(settings: dict[str, Any], spec: NetworkSpec) -> list[str]:
    """The peers that can build a network, compiled ones where the settings say so."""
    compiled = spec.name in settings.get("compiled_networks", [spec.name])
    return [
        name
        for name in settings["peers"]
        if PEERS[name].applies(spec) and (compiled or not PEERS[name].compiled)
    ]


def compared(settings: dict[str, Any], spec: NetworkSpec, part: str) -> list[str]:
    """Those of them that one part has, none where it leaves the network out."""
    parts = settings.get("parts_of", {}).get(spec.title, settings["parts"])
    names = peers_of(settings, spec) if part in parts else []
    return [name for name in names if part == "inference" or PEERS[name].deploy is None]


def entries_of(record: Record, part: str, network: str) -> Figures:
    """What was measured of one network, by peer."""
    return {entry["peer"]: entry for entry in record[part] if entry["network"] == network}


def timings_of(record: Record, part: str, network: str) -> dict[str, Timing]:
    """Times of one network, by peer, as far as there are any."""
    return {
        name: summarize(entry["seconds"])
        for name, entry in entries_of(record, part, network).items()
        if entry["seconds"]
    }


def minima_of(record: Record, part: str, network: str) -> dict[str, float]:
    """The shortest times of one network, by peer."""
    return {name: timing.minimum for name, timing in timings_of(record, part, network).items()}


def medians_of(record: Record, part: str, network: str) -> dict[str, float]:
    """The median times of one network, by peer."""
    return {name: timing.median for name, timing in timings_of(record, part, network).items()}


def memory_of(record: Record, network: str, key: str = PEAK) -> dict[str, float]:
    """One figure of memory of one network, by peer, in bytes."""
    entries = entries_of(record, "memory", network).items()
    return {name: entry[key] for name, entry in entries if key in entry}


def best_naive(values: dict[str, float]) -> float | None:
    """The smallest figure of the naive network in any layout."""
    return min((value for name, value in values.items() if PEERS[name].naive), default=None)


def numbers(amp: str) -> str:
    """What is computed with, as a sentence begins."""
    return "Float32" if amp == "none" else f"Float32 parameters under {amp} autocast"


def _label(name: str) -> str:
    return PEERS[name].label


def _memory_text() -> str:
    """How memory is measured, and what the columns are."""
    environment = " ".join(f"{key}={value}" for key, value in CHILD_ENVIRONMENT.items())
    return (
        "Memory: each case in a child process of its own, after one whole warm-up step. Peak is "
        "the most that was resident during the step (VmHWM, reset before it) minus what was "
        f"resident before it (VmRSS), with `{environment}` so that freed buffers leave the "
        "process. *Gradients allocated*: the parameters' gradients exist before the step, zeroed "
        "in place; *gradients freed*: they were set to None, and the step's own allocation of "
        "them counts. *Saved*: bytes autograd keeps between forward and backward, each storage "
        "once, without parameters, buffers and input. Parameters and their gradients take four "
        "bytes each besides. *Resident after forward*: what the process holds between forward and "
        "backward beyond what it held before, whoever keeps it. On a CUDA device all of them are "
        "the caching allocator's bytes."
    )


def page(record: Record) -> Page:
    """Memory, time and inference tables of every network."""
    result = Page("One training step: memory and speed")
    settings = record["settings"]
    result.add(*intro(record))
    result.add(
        f"{numbers(settings['amp'])}; a step is forward, cross entropy and backward, without an "
        "optimizer. All implementations start from the same weights. densenet_fast gets "
        "channels_last input, as the peers in that layout do.",
        *([_memory_text()] if "memory" in settings["parts"] else []),
        f"Time: all implementations in one process, in turn, {settings['rounds']} rounds after an "
        "untimed one, malloc as it is; on a CUDA device between two of its own events, with "
        "cuDNN's benchmark mode and PyTorch's settings for tf32. Ratios are against the naive "
        "network in its best layout.",
    )
    for data in settings["networks"]:
        spec = NetworkSpec.from_json(data)
        result.heading(spec.title)
        _not_compared(result, settings, spec)
        if record["memory"]:
            _memory_section(result, record, spec)
        for part, text in (("time", "training step"), ("inference", "inference, no_grad")):
            timings = timings_of(record, part, spec.title)
            if timings:
                result.add(_time_table(timings, text))
            entries = entries_of(record, part, spec.title).items()
            result.not_measured(f"{name}: {e['error']}" for name, e in entries if "error" in e)
    return result


def _memory_section(result: Page, record: Record, spec: NetworkSpec) -> None:
    figures = entries_of(record, "memory", spec.title)
    measured = {name: entry for name, entry in figures.items() if "error" not in entry}
    base = {
        key: best_naive({name: entry[key] for name, entry in measured.items()})
        for key in (PEAK, FREED)
    }
    efficient = measured.get("memory-efficient", {}).get(PEAK)
    table = Table(
        (
            "memory, MiB",
            "parameters, M",
            "peak, gradients allocated",
            "naive / this",
            "memory_efficient / this",
            "peak, gradients freed",
            "naive / this",
            "saved",
            "resident after forward",
        )
    )
    for name, entry in measured.items():
        table.rows.append(
            (
                _label(name),
                f"{entry['parameters'] / PARAMETER_BYTES / 1e6:.2f}",
                mebibytes(entry[PEAK]),
                ratio(base[PEAK], entry[PEAK]),
                ratio(efficient, entry[PEAK]),
                mebibytes(entry[FREED]),
                ratio(base[FREED], entry[FREED]),
                mebibytes(entry["saved_for_backward"]),
                mebibytes(entry["resident_after_forward"]),
            )
        )
    if table.rows:
        result.add(table)
    result.not_measured(f"{name}: {e['error']}" for name, e in figures.items() if "error" in e)


def _not_compared(result: Page, settings: dict[str, Any], spec: NetworkSpec) -> None:
    """Which peers have no figures of this network, and why."""
    there = peers_of(settings, spec)
    left_out = [PEERS[name] for name in settings["peers"] if name not in there]
    for reason, peers in (
        ("do not build this network", [peer for peer in left_out if not peer.applies(spec)]),
        (
            "compiled for networks that are named only",
            [peer for peer in left_out if peer.applies(spec)],
        ),
    ):
        if peers:
            result.add(f"Not compared, {reason}: {', '.join(peer.label for peer in peers)}.")


def _time_table(timings: dict[str, Timing], text: str) -> Table:
    table = Table(
        (
            f"{text}, seconds",
            "minimum",
            "median",
            "quartiles",
            "spread",
            "speed by minimum",
            "speed by median",
        )
    )
    best_minimum = best_naive({name: timing.minimum for name, timing in timings.items()})
    best_median = best_naive({name: timing.median for name, timing in timings.items()})
    for name, timing in timings.items():
        table.rows.append(
            (
                _label(name),
                seconds(timing.minimum),
                seconds(timing.median),
                f"{seconds(timing.low_quartile)} – {seconds(timing.high_quartile)}",
                percent(timing.spread) if timing.rounds > 1 else MISSING,
                ratio(best_minimum, timing.minimum),
                ratio(best_median, timing.median),
            )
        )
    return table


def figure(record: Record) -> Figure | None:
    """Bars of peak memory, training time and inference time, a row for each network."""
    specs = [NetworkSpec.from_json(data) for data in record["settings"]["networks"]]
    panels: list[tuple[str, Callable[[NetworkSpec], dict[str, float]]]] = [
        ("peak memory of a step, MiB", lambda spec: _peaks(record, spec)),
        ("training step, median s", lambda spec: medians_of(record, "time", spec.title)),
        ("inference, median s", lambda spec: medians_of(record, "inference", spec.title)),
    ]
    panels = [(text, get) for text, get in panels if any(get(spec) for spec in specs)]
    if not panels:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(1.5 + 4 * len(panels), 2.8 * len(specs)), layout="constrained")
    grid = plot.subplots(len(specs), len(panels), squeeze=False)
    for spec, row in zip(specs, grid, strict=True):
        measured = {name for _, get in panels for name in get(spec)}
        names = [name for name in record["settings"]["peers"] if name in measured]
        for index, ((text, get), axes) in enumerate(zip(panels, row, strict=True)):
            peer_bars(axes, names, get(spec), text, named=index == 0)
        row[0].set_title(spec.title, loc="left")
    return plot


def _peaks(record: Record, spec: NetworkSpec) -> dict[str, float]:
    return {name: peak / 2**20 for name, peak in memory_of(record, spec.title).items()}
