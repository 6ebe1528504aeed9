"""Kernels and PyTorch's operators do the same work, and the page says what limits a kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from made_up import CPU, cells, page, planned

from benchmarks.kernels import cases, machine
from benchmarks.kernels.machine import Machine
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, Shape, shapes
from benchmarks.networks import NETWORKS, densenet_bc
from benchmarks.suites import Options, kernels

KERNELS = (*CONVOLUTIONS, *MEMORY_BOUND)
# Odd pixels, which no pooling and no tile fits, in a buffer whose rows are padded.
SMALL = Shape(3, 7, 2, 12, 8, 1024)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two networks with all kernels, a quick look at the machine, and bursts of one call."""
    stem = replace(
        NETWORKS["densenet121"], block_config=(2, 2), batch_size=1, image_size=32, growth_rate=4
    )
    monkeypatch.setitem(NETWORKS, "tiny", densenet_bc(16, 4, batch_size=2, image_size=8))
    monkeypatch.setitem(NETWORKS, "stem", stem)
    monkeypatch.setattr(machine, "MATMUL_SIZES", (8, 16))
    monkeypatch.setattr(machine, "COPY_BYTES", 4096)
    monkeypatch.setattr(kernels, "BURST_SECONDS", (1e-6, 1e-6))


# ---- What is timed


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("kernel", KERNELS)
def test_both_calls_do_the_same_work(kernel: str, dims: int) -> None:
    shape = replace(SMALL, dims=dims, outputs=8 if kernel in CONVOLUTIONS else 0)
    case = cases.make(kernel, shape, 1, CPU)
    case.ours()
    compared = 0
    for ours, usual in zip(case.results, case.torch(), strict=True):
        if ours is not None:
            torch.testing.assert_close(ours, usual, rtol=1e-4, atol=1e-4)
            compared += 1
    assert compared >= (3 if kernel.endswith("backward") else 1)


def test_flops_and_bytes_by_hand() -> None:
    rows = 3 * 7 * 7

    def counted(kernel: str) -> tuple[int, int]:
        case = cases.make(kernel, SMALL, 0, CPU)
        return case.flops, case.moved // 4  # elements

    weight = 12 * 8
    vectors = 2 * 12 + 2 * 8  # the norm's, and the output's statistics
    assert counted("conv1x1_forward") == (2 * rows * weight, rows * 20 + weight + vectors)
    assert counted("conv3x3_forward") == (18 * rows * weight, rows * 20 + 9 * weight + vectors)
    backward = 2 * rows * 8 + 3 * rows * 12 + 2 * weight + 3 * 8 + 6 * 12
    assert counted("conv1x1_backward") == (4 * rows * weight, backward)
    backward = rows * 8 + 2 * rows * 12 + 2 * 9 * weight + 6 * 12
    assert counted("conv3x3_backward") == (36 * rows * weight, backward)
    pooled = 3 * 3 * 3
    forward = rows * 12 + pooled * 8 + weight + 2 * 12
    assert counted("transition_forward") == (2 * pooled * weight, forward)
    assert counted("finish_gradient") == (0, 3 * rows * 12 + 3 * 12)
    pixels = 3 * 4 * 4 * 12
    forward = cases.make("norm_relu_maxpool_forward", SMALL, 0, CPU)
    assert forward.moved == 4 * (rows * 12 + pixels + 2 * 12) + pixels  # indices are bytes


def test_shapes_are_those_of_the_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    def labels(kernel: str, network: str) -> list[str]:
        return [shape.label for shape in shapes(kernel, network)]

    assert labels("conv1x1_forward", "densenet121") == [
        "8×56×56×128 → 128",
        "8×28×28×320 → 128",
        "8×14×14×640 → 128",
        "8×7×7×768 → 128",
    ]
    assert labels("conv3x3_backward", "densenet-bc-100") == [
        "64×32×32×48 → 12",
        "64×16×16×48 → 12",
        "64×8×8×48 → 12",
    ]
    assert labels("transition_forward", "densenet-bc-100") == [
        "64×32×32×216 → 108",
        "64×16×16×300 → 150",
    ]
    assert labels("norm_relu_maxpool_forward", "densenet121") == ["8×112×112×64"]
    assert not labels("norm_relu_maxpool_forward", "densenet-bc-100")
    assert labels("conv3x3_forward", "densenet121-3d")[0] == "2×16×16×16×128 → 32"
    assert labels("norm_relu_maxpool_forward", "densenet121-1d") == ["32×1024×64"]
    assert labels("channel_statistics", "densenet121")[:2] == ["8×112×112×64", "8×56×56×64"]
    buffers = {shape.buffer for shape in shapes("finish_gradient", "densenet-bc-100")}
    assert buffers == {216, 300, 342}
    monkeypatch.setitem(NETWORKS, "other", densenet_bc(22, 4, batch_size=2))
    assert [shape.channels for shape in shapes("conv1x1_forward", "other")] == [12, 14, 15]


# ---- What it is held against


def test_peaks_are_the_fastest_round_of_the_fastest_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([4.0, 2.0, 1.0, 8.0, 16.0, 32.0])
    monkeypatch.setattr(machine, "timed", lambda call, device: (call(), next(seconds))[1])
    assert machine.matmul_peak((4, 8), CPU, rounds=3) == 2 * 4**3  # 8: 2 * 8**3 / 8, as fast
    seconds = iter([4.0, 2.0])
    assert machine.copy_bandwidth(4096, CPU, rounds=2) == 4096


@pytest.mark.parametrize(
    ("seconds", "flops", "moved", "limit"),
    [
        (1.0, 60, 5, "arithmetic"),
        (1.0, 60, 7, "memory"),
        (1.0, 49, 4, "overhead"),
        (1.0, 50, 0, "arithmetic"),
        (2.0, 60, 7, "overhead"),
        (1.0, 140, 13, "arithmetic"),
    ],
)
def test_limit(seconds: float, flops: int, moved: int, limit: str) -> None:
    assert Machine(100.0, 10.0).limit(seconds, flops, moved) == limit


# ---- The suite


@pytest.mark.usefixtures("tiny", "threads")
@pytest.mark.parametrize("threads", [1], indirect=True)
def test_suite_on_small_networks(run: Any) -> None:
    chosen = ["--networks", "tiny,stem", "--threads", "2", "--rounds", "2"]
    record, text = run("kernels", *chosen)
    assert torch.get_num_threads() == 2
    assert [peaks["threads"] for peaks in record["machine"]] == [1, 2]
    assert all(peaks["flops"] > 0 and peaks["bandwidth"] > 0 for peaks in record["machine"])
    cases_of = [sum(len(shapes(kernel, n)) for n in ("tiny", "stem")) for kernel in KERNELS]
    assert len(record["rows"]) == 2 * sum(cases_of)
    for row in record["rows"]:
        assert [len(times) for times in row["seconds"].values()] == [2, 2]
    for threads in (1, 2):
        assert f"Measured peak, threads: {threads}: " in text
        for part in ("Products", "Bound by memory"):
            assert f"## {part}, threads: {threads}" in text
    assert all(text.count(f"| {kernel}, ") >= 2 for kernel in KERNELS)


def test_a_gpu_has_one_table() -> None:
    settings = kernels.SUITE.plan(Options(device=torch.device("cuda")))["settings"]
    assert settings["threads"] == [torch.get_num_threads()]


def test_rows_say_what_limits_a_kernel() -> None:
    record = planned("kernels")
    record["machine"] = [{"threads": 1, "flops": 100e9, "bandwidth": 10e9}]
    record["rows"] = [
        {
            "threads": 1,
            "kernel": kernel,
            "label": "small",
            "flops": flops,
            "moved": moved,
            "seconds": {"ours": ours, "torch": [3e-3, 4e-3]},
        }
        for kernel, flops, moved, ours in (
            ("conv1x1_forward", 8 * 10**7, 10**6, [2e-3, 1e-3]),
            ("conv3x3_forward", 16 * 10**7, 10**6, [1e-3]),
            ("conv3x3_backward", 4 * 10**7, 10**6, [1e-3]),
            ("channel_statistics", 0, 9 * 10**6, [4e-3]),
        )
    ]
    text = page(record)
    usual = ["1", "3.00×", "3"]
    assert cells(text, ", small") == [
        ["conv1x1_forward, small", *usual, "80", "80.0 %", "1", "10.0 %", "arithmetic"],
        ["conv3x3_forward, small", *usual, "160", "160.0 %", "1", "10.0 %", "arithmetic"],
        ["conv3x3_backward, small", *usual, "40", "40.0 %", "1", "10.0 %", "overhead"],
        ["channel_statistics, small", "4", "0.75×", "3", "2.25", "22.5 %", "overhead"],
    ]
    assert "Measured peak, threads: 1: 100.0 GFLOP/s, 10.0 GB/s." in text
    assert "not first in 1 of 4 comparisons" in text
