"""What the compiler and the launch choices say of the product kernels, against stated limits.

Compiles for two architectures, or with DENSENET_FAST_CUDA=all for all seven: many minutes, once.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from compiled import ARCHITECTURES, SOURCES, kernels
from occupancy import Occupancy, accesses, choices, occupancies, product_kernels

pytestmark = pytest.mark.slow

# Registers of a thread at most. 128 let sixteen warps share a multiprocessor. Plain arithmetic,
# sm_75, which copies through registers, and the largest data gradients get half as many warps,
# which 255 let them have.
LIMITS = {"rows_product": 128, "conv3x3_product": 128, "pixel_product": 128, "tap_product": 144}
SHARED_LIMIT = {"sm_75": 64 << 10, "sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("choices")


@pytest.fixture(scope="module")
def table(folder: Path) -> list[Occupancy]:
    return occupancies(folder)


def test_every_product_is_compiled_for_every_architecture() -> None:
    found = {(k.template, k.architecture) for k in product_kernels()}
    assert found == {(t, a) for t in LIMITS for a in ARCHITECTURES}


@pytest.mark.parametrize("source", SOURCES)
def test_no_spills_and_no_stack(source: str) -> None:
    """Nowhere, but for double precision outside the products: divisions are calls there."""
    spilling = [k for k in kernels(source) if k.spill_bytes or k.stack_bytes]
    assert not [k for k in spilling if k.template.endswith("_product") or "double" not in k.name]


def test_registers() -> None:
    for kernel in product_kernels():
        plain = "DoublePolicy" in kernel.name or "FloatPolicy" in kernel.name
        plain |= kernel.architecture < 80 or "PooledSource" in kernel.name
        plain |= "MaskedGradient" in kernel.name and "128, 128" in kernel.name
        assert kernel.registers <= (255 if plain else LIMITS[kernel.template]), kernel


def test_shared_memory_fits_every_device(folder: Path) -> None:
    for choice in choices(folder):
        assert choice.shared_bytes <= SHARED_LIMIT[choice.device], choice


def test_two_blocks_or_eight_warps_are_resident(table: list[Occupancy]) -> None:
    assert {o.choice.device for o in table} == {"sm_80", "sm_86", "sm_90"}
    for entry in table:
        assert entry.blocks >= 2 or entry.warps >= 8, entry.row()


def test_two_blocks_of_large_tiles_share_a_multiprocessor(table: list[Occupancy]) -> None:
    """With 16-bit types one block computes while another one loads, or there are sixteen warps."""
    large = [o for o in table if "_product<HalfPolicy" in o.choice.kernel]
    for entry in large:
        if entry.choice.device == "sm_86" or entry.choice.kernel.startswith("tap_product"):
            continue  # less shared memory; nine warps, which have it to themselves
        if "PooledSource" in entry.choice.kernel:
            continue  # four raw pieces a piece
        if "MaskedGradient" in entry.choice.kernel and "128, 128" in entry.choice.kernel:
            continue  # spills in the registers that two blocks would leave
        assert entry.blocks >= 2 or entry.warps >= 16, entry.row()


def test_no_bank_conflicts(folder: Path) -> None:
    """Of pieces and coefficients of a step, fragments, and the epilogues' slices."""
    found = accesses(folder)
    assert len(found) >= 8
    for access in found:
        assert access.wavefronts == access.ideal, access
