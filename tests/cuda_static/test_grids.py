"""The products of a training step fill the device where they have the work for it."""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled import CSRC
from grids import BATCHES, MULTIPROCESSORS, NAMES, Grid, grids, network

pytestmark = pytest.mark.slow  # a compiler's seconds


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("grids")


@pytest.mark.parametrize("multiprocessors", MULTIPROCESSORS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_products_fill_the_device(
    folder: Path, name: str, batch: int, multiprocessors: int
) -> None:
    """Three quarters of a wave, unless the smallest tiles and the most splits make fewer blocks."""
    found = grids(folder, network(name, batch), multiprocessors)
    below = [grid for grid in found if grid.waves < 0.75]
    assert all(grid.most < 0.75 * multiprocessors for grid in below), below
    # Images of 8 x 8 and 7 x 7 pixels in batches of eight.
    small = 8 * (16 * 16 if name == NAMES[1] else 7 * 7)
    assert all(g.product.images * g.product.height * g.product.width <= small for g in below)


def test_large_images_take_the_largest_tiles(folder: Path) -> None:
    found = {g.product.kind: g for g in grids(folder, network("densenet121", 256), 132)}
    first = next(g for g in grids(folder, network("densenet121", 256), 132))
    assert (first.rows, first.columns, first.splits) == (128, 128, 1)
    assert len(found) == 9


def test_splits_do_not_depend_on_the_device(folder: Path) -> None:
    """So that results do not, but for weight gradients."""

    def forward(multiprocessors: int) -> list[tuple[object, int]]:
        every: list[Grid] = grids(folder, network("densenet121", 8), multiprocessors)
        return [(g.product, g.splits) for g in every if not g.product.kind.endswith("wgrad")]

    assert forward(108) == forward(132) == forward(40)


def test_second_stages_are_trees() -> None:
    """At most 32 merges wait for each other, for 1,568 tiles of 128 rows."""
    text = (CSRC / "cuda" / "reductions.cuh").read_text()
    runs = int(text.split("kReduceRuns = ")[1].split(";")[0])
    assert "M four[4];" in text
    serial = -(-1568 // (4 * runs))
    assert serial + 2 + (runs - 1).bit_length() <= 32
