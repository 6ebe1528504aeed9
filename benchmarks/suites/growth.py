"""What switching gives and costs at a growth rate: DenseNet-BCs of one depth, k from 8 to 48."""

from __future__ import annotations

from benchmarks.networks import NetworkSpec
from benchmarks.suites import Options
from benchmarks.suites.sweep import Sweep, sweep_network

DEPTH = 40
BATCH_SIZE = 32


class Growth(Sweep):
    """The growth rate varies."""

    title = f"Growth rates at depth {DEPTH}: memory and speed"
    options = frozenset({"growth_rates", "dims", "peers", "parts", "rounds"})
    varied, option = "growth rate", "growth_rates"
    quick, full = (8, 12, 24, 48), (8, 12, 16, 24, 32, 40, 48)

    def network(self, value: int, options: Options) -> NetworkSpec:
        return sweep_network(options, DEPTH, value, BATCH_SIZE)


SUITE = Growth()
