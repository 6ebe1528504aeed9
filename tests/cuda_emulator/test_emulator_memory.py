"""What the emulator knows of memory: asynchronous copies, bounds, alignment, races."""

from __future__ import annotations

from ctypes import c_int64

import host_build
import pytest
import torch
from emulated_library import EmulatorError, Library
from test_emulator import ORDERS, SAMPLES, error_of, orders, pointer
from torch import Tensor

pytestmark = pytest.mark.slow  # a compiler's seconds

FAULTS = {"no wait": 1, "waits for too few": 2, "no barrier": 3, "leaves early": 4}


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "checked"])
def library(request: pytest.FixtureRequest) -> Library:
    return host_build.load(SAMPLES, check_accesses=request.param)


@pytest.fixture(scope="module")
def checked() -> Library:
    return host_build.load(SAMPLES, check_accesses=True)


def copy_through_ring(library: Library, fault: int) -> bool:
    """Whether what arrives is right."""
    source = torch.randn(5, 32, 4)
    result = torch.zeros_like(source)
    arguments = pointer(source), pointer(result), 32, 5
    with library.buffers(source=source, result=result):
        library.call("sample_copy_through_ring", fault, *arguments)
    return torch.equal(source, result)


def outcome(library: Library, fault: str) -> str:
    """What comes of a fault: a right or wrong result, or the core of the report."""
    try:
        return "right" if copy_through_ring(library, FAULTS[fault]) else "wrong"
    except EmulatorError as error:
        reports = ("while an asynchronous copy", "no barrier", "nobody has")
        return next((r for r in reports if r in str(error)), str(error))


# ---- Asynchronous copies ------------------------------------------------------------------------


@orders
def test_copies_arrive_at_the_wait(library: Library, order: str, seed: int):
    library.set_order(order, seed)
    assert copy_through_ring(library, 0)


@pytest.mark.parametrize("fault", ["no wait", "waits for too few"])
@orders
def test_a_missing_wait_shows_in_every_order(library: Library, fault: str, order: str, seed: int):
    library.set_order(order, seed)
    assert outcome(library, fault) in ("wrong", "while an asynchronous copy")


def test_a_missing_barrier_after_the_wait_shows_in_some_order(library: Library):
    outcomes = set()
    for order, seed in ORDERS:
        library.set_order(order, seed)
        outcomes.add(outcome(library, "no barrier"))
    assert outcomes - {"right"}
    assert outcomes <= {"right", "wrong", "while an asynchronous copy", "no barrier", "nobody has"}


def test_copies_under_way_at_the_end_are_reported(library: Library):
    library.set_order("forward")
    with pytest.raises(EmulatorError, match=r"block \(0, 0, 0\), thread 0: exited with async"):
        copy_through_ring(library, FAULTS["leaves early"])


@pytest.mark.parametrize("size", [4, 16])
def test_what_is_not_valid_becomes_zero(library: Library, size: int):
    source = torch.arange(1, 17, dtype=torch.uint8)
    for valid in range(size + 1):
        to = torch.full((size,), 255, dtype=torch.uint8)
        with library.buffers(source=source[:valid], to=to):
            library.call("sample_copy_bytes", pointer(source), pointer(to), size, valid, 16)
        assert to.tolist() == [*range(1, valid + 1), *[0] * (size - valid)]


# ---- Bounds and alignment -----------------------------------------------------------------------


def copy_error(library: Library, source: Tensor, size: int, valid: int, offset: int) -> str:
    to = torch.zeros(16, dtype=torch.uint8)
    return error_of(library, "copy_bytes", pointer(source), pointer(to), size, valid, offset)


def test_copies_out_of_bounds_or_misaligned_are_reported(library: Library):
    source = torch.zeros(64, dtype=torch.uint8)
    report = r"kernel copy_bytes, block \(0, 0, 0\), thread 0: cp.async: "
    for arguments, expected in [
        ((source, 16, 16, 64), "shared address outside the block's 64 bytes, at offset 64"),
        ((source, 16, 16, -16), "shared address outside the block's 64 bytes, at offset -16"),
        ((source, 16, 16, 8), "shared address not aligned to 16 bytes, at offset 8"),
        ((source[4:], 16, 16, 0), "global address not aligned to 16 bytes"),
        ((source[2:], 4, 0, 0), "global address not aligned to 4 bytes"),
        ((source, 16, 17, 0), "17 of 16 bytes asked for"),
    ]:
        text = copy_error(library, *arguments)
        assert text == report.replace("\\", "") + expected


def test_copies_from_outside_every_buffer_are_reported(library: Library):
    source = torch.zeros(64, dtype=torch.uint8)
    with library.buffers(first=source[:16], second=source[16:40]):
        text = copy_error(library, source[32:], 16, 9, 0)
        assert "9 bytes at offset 16 of second, which has 24" in text


def test_buffers_count_from_their_first_to_their_last_element(library: Library):
    to = torch.zeros(16, dtype=torch.uint8)
    memory = torch.zeros(64, dtype=torch.uint8)
    with library.buffers(to=to, slice=memory.view(4, 16)[:, 4:8]):  # bytes 4 to 55
        library.call("sample_copy_bytes", pointer(memory[16:]), pointer(to), 16, 16, 0)
        assert "at offset 44 of slice" in copy_error(library, memory[48:], 16, 16, 0)


# ---- Every access -------------------------------------------------------------------------------


@orders
def test_correct_kernels_pass_the_checks(checked: Library, order: str, seed: int):
    checked.set_order(order, seed)
    x, total = torch.ones(2, 256), torch.zeros(2)
    with checked.buffers(x=x, total=total):
        checked.call("sample_tree_sum", 1, pointer(x), pointer(total), 2, 256)
    assert total.tolist() == [256, 256]
    ring = torch.arange(64, dtype=torch.int32)
    with checked.buffers(ring=ring):
        checked.call("sample_rotate", 2, pointer(ring), 64, 3)
        checked.call("sample_neighbours_of_a_warp", 1, pointer(ring))
        checked.call("sample_reads_constants", pointer(ring))
    values, out = torch.arange(32 * 8, dtype=torch.int16), torch.zeros(128, dtype=torch.int32)
    with checked.buffers(values=values, out=out):
        for transposed in (0, 1):
            checked.call(
                "sample_load_matrices", transposed, pointer(values), pointer(out), 16, 0, 32
            )


@orders
def test_races_are_seen_in_every_order(checked: Library, order: str, seed: int):
    checked.set_order(order, seed)
    x, total = torch.arange(256.0), torch.zeros(1)
    text = error_of(checked, "tree_sum", 0, pointer(x), pointer(total), 1, 256)
    assert "no barrier in between" in text or "nobody has written" in text
    ring = torch.arange(64, dtype=torch.int32)
    text = error_of(checked, "rotate", 1, pointer(ring), 64, 3)
    assert ", block (0, 0, 0), thread " in text
    assert " that thread " in text and "with no barrier in between" in text


@orders
def test_a_vote_is_no_barrier_for_memory(checked: Library, order: str, seed: int):
    checked.set_order(order, seed)
    out = torch.zeros(64, dtype=torch.int32)
    text = error_of(checked, "neighbours_of_a_warp", 0, pointer(out))
    assert "that thread" in text and "has written, with no barrier in between" in text


def test_reads_of_unwritten_shared_memory(checked: Library):
    out = torch.zeros(32, dtype=torch.int32)
    text = error_of(checked, "reads_unwritten", pointer(out))
    assert text.endswith("thread 2: reads shared memory at offset 12 that nobody has written")


@pytest.mark.parametrize("offset", [64, 61, -4, 4096, -4096])
def test_plain_accesses_outside_shared_memory(checked: Library, offset: int):
    text = error_of(checked, "writes_shared", offset)
    assert (
        "thread 2: writes 4 bytes outside the block's 64 bytes of shared memory, "
        f"at offset {offset}"
    ) in text


@pytest.mark.parametrize("at", [40, -1, 1 << 40])
def test_plain_accesses_outside_every_buffer(checked: Library, at: int):
    out = torch.zeros(40, dtype=torch.int32)
    with checked.buffers(out=out):
        checked.call("sample_writes_global", pointer(out), c_int64(39))
        text = error_of(checked, "writes_global", pointer(out), c_int64(at))
    assert (
        f"thread 2: write: global address outside every buffer: 4 bytes at offset {4 * at} of out"
        in text
    )
