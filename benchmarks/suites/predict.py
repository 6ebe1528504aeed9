"""Prediction of a training step on GPUs that are not here: a roofline over counted operations.

Nothing is measured. Bytes, FLOPs, kernels started and memory are counted from the networks' shapes
(`benchmarks.prediction`) and set against the vendors' figures of each device.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from typing import Any

from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec
from benchmarks.prediction import memory_plan
from benchmarks.prediction.devices import DEVICES, Device
from benchmarks.prediction.fused import fused_step
from benchmarks.prediction.shapes import FORMATS, Format, Op, parameters
from benchmarks.prediction.usual import usual_step
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save
from benchmarks.suites.predict_page import figure, page
from densenet_fast.blocks.specs import Checkpoint

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"networks", "parts"})
PARTS = ("steps", "operations")

# An assumption, not a measurement: host time of one kernel started from PyTorch in Python.
LAUNCH_SECONDS = 4e-6
LARGE_BATCH = 256  # images; the full form

# As peers of the other suites → how `memory_plan` calls them.
OURS: dict[str, Checkpoint] = {f"ours-{mode}": mode for mode in memory_plan.OURS}
IMPLEMENTATIONS = {
    "naive-channels-last": memory_plan.NAIVE,
    "memory-efficient": memory_plan.EFFICIENT,
    **OURS,
}
DETAILED = ("naive-channels-last", "ours-bottleneck")  # operation by operation


def plan(options: Options) -> Record:
    """Networks, and every figure and assumption that the prediction rests on."""
    specs = [NETWORKS[name] for name in options.networks or MAIN_NETWORKS]
    if options.full:
        specs += [replace(spec, batch_size=LARGE_BATCH) for spec in specs]
    return {
        "prediction": True,
        "settings": {
            "networks": [spec.to_json() for spec in specs],
            "formats": [asdict(fmt) for fmt in FORMATS.values()],
            "devices": [asdict(device) for device in DEVICES],
            "parts": list(options.parts or PARTS),
            "launch_seconds": LAUNCH_SECONDS,
        },
        "steps": [],
        "operations": [],
    }


def failures(record: Record) -> list[str]:
    """Counting cannot fail."""
    return []


def count(spec: NetworkSpec, fmt: Format, name: str, device: Device) -> list[Op]:
    """The operations of a training step of one implementation."""
    if name in OURS:
        return fused_step(spec, fmt, OURS[name], device.multiprocessors)
    return usual_step(spec, fmt, efficient=name == "memory-efficient")


def roofline(ops: Iterable[Op], fmt: Format, device: Device) -> float:
    """Seconds: each operation takes as long as its bytes or its FLOPs, whichever is longer."""
    return sum(
        max(op.moved / device.bandwidth, op.flops / device.rate(fmt.tensor, ours=op.ours))
        for op in ops
    )


def _totals(ops: Sequence[Op], fmt: Format, device: Device) -> dict[str, Any]:
    return {
        "moved": sum(op.moved for op in ops),
        "flops": sum(op.flops for op in ops),
        "repeated": sum(op.repeated for op in ops),
        "launches": sum(op.launches for op in ops),
        "seconds": roofline(ops, fmt, device),
    }


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Count every case."""
    settings = record["settings"]
    record["steps"], record["operations"] = [], []  # counting again takes no time
    progress.start(len(settings["networks"]) * len(FORMATS))
    for data in settings["networks"]:
        spec = NetworkSpec.from_json(data)
        for fmt in FORMATS.values():
            # All devices or none: a row of the page has a figure of each.
            found = [_predict(spec, fmt, device, settings["parts"]) for device in DEVICES]
            for part in PARTS:
                record[part] += [entry for entries in found for entry in entries[part]]
            progress.advance()
        save()


def _predict(
    spec: NetworkSpec, fmt: Format, device: Device, parts: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The entries of one case, by part of the record."""
    entries: dict[str, list[dict[str, Any]]] = {part: [] for part in PARTS}
    for name, planned in IMPLEMENTATIONS.items():
        case = {
            "network": spec.title,
            "format": fmt.name,
            "device": device.name,
            "implementation": name,
        }
        ops = count(spec, fmt, name, device)
        if "steps" in parts:
            forward = [op for op in ops if op.phase == "forward"]
            entries["steps"].append(
                {
                    **case,
                    "forward": _totals(forward, fmt, device),
                    "step": _totals(ops, fmt, device),
                    "kept": memory_plan.kept(spec, fmt, planned),
                    "peak": memory_plan.peak(spec, fmt, planned, device.multiprocessors),
                    "parameters": parameters(spec) * fmt.parameter,
                }
            )
        if "operations" in parts and name in DETAILED:
            for operation in dict.fromkeys(op.name for op in ops):
                chosen = [op for op in ops if op.name == operation]
                entry = {**case, "operation": operation, **_totals(chosen, fmt, device)}
                entries["operations"].append(entry)
    return entries
