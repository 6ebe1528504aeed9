"""Memory and time are measured as `benchmarks.measure` and `benchmarks.memory` say."""

from __future__ import annotations

import mmap
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from made_up import CPU, MIB, PROC
from torch import nn

from benchmarks import children, measure, memory
from benchmarks.networks import densenet_bc

TINY = densenet_bc(10, 4, batch_size=2, image_size=16)


@PROC
def test_peak_memory_sees_an_allocation_that_is_gone_at_the_end() -> None:
    def allocate_and_free() -> None:
        # Not by malloc, which may keep it: whether it does depends on what the heap has seen.
        with mmap.mmap(-1, 64 * MIB) as memory:
            for page in range(0, 64 * MIB, mmap.PAGESIZE):
                memory[page] = 1

    sample = measure.sample_memory(allocate_and_free, CPU)
    assert sample.peak_above_rest == pytest.approx(64 * MIB, rel=0.05)
    assert abs(sample.after - sample.before) < 4 * MIB


@PROC
def test_memory_after_a_call_contains_what_it_returned() -> None:
    sample = measure.sample_memory(lambda: torch.ones(48 * MIB // 4), CPU)
    assert sample.after - sample.before == pytest.approx(48 * MIB, rel=0.05)


@PROC
def test_peak_memory_does_not_remember_what_was_before_the_reset() -> None:
    torch.ones(256 * MIB // 4)
    assert measure.sample_memory(lambda: None, CPU).peak_above_rest < 4 * MIB


def test_a_peak_that_cannot_be_reset_is_an_error_that_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(measure, "CLEAR_REFS", tmp_path / "missing" / "clear_refs")
    with pytest.raises(measure.MeasurementError, match="peak memory on the CPU is read from"):
        measure.reset_peak()


def test_saved_bytes_count_each_storage_of_the_graph_once_and_no_parameters() -> None:
    model, inputs = nn.Linear(64, 32), torch.randn(16, 64)

    def forward() -> torch.Tensor:
        model(inputs).exp()  # its graph dies here
        # exp saves its result and sin its input: the same storage.
        return model(inputs).exp().sin()

    assert measure.saved_for_backward(model, forward, inputs) == 16 * 32 * 4


def test_interleaved_calls_take_turns() -> None:
    order: list[str] = []
    times: dict[str, list[float]] = {}
    calls = {"a": lambda: order.append("a"), "b": lambda: order.append("b")}
    measure.interleave(calls, 2, CPU, times=times)
    assert order == ["a", "b"] * 2
    assert {name: len(values) for name, values in times.items()} == {"a": 2, "b": 2}


@pytest.mark.cuda
def test_cuda_calls_are_timed_by_the_device() -> None:
    device, cycles = torch.device("cuda"), 10**8  # of a clock below 10 GHz
    assert 0.01 < measure.timed(lambda: torch.cuda._sleep(cycles), device) < 1


def test_cudnn_tries_algorithms_on_cuda_devices_only(monkeypatch: pytest.MonkeyPatch) -> None:
    for before in (False, True):
        monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
        with measure.tuned_libraries(CPU):
            assert torch.backends.cudnn.benchmark is before
        with suppress(KeyError), measure.tuned_libraries(torch.device("cuda")):
            assert torch.backends.cudnn.benchmark is True
            raise KeyError
        assert torch.backends.cudnn.benchmark is before


@pytest.mark.slow
@PROC
def test_child_measures_a_step_in_proportion_to_the_batch_and_under_autocast() -> None:
    one = replace(TINY, image_size=32, batch_size=32)
    two = replace(one, batch_size=64)
    small, large, half = (
        memory.measure_in_child(memory.MemoryCase(spec, "naive", threads=1, amp=amp))
        for spec, amp in ((one, "none"), (two, "none"), (one, "bfloat16"))
    )
    assert large.saved_for_backward == pytest.approx(2 * small.saved_for_backward, rel=0.01)
    assert 0.45 < half.saved_for_backward / small.saved_for_backward < 0.6
    assert small.peak_gradients_allocated > 0.95 * small.saved_for_backward
    assert small.resident_after_forward == pytest.approx(small.saved_for_backward, rel=0.2)
    growth = large.peak_gradients_allocated - small.peak_gradients_allocated
    assert 0.9 < growth / small.saved_for_backward < 1.5


@pytest.mark.parametrize(
    ("end", "message"),
    [
        ("raise KeyError('no-such-peer')", "exit status 1: KeyError: 'no-such-peer'"),
        ("raise MemoryError", "does not fit: MemoryError"),
        ("import os; os.kill(os.getpid(), 9)", "does not fit: the process was killed"),
        ("import time; time.sleep(60)", "no result within 2 s"),
    ],
)
def test_failing_child_says_why(end: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "BOOTSTRAP", end)
    with pytest.raises(measure.MeasurementError, match=f"^{message}"):
        memory.measure_in_child(memory.MemoryCase(TINY, "naive", threads=1), timeout=2.0)
