"""Prints the product kernels as tables: `python tests/cuda_static/table.py [policy]`, or how the
products of a network are cut into blocks: `python tests/cuda_static/table.py grids`.

Registers come from the compiler's report, shared memory and stages from the launchers' own choice.
The default policy is BfloatPolicy; others are HalfPolicy, Tf32Policy, FloatPolicy and DoublePolicy.
"""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
from grids import BATCHES, MULTIPROCESSORS, NAMES, grids, network
from occupancy import Occupancy, occupancies

HEAD = (
    "| kernel | device | registers | stages | shared KiB | blocks per SM | warps per SM |\n"
    "| --- | --- | ---: | ---: | ---: | ---: | ---: |"
)

# Kernels started by one layer, beside two or three of a whole block: coefficients of the norms
# whose statistics are there, and packed weights. What each operator starts is counted under the
# emulator by test_kernels_orders.py and test_block_launches.py.
FORWARD = (
    "conv1x1: product 1, statistics and norm2's coefficients 1",
    "conv3x3: product 1, statistics and the next norm1's coefficients 1",
)
BACKWARD = (
    "deferred correction of the growth's gradient 1",
    "conv3x3: dgrad 1, sums and norm2's gradient coefficients 1, wgrad 1",
    "conv1x1: dgrad 1, sums and norm1's deferred sums 1, wgrad 1",
    "splits of both weight gradients 1",
)
BOTTLENECK_AGAIN = ("bottleneck again: product 1",)
LAYER_AGAIN = ("features again: conv1x1 1 and conv3x3 1, without statistics",)
LAUNCHES = {
    "forward, every mode": FORWARD,
    'backward, "none"': BACKWARD,
    'backward, "bottleneck"': BACKWARD + BOTTLENECK_AGAIN,
    'backward, "block"': BACKWARD + BOTTLENECK_AGAIN + LAYER_AGAIN,
}


class Traffic(NamedTuple):
    """Elements that one tile loads and stores, of the image alone, for a layer's shape."""

    kernel: str
    shape: str
    loaded: float  # from L2 or memory
    ideal_loaded: float  # every element of every operand once
    stored: float

    def row(self) -> str:
        """As a row of a Markdown table."""
        ratio = (self.loaded + self.stored) / (self.ideal_loaded + self.stored)
        return (
            f"| {self.kernel} | {self.shape} | {self.loaded:,.0f} | {self.ideal_loaded:,.0f} | "
            f"{self.stored:,.0f} | {ratio:.2f} |"
        )


def launches(parts: tuple[str, ...]) -> int:
    """The sum of the numbers behind the names."""
    return sum(int(n) for part in parts for n in re.findall(r"(?<= )\d+(?=,| |$)", part))


def traffic(channels: int = 512, bottleneck: int = 128, growth: int = 32) -> list[Traffic]:
    """Elements per pixel of a layer's products with 16-bit types and their default tiles.

    Tiles have 128 pixels and 128 columns (32 where a 3×3 convolution makes no more); a 3×3 tile of
    8 x 16 pixels has a border of one pixel. Weights and partial sums are left out.
    """
    c, b, k = channels, bottleneck, growth
    halo = 10 * 18 / 128
    columns = -(-c // 128)
    tap_out, tap_in = -(-k // 32), -(-b // 64)
    shape = f"{c} → {b}", f"{b} → {k}"
    return [
        Traffic("conv1x1 forward", shape[0], c * -(-b // 128), c, b),
        Traffic("conv1x1 dgrad", shape[0], 2 * b * columns + 2 * c, 2 * b + 2 * c, c),
        Traffic("conv1x1 wgrad", shape[0], 2 * b * columns + c * -(-b // 128), 2 * b + c, 0),
        Traffic("conv3x3 forward", shape[1], b * halo * -(-k // 128), b, k),
        Traffic("conv3x3 dgrad", shape[1], k * halo * -(-b // 128) + b, k + b, b),
        Traffic("conv3x3 wgrad", shape[1], k * tap_in + b * halo * tap_out, k + b, 0),
    ]


def tables(entries: list[Occupancy], policy: str) -> str:
    """All tables in Markdown."""
    chosen = [e for e in entries if f"<{policy}" in e.choice.kernel]
    blocks = [HEAD + "".join(f"\n{e.row()}" for e in chosen)]
    rows = [f"| {name} | {launches(p)} | {'; '.join(p)} |" for name, p in LAUNCHES.items()]
    blocks.append("\n".join(["| a layer | kernels | of which |", "| --- | ---: | --- |", *rows]))
    head = (
        "| product, elements per pixel | channels | loaded | loaded once | stored | of ideal |\n"
        "| --- | --- | ---: | ---: | ---: | ---: |"
    )
    blocks.append("\n".join([head, *(t.row() for t in traffic())]))
    return "\n\n".join(blocks)


GRIDS_HEAD = (
    "| product | pixels of the result | channels | tile | splits | blocks | waves | last wave |\n"
    "| --- | --- | --- | --- | ---: | ---: | ---: | ---: |"
)


def grid_tables(folder: Path) -> str:
    """Every product of every network, batch and device."""
    found = []
    for name in NAMES:
        for batch in BATCHES:
            for multiprocessors in MULTIPROCESSORS:
                every = grids(folder, network(name, batch), multiprocessors)
                found.append(f"{name}, batch {batch}, {multiprocessors} multiprocessors")
                found.append(GRIDS_HEAD + "".join(f"\n{grid.row()}" for grid in every))
    return "\n\n".join(found)


def main() -> None:
    """Compile what is not compiled yet, and print."""
    what = sys.argv[1] if len(sys.argv) > 1 else "BfloatPolicy"
    try:
        with tempfile.TemporaryDirectory() as folder:
            if what == "grids":
                print(grid_tables(Path(folder)))
            else:
                print(tables(occupancies(Path(folder)), what))
    except pytest.skip.Exception as missing:
        sys.exit(f"no table: {missing}")


if __name__ == "__main__":
    main()
