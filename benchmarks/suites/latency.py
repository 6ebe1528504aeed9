"""Small work: few and small images, where starting operators counts as much as computing.

Measured as the `step` suite does. The last network has DenseNet-121's layers and one channel for
each of its 32: what its step takes is what the host needs to start a step's operators.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks import ranking
from benchmarks.networks import NETWORKS, NetworkSpec
from benchmarks.report import Page
from benchmarks.suites import Options, Record, step, step_page
from benchmarks.suites.step import failures, run
from benchmarks.suites.step_page import figure

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"peers", "parts", "rounds", "amp"})
PARTS = ("time", "inference")
QUICK_ROUNDS, FULL_ROUNDS = 15, 50

_121 = NETWORKS["densenet121"]
SMALL = [
    replace(_121, batch_size=batch_size, image_size=image_size)
    for batch_size, image_size in ((1, 64), (2, 64), (8, 64), (1, 224))
]
HOST = NetworkSpec("Layers of DenseNet-121", 1, _121.block_config, 2, 64, 2, 1, num_classes=2)


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    record = step.plan(options)
    record["settings"].update(
        networks=[spec.to_json() for spec in (*SMALL, HOST)],
        parts=list(options.parts or PARTS),
        rounds=options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
    )
    return record


def page(record: Record) -> Page:
    """The step suite's page, what its last network is for, and where we are not first."""
    result = step_page.page(record)
    result.title = "Small work: latency of a step and of inference"
    result.heading("Host")
    result.add(
        f"{HOST.title} computes next to nothing. Its times are those of starting operators: "
        "Python, PyTorch's dispatcher, allocations and the kernels' own beginnings. On a GPU they "
        "stand in front of every step whose kernels take less."
    )
    result.heading("Where densenet_fast is not first")
    result.add(ranking.summary([record]))
    return result
