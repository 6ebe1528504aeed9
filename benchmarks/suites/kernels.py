"""Every kernel on the networks' shapes, against the machine's peak and PyTorch's operators."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.utils.benchmark import Timer

from benchmarks.kernels import machine
from benchmarks.kernels.cases import make
from benchmarks.kernels.machine import Machine
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, Shape, shapes
from benchmarks.measure import tuned_libraries
from benchmarks.networks import KNOWN_NETWORKS, MAIN_NETWORKS
from benchmarks.report import Column, Record, Row, Table, billions, milliseconds, percent
from benchmarks.suites import Advance, Options, Suite, Task
from densenet_fast.train.errors import UsageError

ROUNDS = (3, 10)  # of the quick and the full form
BURST_SECONDS = (0.1, 0.2)
CALLS = 2  # of each case: ours and PyTorch's
MACHINE_WORK = 30.0  # of the progress bar, in bursts


class Kernels(Suite):
    """Parts are kernels."""

    title = "Kernels: time, share of the machine's peak, and PyTorch's operators"
    options = frozenset({"networks", "parts", "rounds"})
    parts = (*CONVOLUTIONS, *MEMORY_BOUND)
    known_networks = KNOWN_NETWORKS

    def plan(self, options: Options) -> Record:
        present = torch.get_num_threads()
        threads = [present] if options.device.type == "cuda" else sorted({1, present})
        parts, networks = options.parts or self.parts, options.networks or MAIN_NETWORKS
        for name in networks:
            if KNOWN_NETWORKS[name].segmentation:
                raise UsageError(f"the suite 'kernels' has no shapes of {name}: it segments")
        return {
            "settings": {
                "networks": list(networks),
                "parts": list(parts),
                "rounds": options.rounds_of(ROUNDS),
                "burst_seconds": BURST_SECONDS[options.full],
                "threads": threads,
                "matmul_sizes": list(machine.MATMUL_SIZES),
                "copy_bytes": machine.COPY_BYTES,
                "seed": options.seed,
            },
            "machine": [{"threads": count} for count in threads],
            "rows": [
                {
                    "threads": count,
                    "kernel": kernel,
                    "network": network,
                    "label": shape.label,
                    "shape": asdict(shape),
                }
                for count in threads
                for kernel in parts
                for network in networks
                for shape in shapes(kernel, network)
            ],
        }

    def tasks(self, options: Options, record: Record) -> Iterator[Task]:
        settings = record["settings"]
        for peak in record["machine"]:
            threads = peak["threads"]
            call = partial(_measure_machine, peak, options)
            yield Task(
                f"the machine's peak, threads: {threads}", MACHINE_WORK, "flops" in peak, call
            )
            for row in _of_threads(record, threads):
                times = row.get("seconds", {"": ()})
                done = all(len(found) == settings["rounds"] for found in times.values())
                call = partial(_measure, row, options, settings)
                text = f"{row['kernel']}, {row['label']}, threads: {threads}"
                yield Task(text, CALLS * settings["rounds"], done, call)

    def tables(self, record: Record) -> list[Table]:
        found = []
        for peak in record["machine"]:
            if "flops" in peak:
                reached = Machine(peak["flops"], peak["bandwidth"])
                columns, threads = _columns(reached), peak["threads"]
                for text, products in (("products", True), ("bound by memory", False)):
                    rows = [
                        row
                        for row in _of_threads(record, threads)
                        if (row["kernel"] in CONVOLUTIONS) == products
                    ]
                    title = f"{text}, threads: {threads}".capitalize()
                    case = lambda row: f"{row['kernel']}, {row['label']}"  # noqa: E731
                    found.append(Table(title, columns, rows, case, "kernel"))
        return found

    def findings(self, record: Record) -> list[str]:
        return [
            f"Measured peak, threads: {peak['threads']}: {peak['flops'] / 1e9:.1f} GFLOP/s, "
            f"{peak['bandwidth'] / 1e9:.1f} GB/s."
            for peak in record["machine"]
            if "flops" in peak
        ]


def _of_threads(record: Record, threads: int) -> list[Row]:
    return [row for row in record["rows"] if row["threads"] == threads]


def _ours(row: Row) -> float:
    return float(min(row["seconds"]["ours"]))


def _usual(row: Row) -> float:
    return float(min(row["seconds"]["torch"]))


def _columns(reached: Machine) -> tuple[Column, ...]:
    """What a kernel reaches of a machine; a kernel without products has no FLOPs."""

    def rate(row: Row) -> float | None:
        return row["flops"] / _ours(row) or None

    def bandwidth(row: Row) -> float:
        return float(row["moved"] / _ours(row))

    def arithmetic(row: Row) -> float | None:
        return (rate(row) or 0) / reached.flops or None

    def limit(row: Row) -> str:
        return reached.limit(_ours(row), row["flops"], row["moved"])

    return (
        Column("ms", _ours, milliseconds, ratio="speed", rival=_usual),
        Column("PyTorch, ms", _usual, milliseconds),
        Column("GFLOP/s", rate, billions),
        Column("of peak", arithmetic, percent),
        Column("GB/s", bandwidth, billions),
        Column("of bandwidth", lambda row: bandwidth(row) / reached.bandwidth, percent),
        Column("limited by", limit),
    )


def _measure_machine(peak: Row, options: Options, _: Advance) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(peak["threads"])
    try:
        peak.update(asdict(machine.measure(options.device)))
    finally:
        torch.set_num_threads(before)


def _measure(row: Row, options: Options, settings: dict[str, Any], advance: Advance) -> None:
    """Time ours and PyTorch's in turn, each again and again; a row fills burst by burst.

    A call then finds in the caches what its own last run left there.
    """
    case = make(row["kernel"], Shape(**row["shape"]), settings["seed"], options.device)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    row.update(flops=case.flops, moved=case.moved, seconds=times)
    calls = {"ours": case.ours, "torch": case.torch}
    with tuned_libraries(options.device):
        for _ in range(settings["rounds"]):
            for name, call in calls.items():
                timer = Timer("call()", globals={"call": call}, num_threads=row["threads"])
                burst = timer.blocked_autorange(min_run_time=settings["burst_seconds"])
                times[name].append(min(burst.times))
                advance(1)


SUITE = Kernels()
