"""Prediction of a training step on GPUs that are not here: a roofline over counted operations.

Bytes, FLOPs, kernels started and memory are counted from the networks' shapes
(`benchmarks.prediction`) and set against the vendors' figures of each device. The host's time alone
is measured, on this machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from benchmarks import host
from benchmarks.measure import MeasurementError
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec
from benchmarks.prediction import memory_plan
from benchmarks.prediction.devices import DEVICES, Device
from benchmarks.prediction.fused import fused_step
from benchmarks.prediction.memory_plan import IMPLEMENTATIONS
from benchmarks.prediction.shapes import FORMATS, Format, Op, parameters
from benchmarks.prediction.usual import usual_step
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save
from benchmarks.suites.predict_page import figure, page
from densenet_fast.blocks.specs import Checkpoint

__all__ = ["IMPLEMENTATIONS", "OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"networks", "parts"})
PARTS = ("steps", "operations", "host")

HOST_IMAGE, HOST_ROUNDS = 64, 25  # pixels: the host's time does not depend on images
LARGE_BATCH = 256  # images; the full form

OURS: dict[str, Checkpoint] = {f"ours-{mode}": mode for mode in memory_plan.OURS}
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
        },
        "steps": [],
        "operations": [],
        "host": [],
    }


def failures(record: Record) -> list[str]:
    """Counting cannot fail; measuring the host can."""
    return [f"host: {entry['error']}" for entry in record["host"] if "error" in entry]


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
    record.update({part: [] for part in PARTS})  # counting again takes no time
    progress.start(len(settings["networks"]) * len(FORMATS))
    if "host" in settings["parts"]:
        progress.describe("the host's time")
        record["host"] = _host(settings["networks"], options.seed)
    for data in settings["networks"]:
        spec = NetworkSpec.from_json(data)
        for fmt in FORMATS.values():
            # All devices or none: a row of the page has a figure of each.
            found = [_predict(spec, fmt, device, settings["parts"]) for device in DEVICES]
            for part in ("steps", "operations"):
                record[part] += [entry for entries in found for entry in entries[part]]
            progress.advance()
        save()


def _host(networks: Sequence[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Seconds of a step of ours whose operators return at once, network by network."""
    found = []
    for data in {data["name"]: data for data in networks}.values():
        size = min(HOST_IMAGE, data["image_size"])
        spec = replace(NetworkSpec.from_json(data), batch_size=1, image_size=size)
        try:
            figures = host.measure(spec, list(OURS), HOST_ROUNDS, 1, seed)
        except MeasurementError as error:
            return [{"error": str(error)}]
        found += [
            {"network": spec.name, "implementation": f["peer"], "seconds": median(f["seconds"])}
            for f in figures
        ]
    return found


def _predict(
    spec: NetworkSpec, fmt: Format, device: Device, parts: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """The entries of one case, by part of the record."""
    entries: dict[str, list[dict[str, Any]]] = {"steps": [], "operations": []}
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
