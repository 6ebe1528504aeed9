"""How memory and time grow with depth: DenseNet-BCs of one growth rate, 22 to 250 layers deep."""

from __future__ import annotations

from benchmarks.suites import Options, Record, sweep
from benchmarks.suites.step import failures, run
from benchmarks.suites.sweep_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"depths", "dims", "peers", "parts", "rounds"})
PARTS = sweep.PARTS

DEPTHS = (22, 40, 100, 148, 190, 250)
QUICK_DEPTHS = (40, 100, 190, 250)
GROWTH_RATE = 12
BATCH_SIZE = 8  # a naive step of the deepest then takes about a second on two cores


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    depths = options.depths or (DEPTHS if options.full else QUICK_DEPTHS)
    specs = {depth: sweep.network(options, depth, GROWTH_RATE, BATCH_SIZE) for depth in depths}
    return sweep.plan(options, "depth", f"Depths at k={GROWTH_RATE}", specs)
