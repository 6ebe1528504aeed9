"""Is densenet_fast slower than the naive network anywhere? DenseNet-BCs of many widths and depths.

One training step and inference of every network, measured as the `step` suite does. Being slower is
a finding of the page, not a failure.
"""

from __future__ import annotations

from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.suites import Options, Record, step
from benchmarks.suites.step import failures, run
from benchmarks.suites.sweep_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"growth_rates", "depths", "peers", "parts", "rounds"})
PARTS = step.PARTS
QUICK_PARTS = ("time", "inference")  # each figure of memory takes a child process
PEERS = ("naive", "naive-channels-last", "ours-none", "ours-bottleneck", "ours-block")

GROWTH_RATES = (8, 12, 16, 24, 32, 40, 48)
QUICK_GROWTH_RATES = (8, 12, 24, 48)
DEPTH = 40  # where the growth rates differ
BATCH_SIZE = 32

DEPTHS = (22, 40, 64, 100, 148, 190, 250)
QUICK_DEPTHS = (22, 100, 250)
GROWTH_RATE = 12  # where the depths differ
# Depth → images, up to it: a naive step then takes about a second on two cores.
DEPTH_BATCHES = {22: 128, 40: 64, 100: 32, 148: 16, 250: 8}
LEAST_BATCH = 4

QUICK_ROUNDS = 3
FULL_ROUNDS = 10


def plan(options: Options) -> Record:
    """Settings of both sweeps, or of the one whose values the user named."""
    rates, depths = options.growth_rates or (), options.depths or ()
    if not rates and not depths:
        rates = GROWTH_RATES if options.full else QUICK_GROWTH_RATES
        depths = DEPTHS if options.full else QUICK_DEPTHS
    sweeps = {
        "growth rate": {k: densenet_bc(DEPTH, k, batch_size=BATCH_SIZE) for k in rates},
        "depth": {depth: _of_depth(depth) for depth in depths},
    }
    titles = {
        "growth rate": f"Growth rates at depth {DEPTH}",
        "depth": f"Depths at k={GROWTH_RATE}",
    }
    return {
        "settings": {
            "sweeps": [
                {
                    "varied": varied,
                    "title": titles[varied],
                    "cases": [
                        {"value": value, "network": spec.title} for value, spec in specs.items()
                    ],
                }
                for varied, specs in sweeps.items()
                if specs
            ],
            "networks": [spec.to_json() for specs in sweeps.values() for spec in specs.values()],
            "peers": list(options.peers or PEERS),
            "parts": list(options.parts or (PARTS if options.full else QUICK_PARTS)),
            "rounds": options.rounds or (FULL_ROUNDS if options.full else QUICK_ROUNDS),
            "seed": options.seed,
            "amp": "none",
        },
        "memory": [],
        "time": [],
        "inference": [],
    }


def _of_depth(depth: int) -> NetworkSpec:
    images = next((n for limit, n in DEPTH_BATCHES.items() if depth <= limit), LEAST_BATCH)
    return densenet_bc(depth, GROWTH_RATE, batch_size=images)
