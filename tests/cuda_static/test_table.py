"""The printed table's kernels of a layer are those that the predictions count."""

from __future__ import annotations

import pytest
import table
from occupancy import Choice, Occupancy

from benchmarks.prediction import fused
from benchmarks.prediction.shapes import FORMATS, Block

BLOCK = Block(2, 64, 128, 512, 1, 32, 128, None)  # large enough not to be split
FORMAT = FORMATS["bfloat16"]


@pytest.mark.parametrize("mode", ["none", "bottleneck", "block"])
def test_kernels_of_a_layer(mode: str) -> None:
    forward = list(fused.layer_forward(BLOCK, 0, FORMAT))
    backward = list(fused.layer_backward(BLOCK, 0, FORMAT, 108, recompute=mode != "none"))
    if mode == "block":
        backward += fused.layer_again(BLOCK, 0, FORMAT)
    assert table.launches(table.FORWARD) == sum(op.launches for op in forward)
    printed = table.launches(table.LAUNCHES[f'backward, "{mode}"'])
    assert printed == sum(op.launches for op in backward)


def test_elements_loaded_once_are_what_a_roofline_counts() -> None:
    """Per pixel, but for weights and partial results, and for further sweeps."""
    ops = [
        fused.conv1x1_forward(BLOCK.rows, 512, 128, FORMAT),
        *fused.conv1x1_backward(BLOCK.rows, 512, 128, FORMAT, 108),
        fused.conv3x3_forward(BLOCK, FORMAT),
        *fused.conv3x3_backward(BLOCK, FORMAT, 108),
    ]
    for op, printed in zip(ops, table.traffic(), strict=True):
        assert op.name == printed.kernel
        weight = (512 * 128 if "1x1" in op.name else 9 * 128 * 32) * FORMAT.parameter
        images = op.moved - op.repeated - weight
        assert images == (printed.ideal_loaded + printed.stored) * BLOCK.rows * FORMAT.element
        assert printed.loaded >= printed.ideal_loaded


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
