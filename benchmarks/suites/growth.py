"""What switching gives and costs at a growth rate: DenseNet-BCs of one depth, k from 8 to 48."""

from __future__ import annotations

from benchmarks.suites import Options, Record, sweep
from benchmarks.suites.step import failures, run
from benchmarks.suites.sweep_page import figure, page

__all__ = ["OPTIONS", "PARTS", "failures", "figure", "page", "plan", "run"]

OPTIONS = frozenset({"growth_rates", "dims", "peers", "parts", "rounds"})
PARTS = sweep.PARTS

GROWTH_RATES = (8, 12, 16, 24, 32, 40, 48)
QUICK_GROWTH_RATES = (8, 12, 24, 48)
DEPTH = 40
BATCH_SIZE = 32


def plan(options: Options) -> Record:
    """Settings of the quick or the full form, as the user changed them."""
    rates = options.growth_rates or (GROWTH_RATES if options.full else QUICK_GROWTH_RATES)
    specs = {k: sweep.network(options, DEPTH, k, BATCH_SIZE) for k in rates}
    return sweep.plan(options, "growth rate", f"Growth rates at depth {DEPTH}", specs)
