"""How the products of a training step are cut into blocks, from the launchers' own functions."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from occupancy import program

from benchmarks.kernels.shapes import blocks
from benchmarks.networks import NETWORKS, NetworkSpec

MULTIPROCESSORS = (108, 128, 132)  # A100, RTX 4090, H100
BATCHES = (8, 64, 256)
NAMES = ("densenet121", "densenet-bc-100")


class Product(NamedTuple):
    """One product of a network: the pixels of its result, channels written and read."""

    kind: str
    images: int
    height: int
    width: int
    out: int
    channels: int

    def __str__(self) -> str:
        pixels = f"{self.images}×{self.height}×{self.width}"
        return f"{self.kind} | {pixels} | {self.channels} → {self.out}"


class Grid(NamedTuple):
    """Its blocks on a device."""

    product: Product
    multiprocessors: int
    rows: int  # of a tile
    columns: int
    blocks: int
    splits: int  # of the reduction
    most: int  # blocks of the smallest tile with the most splits

    @property
    def waves(self) -> float:
        """Blocks for each multiprocessor."""
        return self.blocks / self.multiprocessors

    @property
    def tail(self) -> float:
        """How full the last wave is."""
        return self.waves % 1 or 1.0

    def row(self) -> str:
        """As a row of a Markdown table."""
        return (
            f"| {self.product} | {self.rows}×{self.columns} | {self.splits} | {self.blocks} | "
            f"{self.waves:.2f} | {self.tail:.2f} |"
        )


def network(name: str, batch: int) -> NetworkSpec:
    """A network of the benchmarks with another batch."""
    return replace(NETWORKS[name], batch_size=batch)


def products(spec: NetworkSpec) -> Iterator[Product]:
    """All products of a training step, layer by layer."""
    for block in blocks(spec):
        n, h, w = block.images, block.size, block.size
        for layer in range(block.layers):
            for part in ("forward", "dgrad", "wgrad"):
                yield Product(f"conv1x1_{part}", n, h, w, block.bottleneck, block.start(layer))
                yield Product(f"conv3x3_{part}", n, h, w, block.growth, block.bottleneck)
        if block.transition is not None:
            for part in ("forward", "dgrad", "wgrad"):
                name = f"transition_{part}"
                yield Product(name, n, h // 2, w // 2, block.transition, block.end)


def grids(folder: Path, spec: NetworkSpec, multiprocessors: int) -> list[Grid]:
    """The grids of all different products of a training step; `folder` is for the program."""
    every = list(dict.fromkeys(products(spec)))
    lines = "".join(f"{' '.join(map(str, p))} {multiprocessors}\n" for p in every)
    command = [str(program(folder, "grids"))]
    out = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    numbers = [map(int, line.split()) for line in out.splitlines()]
    return [Grid(p, multiprocessors, *n) for p, n in zip(every, numbers, strict=True)]
