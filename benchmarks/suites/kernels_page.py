"""The page and the plot of the `kernels` suite, made from its record alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.kernels.machine import Machine
from benchmarks.report import Page, Table, intro, mebibytes, milliseconds, percent, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from benchmarks.suites import Record

Entry = dict[str, Any]

FOOTNOTES = (
    "FLOPs are those of the direct convolution, two for each of its multiplications, and those of "
    "the transitions are of the pooled pixels: pooling commutes with their convolution and comes "
    "first. **The 3×3 kernels use Winograd's F(2×2, 3×3) on the CPU where it is faster**, which "
    "does 16 multiplications where the direct convolution does 36: their figures may exceed 100 % "
    "of the peak, and the arithmetic that is done is as much less. Norms, ReLU and pooling do not "
    "count.",
    "Bytes are those of all operands, each read or written once (what is added to, both). A kernel "
    "that finds its operands in the caches, which a small one does when it runs again and again, "
    "may exceed 100 % of the bandwidth, and one on a slice of wider rows moves whole cache lines, "
    "more than is counted.",
    "PyTorch: what a training step of the usual network does in this place, operator by operator, "
    "on dense channels_last tensors. Forward: batch_norm with batch statistics, ReLU, and conv2d, "
    "conv2d and avg_pool2d, or max_pool2d, without autograd. Backward: `torch.autograd.grad` of "
    "the same for the input, the norm's parameters and the weight. Its norm takes the statistics "
    "of its input and completes its input's gradient every time; here this is done once for each "
    "channel: conv kernels take the statistics of their output, and channel_statistics and "
    "finish_gradient have rows of their own, against torch.batch_norm_update_stats on dense rows, "
    "and torch.addcmul and sub on the same slices.",
)


def page(record: Record) -> Page:
    """For each number of threads the machine's peak and the tables."""
    result = Page("Kernels: time, share of the machine's peak, and PyTorch's operators")
    settings = record["settings"]
    sizes = ", ".join(map(str, settings["matmul_sizes"]))
    result.add(*intro(record))
    result.add(
        f"Float32. Times are minima of {settings['rounds']} bursts of {settings['burst_seconds']} "
        "s, at least one call each, in which this package's kernel and PyTorch take turns. Speed: "
        "PyTorch's time over the kernel's.",
        f"Peak arithmetic: `torch.mm` of square float32 matrices of {sizes} rows, the fastest size "
        "and round. Peak bandwidth: `Tensor.copy_` of "
        f"{mebibytes(settings['copy_bytes'])} MiB, the fastest round, bytes read and written. Both "
        "are measured in the same process before the kernels, with the same number of threads.",
        "*Limited by*: whichever peak the kernel reaches the larger share of, if that is at least "
        f"{percent(settings['least_share'])}: arithmetic or memory; *overhead*: neither.",
    )
    for peaks in record["machine"]:
        _threads_section(result, record, peaks)
    result.heading("How to read the figures")
    result.add(*FOOTNOTES)
    return result


def _machine(peaks: dict[str, Any]) -> Machine:
    return Machine(peaks["flops"], peaks["bandwidth"])


def _threads_section(result: Page, record: Record, peaks: dict[str, Any]) -> None:
    machine, threads = _machine(peaks), peaks["threads"]
    result.heading("1 thread" if threads == 1 else f"{threads} threads")
    result.add(
        f"Measured peak: {machine.flops / 1e9:.1f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s."
    )
    entries = [entry for entry in _measured(record) if entry["threads"] == threads]
    for products in (True, False):
        chosen = [entry for entry in entries if bool(entry["flops"]) == products]
        if chosen:
            result.add(_table(chosen, machine, products=products))


def _measured(record: Record) -> list[Entry]:
    return [entry for entry in record["kernels"] if entry["seconds"]["ours"]]


def _best(entry: Entry, call: str = "ours") -> float | None:
    return min(entry["seconds"][call], default=None)


def _table(entries: list[Entry], machine: Machine, *, products: bool) -> Table:
    columns = ["kernel with products" if products else "memory-bound kernel", "ms"]
    columns += ["GFLOP/s", "of peak"] if products else []
    columns += ["GB/s", "of bandwidth", "PyTorch, ms", "speed", "limited by"]
    table = Table(columns)
    for entry in entries:
        time, flops, moved = min(entry["seconds"]["ours"]), entry["flops"], entry["moved"]
        arithmetic, memory = machine.shares(time, flops, moved)
        row = [f"{entry['kernel']}, {entry['label']}", milliseconds(time)]
        row += [f"{flops / time / 1e9:.1f}", percent(arithmetic)] if products else []
        row += [f"{moved / time / 1e9:.1f}", percent(memory)]
        usual = _best(entry, "torch")
        row += [milliseconds(usual), ratio(usual, time), machine.limit(time, flops, moved)]
        table.rows.append(row)
    return table


def figure(record: Record) -> Figure | None:
    """Rooflines: FLOP/s over FLOPs per byte, one plot for each number of threads."""
    entries = [entry for entry in _measured(record) if entry["flops"]]
    if not entries:
        return None
    from matplotlib.figure import Figure

    plot = Figure(figsize=(1 + 5 * len(record["machine"]), 4.5), layout="constrained")
    rows = plot.subplots(1, len(record["machine"]), squeeze=False)
    for peaks, axes in zip(record["machine"], rows[0], strict=True):
        machine = _machine(peaks)
        own = [entry for entry in entries if entry["threads"] == peaks["threads"]]
        for kernel in dict.fromkeys(entry["kernel"] for entry in own):
            chosen = [entry for entry in own if entry["kernel"] == kernel]
            axes.scatter(
                [entry["flops"] / entry["moved"] for entry in chosen],
                [entry["flops"] / min(entry["seconds"]["ours"]) / 1e9 for entry in chosen],
                s=16,
                label=kernel,
            )
        ridge = machine.flops / machine.bandwidth  # FLOPs per byte
        intensities = [ridge / 16, ridge, ridge * 16]
        roof = [min(machine.flops, x * machine.bandwidth) / 1e9 for x in intensities]
        axes.plot(intensities, roof, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", title=f"threads: {peaks['threads']}")
        axes.set(xlabel="FLOPs per byte", ylabel="GFLOP/s; the line is the measured peak")
        axes.spines[["top", "right"]].set_visible(False)
    handles, names = plot.axes[0].get_legend_handles_labels()
    plot.legend(handles, names, loc="outside lower center", ncols=3, fontsize="small")
    return plot
