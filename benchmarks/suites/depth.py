"""How memory and time grow with depth: DenseNet-BCs of one growth rate, 22 to 250 layers deep."""

from __future__ import annotations

from benchmarks.networks import NetworkSpec, densenet_bc
from benchmarks.suites import Options, Record, sweep
from benchmarks.suites.step import failures, run
from benchmarks.suites.sweep_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"depths", "peers", "parts", "rounds"})
PARTS = sweep.PARTS

DEPTHS = (22, 40, 100, 148, 190, 250)
QUICK_DEPTHS = (22, 100, 250)
GROWTH_RATE = 12
# Depth → images, up to it: a naive step then takes about a second on two cores.
BATCHES = {22: 128, 40: 64, 100: 32, 148: 16, 250: 8}
LEAST_BATCH = 4


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    depths = options.depths or (DEPTHS if options.full else QUICK_DEPTHS)
    specs = {depth: _of_depth(depth) for depth in depths}
    return sweep.plan(options, "depth", f"Depths at k={GROWTH_RATE}", specs)


def _of_depth(depth: int) -> NetworkSpec:
    images = next((n for limit, n in BATCHES.items() if depth <= limit), LEAST_BATCH)
    return densenet_bc(depth, GROWTH_RATE, batch_size=images)
