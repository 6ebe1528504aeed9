"""How memory and time grow with depth: DenseNet-BCs of one growth rate, 22 to 250 layers deep."""

from __future__ import annotations

from benchmarks.networks import NetworkSpec
from benchmarks.suites import Options
from benchmarks.suites.sweep import Sweep, sweep_network

GROWTH_RATE = 12
BATCH_SIZE = 8  # a naive step of the deepest then takes about a second on two cores


class Depth(Sweep):
    """The number of layers varies."""

    title = f"Depths at k={GROWTH_RATE}: memory and speed"
    options = frozenset({"depths", "dims", "peers", "parts", "rounds"})
    varied, option = "depth", "depths"
    quick, full = (40, 100, 190, 250), (22, 40, 100, 148, 190, 250)

    def network(self, value: int, options: Options) -> NetworkSpec:
        return sweep_network(options, value, GROWTH_RATE, BATCH_SIZE)


SUITE = Depth()
