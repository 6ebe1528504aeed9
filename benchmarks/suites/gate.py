"""A few ratios with generous floors: has a change made something much slower or larger?

A report. Memory is exact, so a ratio of memory below its floor is a failure; times depend on what
else the machine does, so a speed below its floor is only said.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.networks import NETWORKS, NetworkSpec, densenet_bc
from benchmarks.suites import Options, Record, step
from benchmarks.suites.gate_page import figure, page, ratios
from benchmarks.suites.step import run

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"parts", "rounds"})
PARTS = step.PARTS
PEERS = ("naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")
ROUNDS = 3

SMALL_121 = replace(NETWORKS["densenet121"], batch_size=2)
ONE_IMAGE = replace(NETWORKS["densenet121"], batch_size=1, image_size=64)
NETWORKS_OF_THE_GATE: tuple[NetworkSpec, ...] = (
    SMALL_121,
    densenet_bc(40, 12, batch_size=16),
    ONE_IMAGE,
)
# Network → part → implementation → the least that naive's figure may be of ours. About two thirds
# of what is measured on processors with AVX2, where the gain in speed is smallest; one image's with
# AVX-512, where the host's share is largest. A network is measured in the parts that have floors.
FLOORS: dict[str, dict[str, dict[str, float]]] = {
    SMALL_121.title: {
        "memory": {"ours-none": 2.5, "ours-bottleneck": 5.0, "ours-block": 5.0},
        "time": {"ours-none": 1.1, "ours-bottleneck": 1.0, "ours-block": 0.8},
        "inference": {"ours-bottleneck": 1.0},
    },
    NETWORKS_OF_THE_GATE[1].title: {
        "memory": {"ours-none": 2.5, "ours-bottleneck": 4.0, "ours-block": 4.0},
        "time": {"ours-none": 1.2, "ours-bottleneck": 1.1, "ours-block": 0.8},
        "inference": {"ours-bottleneck": 1.0},
    },
    ONE_IMAGE.title: {
        "time": {"ours-none": 0.5, "ours-bottleneck": 0.5, "ours-block": 0.4},
        "inference": {"ours-bottleneck": 0.5},
    },
}


def plan(options: Options) -> Record:
    """Settings; the full form has more rounds."""
    record = step.plan(options)
    parts = record["settings"]["parts"]
    record["settings"].update(
        networks=[spec.to_json() for spec in NETWORKS_OF_THE_GATE],
        parts_of={
            title: [part for part in floors if part in parts] for title, floors in FLOORS.items()
        },
        peers=list(PEERS),
        rounds=options.rounds or (4 * ROUNDS if options.full else ROUNDS),
        floors=FLOORS,
    )
    return record


def failures(record: Record) -> list[str]:
    """What could not be measured, and ratios of memory below their floors."""
    below = [
        f"{ratio.text}: {ratio.value:.2f}×, at least {ratio.floor}× expected"
        for ratio in ratios(record)
        if ratio.part == "memory" and ratio.below
    ]
    return step.failures(record) + below
