"""Small work: few and small images, where starting operators counts as much as computing.

Training steps and inference are measured as the `step` suite does; `host` runs DenseNet-121's step
with operators that do nothing.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from math import prod

import torch

from benchmarks import host
from benchmarks.measure import MeasurementError
from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.peers import PEERS
from benchmarks.progress import Progress
from benchmarks.suites import Options, Record, Save, has, step
from benchmarks.suites.latency_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"peers", "parts", "rounds", "amp"})
PARTS = ("time", "inference", "host")
QUICK_ROUNDS, FULL_ROUNDS = 15, 50

OURS = ("ours-none", "ours-bottleneck", "ours-block")
BASIC = ("naive", "naive-channels-last", *OURS, "ours-optimized")
ENGINES = ("onnxruntime", "openvino")  # on the CPU in float32
COMPILED = ("compiled-naive",)  # takes minutes: in the full form, or where it is named

_of_121 = partial(replace, NETWORKS["densenet121"])
# Part → what it measures.
SMALL = {
    "time": [_of_121(batch_size=1, image_size=64), _of_121(batch_size=2, image_size=64)],
    "inference": [
        _of_121(batch_size=1, image_size=32),
        _of_121(batch_size=1, image_size=64),
        _of_121(batch_size=1, image_size=224),
        _of_121(batch_size=8, image_size=224),
    ],
}
# Two classes: the classifier is PyTorch's own, and computes.
HOST = _of_121(batch_size=1, image_size=64, num_classes=2)


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    record = step.plan(options)
    settings = record["settings"]
    engines = ENGINES if options.device.type == "cpu" and settings["amp"] == "none" else ()
    wanted = options.peers or (*BASIC, *engines, *(COMPILED if options.full else ()))
    parts = list(options.parts or PARTS)
    by_size = sorted(
        (s for specs in SMALL.values() for s in specs), key=lambda s: prod(s.input_shape)
    )
    specs = {spec.title: spec for spec in by_size}
    settings.update(
        networks=[spec.to_json() for spec in specs.values()],
        parts_of={
            title: [part for part in parts if specs[title] in SMALL.get(part, ())]
            for title in specs
        },
        peers=[name for name in wanted if PEERS[name].installed],
        not_installed=[PEERS[name].requires for name in wanted if not PEERS[name].installed],
        parts=parts,
        rounds=options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
        host=HOST.to_json(),
    )
    record["host"] = []
    return record


def failures(record: Record) -> list[str]:
    """What could not be measured."""
    host_errors = [f"host: {entry['error']}" for entry in record["host"] if "error" in entry]
    return step.failures(record) + host_errors


def run(options: Options, record: Record, progress: Progress, save: Save) -> None:
    """Measure the host's share, then network by network."""
    settings = record["settings"]
    ours = (
        [name for name in settings["peers"] if name in OURS] if "host" in settings["parts"] else []
    )
    if not has(record, "host", {}, lambda entry: "error" not in entry, count=len(ours)):
        progress.describe("the host's share")
        try:
            record["host"] = host.measure(
                NetworkSpec.from_json(settings["host"]),
                ours,
                settings["rounds"],
                torch.get_num_threads(),
                settings["seed"],
            )
        except MeasurementError as error:
            record["host"] = [{"error": str(error)}]
        save()
    step.run(options, record, progress, save)
