"""What the compiler and the launch choices say of the product kernels, against stated limits.

Compiles for sm_80 and sm_90: two minutes on one core, once for given sources. All architectures:

    for f in csrc/cuda/*.cu; do nvcc -std=c++17 -O3 -Xptxas -v -Icsrc -Icsrc/cuda -arch=all-major \\
        -c $f -o /dev/null; done
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled import ARCHITECTURES, SOURCES, kernels
from occupancy import Occupancy, choices, occupancies, product_kernels

pytestmark = pytest.mark.slow

# Registers of a thread at most, by the number of columns of the tile. 128 let two blocks of 256
# threads share a multiprocessor, 168 let one of them have it to itself with room for a second of
# less. Double precision needs more, and gets few blocks.
LIMITS = {
    ("rows_product", "StoreStatistics"): 128,
    ("rows_product", "MaskedGradient"): 168,
    ("rows_product", "UnpooledGradient"): 168,
    ("conv3x3_product", "StoreStatistics"): 128,
    ("conv3x3_product", "MaskedGradient"): 168,
    ("pixel_product", ""): 128,
    ("tap_product", ""): 144,
}
SHARED_LIMIT = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choices")


@pytest.fixture(scope="module")
def table(folder: Path) -> list[Occupancy]:
    return occupancies(folder)


def test_every_product_is_compiled_for_every_architecture() -> None:
    found = {(k.template, k.architecture) for k in product_kernels()}
    templates = {template for template, _ in LIMITS}
    assert found == {(t, a) for t in templates for a in ARCHITECTURES}


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_stack(source: str) -> None:
    """Nowhere, but for double precision outside the products: divisions are calls there."""
    spilling = [k for k in kernels(source) if k.spill_bytes or k.stack_bytes]
    assert not [k for k in spilling if k.template.endswith("_product") or "double" not in k.name]


def test_registers() -> None:
    for kernel in product_kernels():
        limit = next(
            limit
            for (template, part), limit in LIMITS.items()
            if kernel.template == template and part in kernel.name
        )
        if "DoublePolicy" in kernel.name:
            limit = 168
        assert kernel.registers <= limit, kernel


def test_shared_memory_fits_every_device(folder: Path) -> None:
    for choice in choices(folder):
        assert choice.shared_bytes <= SHARED_LIMIT[choice.device], choice


def test_two_blocks_or_eight_warps_are_resident(table: list[Occupancy]) -> None:
    assert {o.choice.device for o in table} == {"sm_80", "sm_86", "sm_90"}
    for entry in table:
        assert entry.blocks >= 2 or entry.warps >= 8, entry.row()


def test_two_blocks_of_the_default_tiles_share_a_multiprocessor(table: list[Occupancy]) -> None:
    """The forward, with 16-bit types: one block computes while another one loads."""
    default = [o for o in table if "StoreStatistics<HalfPolicy>" in o.choice.kernel]
    for entry in default:
        if "conv3x3" in entry.choice.kernel and entry.choice.device == "sm_86":
            continue  # two halos and the weights of nine taps: one block of eight warps
        assert entry.blocks >= 2, entry.row()
