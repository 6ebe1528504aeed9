"""Every kernel on the networks' shapes, against the machine's peak and PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import torch

from benchmarks.kernels import machine
from benchmarks.kernels.cases import make
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, Shape, shapes
from benchmarks.measure import bursts, tuned_libraries
from benchmarks.networks import KNOWN_NETWORKS, MAIN_NETWORKS
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has
from benchmarks.suites.kernels_page import figure, page

__all__ = ["KNOWN_NETWORKS", "OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"networks", "parts", "rounds"})
PARTS = (*CONVOLUTIONS, *MEMORY_BOUND)

QUICK_ROUNDS = 3
FULL_ROUNDS = 10
QUICK_BURST_SECONDS = 0.1
FULL_BURST_SECONDS = 0.2
CALLS = 2  # of each case: ours and PyTorch's
MACHINE_WORK = 30.0  # of the progress bar, in bursts


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    present = torch.get_num_threads()
    threads = [present] if options.device.type == "cuda" else sorted({1, present})
    return {
        "settings": {
            "networks": list(options.networks or MAIN_NETWORKS),
            "parts": list(options.parts or PARTS),
            "rounds": options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
            "burst_seconds": FULL_BURST_SECONDS if options.full else QUICK_BURST_SECONDS,
            "threads": threads,
            "matmul_sizes": list(machine.MATMUL_SIZES),
            "copy_bytes": machine.COPY_BYTES,
            "least_share": machine.LEAST_SHARE,
            "seed": options.seed,
        },
        "machine": [],
        "kernels": [],
    }


def failures(record: Record) -> list[str]:
    """A kernel either runs or raises."""
    return []


def _cases(record: Record) -> Iterator[tuple[str, str, Shape]]:
    """Kernel, network and shape, in the order of the tables."""
    for kernel in record["settings"]["parts"]:
        for network in record["settings"]["networks"]:
            for shape in shapes(kernel, network):
                yield kernel, network, shape


@contextmanager
def _threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure the machine and then every case, for each number of threads."""
    settings = record["settings"]
    cases = list(_cases(record))

    def whole(entry: dict[str, Any]) -> bool:
        return all(len(times) == settings["rounds"] for times in entry["seconds"].values())

    work = MACHINE_WORK + CALLS * settings["rounds"] * len(cases)
    progress.start(work * len(settings["threads"]))
    for threads in settings["threads"]:
        with _threads(threads), tuned_libraries(options.device):
            progress.describe(f"the machine's peak, threads: {threads}")
            if all(entry["threads"] != threads for entry in record["machine"]):
                peaks = asdict(machine.measure(options.device))
                record["machine"].append({"threads": threads, **peaks})
                save()
            progress.advance(MACHINE_WORK)
            for kernel, network, shape in cases:
                progress.describe(f"{kernel}, {shape.label}, threads: {threads}")
                entry = {"threads": threads, "kernel": kernel, "network": network}
                if has(record, "kernels", {**entry, "label": shape.label}, whole):
                    progress.advance(CALLS * settings["rounds"])
                    continue
                _measure(entry, shape, record, options, progress.advance)
                save()


def _measure(
    entry: dict[str, Any],
    shape: Shape,
    record: Record,
    options: Options,
    advance: Callable[[], None],
) -> None:
    """Time one case; its entry fills burst by burst."""
    settings = record["settings"]
    case = make(entry["kernel"], shape, settings["seed"], options.device)
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    entry.update(shape=asdict(shape), label=shape.label, flops=case.flops, moved=case.moved)
    record["kernels"].append({**entry, "seconds": times})
    bursts(
        {"ours": case.ours, "torch": case.torch},
        settings["rounds"],
        settings["burst_seconds"],
        options.device,
        times=times,
        advance=advance,
    )
