"""ldmatrix and mma: whole products, rounding, and the fragment tables against CuTe's."""

from __future__ import annotations

import importlib.util
import subprocess
from collections.abc import Iterator
from pathlib import Path

import host_build
import pytest
import torch
from emulated_library import EmulatorError, Library
from test_emulator import SAMPLES, error_of, orders, pointer
from torch import Tensor

pytestmark = pytest.mark.slow  # a compiler's seconds

# Elements of 32 lanes' fragments.
FRAGMENTS = {"a16": 256, "b16": 128, "c16": 128, "a8": 128, "b8": 64, "c8": 128}
FRAGMENTS |= {"a_tf32": 128, "b_tf32": 64, "c_tf32": 128}


@pytest.fixture(scope="module")
def built() -> Library:
    return host_build.load(SAMPLES)


@pytest.fixture
def library(built: Library) -> Iterator[Library]:
    built.set_order("forward")
    yield built
    built.set_order("forward")


# ---- Fragment tables ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables() -> dict[tuple[str, str], dict[tuple[int, int], tuple[int, int]]]:
    """Row and column by (lane, element), by whose table it is and the fragment's name."""
    found = importlib.util.find_spec("cutlass_library")
    if found is None or found.origin is None:
        pytest.skip("needs CuTe's headers (pip install nvidia-cutlass)")
    headers = Path(found.origin).parent / "source" / "include"
    if not (headers / "cute" / "atom" / "mma_traits_sm80.hpp").is_file():
        pytest.skip(f"no CuTe headers in {headers}")
    standard = host_build.cuda_include() / "cccl"  # since CUDA 13
    flags = ["-w", "-isystem", str(headers), *(["-isystem", str(standard)] * standard.is_dir())]
    program = host_build.build(
        [host_build.HERE / "samples" / "fragments.cpp"], program=True, flags=flags, optimize="-O0"
    )
    printed = subprocess.run([program], capture_output=True, text=True, check=True).stdout
    result: dict[tuple[str, str], dict[tuple[int, int], tuple[int, int]]] = {}
    for line in printed.splitlines():
        whose, name, *numbers = line.split()
        lane, element, row, column = map(int, numbers)
        result.setdefault((whose, name), {})[lane, element] = row, column
    return result


@pytest.mark.parametrize("name", FRAGMENTS)
def test_fragments_are_cutes(tables: dict, name: str):
    ours, cutes = tables["emulator", name], tables["cute", name]
    assert len(cutes) == len(ours) == len(set(ours.values())) == FRAGMENTS[name]
    for key, position in cutes.items():
        assert ours[key] == position, f"lane {key[0]}, element {key[1]} of {name}"


# ---- Products -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("architecture", [750, 800])
@orders
def test_16_bit_products(dtype: torch.dtype, architecture: int, order: str, seed: int):
    library = host_build.load(
        SAMPLES, defines=[f"DENSENET_FAST_EMULATED_ARCHITECTURE={architecture}"]
    )
    library.set_order(order, seed)
    random = torch.Generator().manual_seed(3)
    a = torch.randn(16, 16, generator=random).to(dtype)
    b = torch.randn(16, 8, generator=random).to(dtype)
    d = torch.randn(16, 8, generator=random)
    expected = d.double() + a.double() @ b.double()
    sample = "multiply_f16" if dtype == torch.float16 else "multiply_bf16"
    if dtype == torch.bfloat16 and architecture == 750:
        text = error_of_product(library, sample, a, b, d)
        assert "mma.bf16: not an instruction of sm_75" in text
        return
    library.call(f"sample_{sample}", pointer(a), pointer(b), pointer(d))
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=1e-5)


def error_of_product(library: Library, sample: str, *tensors: Tensor) -> str:
    with pytest.raises(EmulatorError) as caught:
        library.call(f"sample_{sample}", *map(pointer, tensors))
    return str(caught.value)


def test_every_element_goes_where_it_belongs(library: Library):
    for dtype, sample in [(torch.float16, "f16"), (torch.bfloat16, "bf16")]:
        b = torch.arange(128.0).view(16, 8)
        for row in range(16):
            a, d = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 8)
            a[row, 15 - row] = 1
            library.call(f"sample_multiply_{sample}", pointer(a), pointer(b.to(dtype)), pointer(d))
            assert torch.equal(d[row], b[15 - row])
            assert d.count_nonzero() == b[15 - row].count_nonzero()


def test_special_values(library: Library):
    """Subnormal numbers, infinities and NaNs of float16 count in full."""
    a, b, d = torch.zeros(16, 16).half(), torch.zeros(16, 8).half(), torch.zeros(16, 8)
    smallest = 2.0**-24
    a[0, 0], a[1, 1], a[2, 2], a[3, 3] = smallest, torch.inf, torch.nan, -1023 * smallest
    b[:4, 0] = 1
    b[0, 1] = smallest
    library.call("sample_multiply_f16", pointer(a), pointer(b), pointer(d))
    assert d[0, 0] == smallest and d[0, 1] == smallest**2
    assert d[1, 0] == torch.inf
    assert d[2].isnan().all()  # NaN times zero, too
    assert d[1, 2:].isnan().all()  # infinity times zero
    assert d[3, 0] == -1023 * smallest and d[4:].eq(0).all()


def tf32(x: Tensor, *, rounded: bool) -> Tensor:
    """Ten bits of mantissa: the nearest (ties away from zero), or the others dropped."""
    bits = x.view(torch.int32) + (0x1000 if rounded else 0)
    return (bits & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize("rounded", [True, False])
@orders
def test_tf32_products(library: Library, rounded: bool, order: str, seed: int):
    library.set_order(order, seed)
    random = torch.Generator().manual_seed(4)
    a = torch.randn(16, 8, generator=random)
    b = torch.randn(8, 8, generator=random)
    a[0, 0] = 1 + 2.0**-11  # a tie
    d = torch.randn(16, 8, generator=random)
    expected = d.double() + tf32(a, rounded=rounded).double() @ tf32(b, rounded=rounded).double()
    library.call("sample_multiply_tf32", int(rounded), pointer(a), pointer(b), pointer(d))
    torch.testing.assert_close(d.double(), expected, rtol=0, atol=2e-6)


# ---- ldmatrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("pitch", [16, 80])
@orders
def test_ldmatrix(library: Library, transposed: bool, pitch: int, order: str, seed: int):
    library.set_order(order, seed)
    x = torch.arange(32 * 8, dtype=torch.int16).view(4, 8, 8)
    out = torch.zeros(32, 4, dtype=torch.int32)
    library.call("sample_load_matrices", int(transposed), pointer(x), pointer(out), pitch, 0, 32)
    matrices = x.mT if transposed else x
    # Lane i has, of every matrix, elements 2(i % 4) and 2(i % 4) + 1 of row i / 4.
    expected = matrices.reshape(4, 32, 2).transpose(0, 1)
    assert torch.equal(out.view(torch.int16).view(32, 4, 2), expected)


@pytest.mark.parametrize(("transposed", "name"), [(0, "ldmatrix"), (1, "ldmatrix.trans")])
def test_unwritten_rows_of_ldmatrix(library: Library, transposed: int, name: str):
    x, out = torch.zeros(32, 8, dtype=torch.int16), torch.zeros(128, dtype=torch.int32)
    text = error_of(library, "load_matrices", transposed, pointer(x), pointer(out), 32, 0, 30)
    assert (
        f"block (0, 0, 0), thread 30: {name}: reads shared memory that nobody has written" in text
    )
    assert "at offset 960 (row 6 of matrix 3)" in text


def test_rows_of_ldmatrix_out_of_bounds_or_misaligned(library: Library):
    x, out = torch.zeros(32, 8, dtype=torch.int16), torch.zeros(128, dtype=torch.int32)
    text = error_of(library, "load_matrices", 0, pointer(x), pointer(out), 16, 8, 32)
    assert "thread 0: ldmatrix: shared address not aligned to 16 bytes, at offset 8" in text
    text = error_of(library, "load_matrices", 0, pointer(x), pointer(out), 16, 32, 32)
    assert "thread 30: ldmatrix: shared address outside the block's 512 bytes" in text
