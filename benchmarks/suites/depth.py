"""How memory and time grow with depth: DenseNet-BCs of one growth rate, 22 to 250 layers deep."""

from benchmarks.suites.sweep import Sweep, sweep_network

GROWTH_RATE, BATCH_SIZE = 12, 8  # a naive step of the deepest takes about a second on two cores

SUITE = Sweep(
    "depth",
    "depths",
    f"Depths at k={GROWTH_RATE}",
    ((40, 100, 190, 250), (22, 40, 100, 148, 190, 250)),
    lambda options, depth: sweep_network(options, depth, GROWTH_RATE, BATCH_SIZE),
)
