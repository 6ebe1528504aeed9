"""What switching gives and costs at a growth rate: DenseNet-BCs of one depth, k from 8 to 48."""

from benchmarks.suites.sweep import Sweep, sweep_network

DEPTH, BATCH_SIZE = 40, 32

SUITE = Sweep(
    "growth rate",
    "growth_rates",
    f"Growth rates at depth {DEPTH}",
    ((8, 12, 24, 48), (8, 12, 16, 24, 32, 40, 48)),
    lambda options, growth_rate: sweep_network(options, DEPTH, growth_rate, BATCH_SIZE),
)
