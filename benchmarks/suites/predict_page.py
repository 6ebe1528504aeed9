"""The page and the plot of the `predict` suite, made from its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.networks import NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.plots import peer_bars
from benchmarks.prediction.shapes import blocks
from benchmarks.report import Page, Table, intro, mebibytes, milliseconds, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

BASE = "naive-channels-last"
FORMULA = "time = Σ over operations of max(bytes / bandwidth, FLOPs / tensor rate)"
METHOD = (
    "**No time of a device on this page was measured.** It is a prediction: bytes and FLOPs are "
    f"counted from the networks' shapes, and {FORMULA}, with the vendors' figures below. No "
    "operation overlaps another one, none is slower than its roofline, and caches hold nothing "
    "between operations.",
    "*Usual*: torchvision's modules as PyTorch runs them, operation by operation. Every operand is "
    "read once and every result written once, its library kernels reach the device's peak, and "
    "changes of layout and library workspaces are free: figures in its favour. *densenet_fast*: "
    "the CUDA kernels of this repository; the partial results of their reductions, the rearranged "
    "weights and every further sweep over an operand count as moved too (the column *of it "
    "repeated*), although the L2 may hold them, and their products get only the share of the "
    "tensor rate that `mma.sync` reaches. A step is forward, cross entropy and backward, without "
    "an optimizer.",
    "The smaller a network's features are against a device's L2, the less either implementation "
    "depends on memory, and the less these figures say: see the size above each table, and "
    "`--full` for large batches.",
)


def page(record: Record) -> Page:
    """Devices, then every network in every format: steps, memory, operations."""
    result = Page("Prediction, not a measurement: a training step on GPUs")
    settings = record["settings"]
    result.add(*intro(record), *METHOD, HOST)
    result.heading("Devices, as their vendor describes them")
    result.add(_devices(settings), _sources(settings))
    for data in settings["networks"]:
        spec = NetworkSpec.from_json(data)
        for fmt in settings["formats"]:
            cases = [
                [
                    e
                    for e in record[part]
                    if (e["network"], e["format"]) == (spec.title, fmt["name"])
                ]
                for part in ("steps", "operations")
            ]
            if any(cases):
                result.heading(f"Predicted: {spec.title}, {fmt['label']}")
            if any(cases):
                result.add(_size_text(spec, fmt))
            if cases[0]:
                waiting = {
                    entry["implementation"]: entry["seconds"]
                    for entry in record["host"]
                    if entry.get("network") == spec.name
                }
                result.add(_steps(cases[0], settings, waiting), _memory(cases[0], settings))
            if cases[1]:
                result.add("Predicted operation by operation; bytes are those on the first device.")
                result.add(*_operations(cases[1], settings))
    return result


def _size_text(spec: NetworkSpec, fmt: dict[str, Any]) -> str:
    largest = max(block.rows * block.end for block in blocks(spec)) * fmt["element"]
    return f"All features of the largest block: {mebibytes(largest)} MiB."


HOST = (
    "The column *starts* counts the kernels of a step. *host* **is measured**, on the machine "
    "above with one thread: the median time of a step of one image in which every operator of "
    "densenet_fast returns at once, so that Python, autograd, the dispatcher and PyTorch's own "
    "small operators remain; starting kernels through CUDA comes on top. PyTorch's "
    "own operators cannot be taken out: the usual networks have no such figure. Host and device "
    "work side by side: *(host)* behind a step's time says that the host is the slower one, and "
    "the step takes at least that long, unless it is captured in a CUDA graph."
)


def _devices(settings: dict[str, Any]) -> Table:
    table = Table(
        (
            "published figures",
            "GB/s",
            "16-bit tensor TFLOP/s",
            "tf32 tensor TFLOP/s",
            "float32 TFLOP/s",
            "memory, GB",
            "L2, MiB",
            "multiprocessors",
            "mma.sync, of the tensor rate",
        )
    )
    for device in settings["devices"]:
        rates = [device[key] / 1e12 for key in ("half_rate", "tf32_rate", "float32_rate")]
        table.rows.append(
            (
                device["name"],
                f"{device['bandwidth'] / 1e9:,.0f}",
                *(f"{rate:,.1f}" for rate in rates),
                f"{device['memory'] / 1e9:.0f}",
                f"{device['l2'] / 2**20:.0f}",
                str(device["multiprocessors"]),
                f"{100 * device['mma_sync']:.1f} %",
            )
        )
    return table


def _sources(settings: dict[str, Any]) -> str:
    lines = [f"- {d['name']}: {'; '.join(d['sources'])}." for d in settings["devices"]]
    return "Sources:\n\n" + "\n".join(lines)


def _by_device(cases: list[dict[str, Any]], name: str) -> dict[str, dict[str, Any]]:
    return {case["device"]: case for case in cases if case["implementation"] == name}


def _steps(
    cases: list[dict[str, Any]], settings: dict[str, Any], waiting: dict[str, float]
) -> Table:
    """`waiting`: seconds that the host takes, by implementation."""
    devices = [device["name"] for device in settings["devices"]]
    columns = [
        "predicted step, ms",
        "GB moved",
        "of it repeated",
        "TFLOP",
        "starts",
        "host, ms (measured)",
    ]
    for name in devices:
        columns += [f"{name}: forward", "step", "speed"]
    table = Table(columns)
    base = _by_device(cases, BASE)
    for name in dict.fromkeys(case["implementation"] for case in cases):
        found = _by_device(cases, name)
        step = found[devices[0]]["step"]
        row = [
            PEERS[name].label,
            f"{step['moved'] / 1e9:.2f}",
            f"{step['repeated'] / 1e9:.2f}",
            f"{step['flops'] / 1e12:.3f}",
            f"{step['launches']:,}",
            milliseconds(waiting[name]) if name in waiting else "—",
        ]
        for device in devices:
            seconds = found[device]["step"]["seconds"]
            slower = waiting.get(name, 0) > seconds
            row += [
                milliseconds(found[device]["forward"]["seconds"]),
                milliseconds(seconds) + (" (host)" if slower else ""),
                ratio(base[device]["step"]["seconds"], seconds),
            ]
        table.rows.append(row)
    return table


def _memory(cases: list[dict[str, Any]], settings: dict[str, Any]) -> Table:
    device = settings["devices"][0]["name"]
    table = Table(
        (
            "predicted memory of a step, MiB",
            "kept for the backward",
            "usual / this",
            "peak above rest",
            "usual / this",
            "parameters and gradients",
        )
    )
    base = _by_device(cases, BASE)[device]
    for name in dict.fromkeys(case["implementation"] for case in cases):
        case = _by_device(cases, name)[device]
        table.rows.append(
            (
                PEERS[name].label,
                mebibytes(case["kept"]),
                ratio(base["kept"], case["kept"]),
                mebibytes(case["peak"]),
                ratio(base["peak"], case["peak"]),
                mebibytes(2 * case["parameters"]),
            )
        )
    return table


def _operations(cases: list[dict[str, Any]], settings: dict[str, Any]) -> list[Table]:
    devices = [device["name"] for device in settings["devices"]]
    tables = []
    for name in dict.fromkeys(case["implementation"] for case in cases):
        table = Table(
            (
                f"predicted, {PEERS[name].label}",
                "MB moved",
                "of it repeated",
                "GFLOP",
                "FLOP per byte",
                "starts",
                *(f"{device}, ms" for device in devices),
            )
        )
        chosen = [case for case in cases if case["implementation"] == name]
        for operation in dict.fromkeys(case["operation"] for case in chosen):
            found = {case["device"]: case for case in chosen if case["operation"] == operation}
            first = found[devices[0]]
            table.rows.append(
                (
                    operation,
                    f"{first['moved'] / 1e6:,.2f}",
                    f"{first['repeated'] / 1e6:,.2f}",
                    f"{first['flops'] / 1e9:,.2f}",
                    f"{first['flops'] / first['moved']:.1f}" if first["moved"] else "—",
                    f"{first['launches']:,}",
                    *(milliseconds(found[device]["seconds"]) for device in devices),
                )
            )
        tables.append(table)
    return tables


def figure(record: Record) -> Figure | None:
    """Predicted step times, a row for each network and format and a column for each device."""
    if not record["steps"]:
        return None
    from matplotlib.figure import Figure

    settings = record["settings"]
    devices = [device["name"] for device in settings["devices"]]
    rows = list(dict.fromkeys((e["network"], e["format"]) for e in record["steps"]))
    names = list(dict.fromkeys(e["implementation"] for e in record["steps"]))
    plot = Figure(figsize=(2 + 3.6 * len(devices), 0.6 + 2.2 * len(rows)), layout="constrained")
    plot.suptitle("PREDICTION (roofline over counted bytes and FLOPs), not a measurement")
    grid = plot.subplots(len(rows), len(devices), squeeze=False)
    for (network, fmt), line in zip(rows, grid, strict=True):
        for device, axes in zip(devices, line, strict=True):
            values = {
                e["implementation"]: e["step"]["seconds"] * 1e3
                for e in record["steps"]
                if (e["network"], e["format"], e["device"]) == (network, fmt, device)
            }
            text = f"{device}: predicted step, ms"
            peer_bars(axes, names, values, text, named=device == devices[0])
        line[0].set_title(f"{network}, {fmt}", loc="left")
    return plot
