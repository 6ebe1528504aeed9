"""The printed table says of a layer what is counted and what its shape gives."""

from __future__ import annotations

import pytest
import table
from occupancy import Choice, Occupancy


# What tests/cuda_emulator/test_block_launches.py counts of a layer, as it runs: with its bottleneck
# held, and made again; and what a layer without statistics adds.
@pytest.mark.parametrize(
    ("name", "kernels"),
    [
        ("forward, every mode", 4),
        ('backward, "none"', 8),
        ('backward, "bottleneck"', 9),
        ('backward, "block"', 9 + 2),
    ],
)
def test_kernels_of_a_layer(name: str, kernels: int) -> None:
    assert table.launches(table.LAUNCHES[name]) == kernels


def test_elements_are_loaded_once_or_by_every_tile_that_needs_them() -> None:
    narrow, wide = table.traffic(128, 128, 32), table.traffic(512, 256, 32)
    for one, more in zip(narrow, wide, strict=True):
        assert more.kernel == one.kernel
        assert one.loaded >= one.ideal_loaded
        if one.kernel.startswith("conv1x1"):  # one tile has all columns, and 3×3 tiles have borders
            assert one.loaded == one.ideal_loaded
        if one.kernel != "conv3x3 forward":  # whose 32 columns are one tile in both
            assert more.loaded / more.ideal_loaded > one.loaded / one.ideal_loaded


def test_only_kernels_of_the_policy_are_printed() -> None:
    entries = [
        Occupancy(Choice(f"rows_product<{policy}, 128>", "sm_80", 256, 61440, 3), 128, 2)
        for policy in ("BfloatPolicy", "HalfPolicy")
    ]
    entries.append(Occupancy(Choice("tap_product<BfloatPolicy>", "sm_80", 288, 4096, 2), 96, 1))
    text = table.tables(entries, "BfloatPolicy")
    assert "| rows_product<BfloatPolicy, 128> | sm_80 | 128 | 3 | 60.0 | 2 | 16 |" in text
    assert "| tap_product<BfloatPolicy> | sm_80 |" in text
    assert "HalfPolicy" not in text
