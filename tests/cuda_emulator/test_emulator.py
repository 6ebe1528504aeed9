"""The emulator's execution model: orders, barriers, warps, errors and their reports."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from ctypes import c_int64

import host_build
import pytest
import torch
from emulated_library import Counts, EmulatorError, Library
from torch import Tensor

pytestmark = pytest.mark.slow  # a compiler's seconds

SAMPLES = [host_build.HERE / "samples" / name for name in ("samples.cu", "memory.cu")]
ORDERS = [("forward", 0), ("reverse", 0), *(("random", seed) for seed in range(6))]
orders = pytest.mark.parametrize(("order", "seed"), ORDERS)


@pytest.fixture(scope="module")
def built() -> Library:
    return host_build.load(SAMPLES)


@pytest.fixture
def library(built: Library) -> Iterator[Library]:
    built.set_order("forward")
    built.set_device()
    built.set_limits()
    yield built
    # Whatever went wrong, the next kernel runs.
    x, total = torch.arange(64.0), torch.zeros(1)
    built.call("sample_tree_sum", 1, pointer(x), pointer(total), 1, 64)
    assert total.item() == 64 * 63 / 2


class Pointer(ctypes.c_void_p):
    """To the memory of a tensor, which it keeps alive."""

    tensor: Tensor


def pointer(tensor: Tensor) -> Pointer:
    result = Pointer(tensor.data_ptr())
    result.tensor = tensor
    return result


def error_of(library: Library, sample: str, *arguments: object) -> str:
    with pytest.raises(EmulatorError) as caught:
        library.call(f"sample_{sample}", *arguments)
    text = str(caught.value)
    assert text.startswith(f"kernel {sample}")
    assert library.last_error == text
    return text


# ---- Orders -------------------------------------------------------------------------------------


@orders
def test_correct_kernels_give_the_same_bits_in_every_order(library: Library, order: str, seed: int):
    x = torch.randn(7 * 256, generator=torch.Generator().manual_seed(1))
    expected, total = torch.zeros(7), torch.full((7,), torch.nan)
    library.call("sample_tree_sum", 1, pointer(x), pointer(expected), 7, 256)
    torch.testing.assert_close(expected, x.view(7, 256).sum(1), rtol=0, atol=1e-4)
    library.set_order(order, seed)
    library.call("sample_tree_sum", 1, pointer(x), pointer(total), 7, 256)
    assert torch.equal(total, expected)

    ring = torch.arange(96, dtype=torch.int32)
    library.call("sample_rotate", 2, pointer(ring), 96, 10)
    assert torch.equal(ring, torch.arange(96, dtype=torch.int32).roll(-10))


@pytest.mark.parametrize("sample", ["tree_sum", "rotate"])
def test_a_missing_barrier_shows_in_some_order(library: Library, sample: str):
    results = []
    for order, seed in ORDERS:
        library.set_order(order, seed)
        if sample == "tree_sum":
            x, result = torch.arange(256.0), torch.zeros(1)
            library.call("sample_tree_sum", 0, pointer(x), pointer(result), 1, 256)
            results.append(result.item() == 256 * 255 / 2)
        else:  # the second of two barriers: others may not have read yet what is overwritten
            ring = torch.arange(96, dtype=torch.int32)
            library.call("sample_rotate", 1, pointer(ring), 96, 10)
            results.append(torch.equal(ring, torch.arange(96, dtype=torch.int32).roll(-10)))
    assert not all(results)


def test_random_orders_repeat_and_differ(library: Library):
    def tickets(seed: int) -> list[int]:
        counter, taken = torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
        library.set_order("random", seed)
        library.call("sample_takes_tickets", pointer(counter), pointer(taken))
        assert taken.sort().values.tolist() == list(range(256))
        return taken.tolist()

    assert tickets(1) == tickets(1)
    assert len({tuple(tickets(seed)) for seed in range(8)}) == 8


def test_forward_and_reverse_run_threads_and_blocks_in_order(library: Library):
    for order in ("forward", "reverse"):
        counter, taken = torch.zeros(1, dtype=torch.int32), torch.zeros(256, dtype=torch.int32)
        library.set_order(order)
        library.call("sample_takes_tickets", pointer(counter), pointer(taken))
        expected = torch.arange(256, dtype=torch.int32)
        assert torch.equal(taken, expected if order == "forward" else expected.flip(0))


def test_unknown_orders_are_refused(library: Library):
    with pytest.raises(EmulatorError, match=r"forward.*reverse.*random.*sideways"):
        library.set_order("sideways")


# ---- Launches -----------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(3, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("block", [(1, 1, 1), (33, 1, 1), (4, 3, 5), (1024, 1, 1)])
def test_indices(library: Library, grid: tuple[int, ...], block: tuple[int, ...]):
    blocks, threads = grid[0] * grid[1] * grid[2], block[0] * block[1] * block[2]
    out = torch.zeros(blocks, threads, dtype=torch.int32)
    library.call("sample_geometry", pointer(out), *grid, *block)
    expected = torch.arange(blocks)[:, None] * 1000 + torch.arange(threads)
    assert torch.equal(out.long(), expected)


def test_launches_that_no_device_takes_are_refused(library: Library):
    out = torch.zeros(64, dtype=torch.int32)
    for grid, block in [
        ((0, 1, 1), (32, 1, 1)),
        ((1, 70000, 1), (1, 1, 1)),
        ((1, 1, 1), (33, 32, 1)),
    ]:
        with pytest.raises(EmulatorError, match="kernel geometry: invalid launch geometry"):
            library.call("sample_geometry", pointer(out), *grid, *block)
    library.set_device(7, 5, 64 << 10, 64 << 10, 40)
    library.call("sample_geometry_with_shared", pointer(out), c_int64(64 << 10))
    with pytest.raises(EmulatorError, match=r"65537 bytes of shared .* device has 65536"):
        library.call("sample_geometry_with_shared", pointer(out), c_int64((64 << 10) + 1))


def test_counts(library: Library):
    library.reset_counts()
    out = torch.zeros(64, dtype=torch.int32)
    library.call("sample_many_arrivals", pointer(out), 64, 3)
    library.call("sample_geometry", pointer(out), 2, 1, 1, 32, 1, 1)
    assert library.counts == Counts(launches=2, blocks=3, arrivals=64 * 3 * 5)


def test_a_million_arrivals_take_no_second(library: Library):
    out = torch.zeros(256, dtype=torch.int32)
    before = time.process_time()
    library.call("sample_many_arrivals", pointer(out), 256, 782)
    assert time.process_time() - before < 1  # 0.07 s where this was written


# ---- Barriers -----------------------------------------------------------------------------------


def test_votes_of_the_block(library: Library):
    out = torch.zeros(48, dtype=torch.int32)
    library.call("sample_votes", pointer(out))
    assert out.tolist() == [24 * 4 + 2] * 48


@orders
def test_a_barrier_that_some_never_reach(library: Library, order: str, seed: int):
    library.set_order(order, seed)
    text = error_of(library, "some_skip_the_barrier", 40)
    assert ", block (" in text
    assert "threads diverged at a collective" in text
    assert "63 of 64 threads (0, ...) at __syncthreads (samples.cu:" in text
    assert "1 of 64 threads (40) exited" in text


@orders
def test_barriers_in_different_places_do_not_meet(library: Library, order: str, seed: int):
    library.set_order(order, seed)
    text = error_of(library, "barriers_in_both_branches")
    assert "thread" in text
    assert "reached __syncthreads" in text and "others wait at __syncthreads" in text


def test_endless_kernels_end(library: Library):
    library.set_limits(arrivals_per_block=1000)
    text = error_of(library, "barrier_after_barrier")
    assert "more than 1000 arrivals" in text

    library.set_limits(seconds_without_arrival=0.2)
    flag = torch.zeros(1, dtype=torch.int32)
    text = error_of(library, "one_thread_spins", pointer(flag))
    assert "thread 33: runs on without end" in text


def test_after_an_error_the_stacks_of_all_threads_unwind(library: Library):
    destroyed = torch.zeros(1, dtype=torch.int32)
    assert "thread 7: __trap" in error_of(library, "one_thread_fails", pointer(destroyed))
    assert destroyed.item() == 8  # of the 64 those that had begun


def test_floating_point_atomics_are_refused(library: Library):
    x = torch.zeros(1)
    assert "fixed order" in error_of(library, "adds_floats", pointer(x))


# ---- Warps --------------------------------------------------------------------------------------


@orders
@pytest.mark.parametrize("threads", [32, 96])
def test_shuffles_and_votes(library: Library, order: str, seed: int, threads: int):
    library.set_order(order, seed)
    out = torch.zeros(threads, 8, dtype=torch.int32)
    library.call("sample_shuffles", pointer(out), threads)
    ballot = sum(1 << lane for lane in range(0, 32, 3))
    for thread, row in enumerate(out.tolist()):
        lane = thread % 32
        assert row == [
            5,
            lane ^ 3,
            lane - 2 if lane >= 2 else lane,
            lane + 2 if lane < 30 else lane,
            lane // 8 * 8 + 1,
            ballot,
            3,
            (lane + 4 if lane < 4 else lane) if lane < 8 else lane ^ 1,
        ]


@orders
def test_divergence_in_a_warp(library: Library, order: str, seed: int):
    library.set_order(order, seed)
    text = error_of(library, "one_lane_skips_the_shuffle")
    assert "62 of 64 threads (0, ...) at __shfl_xor_sync" in text
    assert "2 of 64 threads (5, ...) exited" in text

    text = error_of(library, "lanes_at_different_collectives")
    assert "__syncwarp" in text and "__ballot_sync" in text and "others of the warp wait" in text


def test_masks(library: Library):
    text = error_of(library, "not_in_its_own_mask")
    assert "thread 31: __syncwarp" in text and "not in its own mask" in text
    text = error_of(library, "more_lanes_than_threads")
    assert "thread 32: __syncwarp" in text and "block of 40 threads does not have" in text
    text = error_of(library, "reads_from_outside_the_mask")
    assert "__shfl_sync" in text and "reads from lane 6, which does not take part" in text
