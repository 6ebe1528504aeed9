"""Kernels and PyTorch's operators do the same work, and the page says what limits a kernel."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure
from benchmarks.environment import describe
from benchmarks.kernels import cases, machine
from benchmarks.kernels.machine import Machine
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, Shape, shapes
from benchmarks.networks import NETWORKS, densenet_bc
from benchmarks.suites import Options, kernels, kernels_page

CPU = torch.device("cpu")
KERNELS = (*CONVOLUTIONS, *MEMORY_BOUND)
QUIET = ["kernels", "--no-progress", "--device", "cpu"]
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
    monkeypatch.setattr(kernels, "QUICK_BURST_SECONDS", 0.0)


@pytest.fixture
def threads_set(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The numbers of threads that were asked for; one computes, whatever else the machine does."""
    before, set_threads = torch.get_num_threads(), torch.set_num_threads
    set_threads(1)
    asked = [1]
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(torch, "get_num_threads", lambda: asked[-1])
    yield asked
    set_threads(before)


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


def test_shapes_are_those_of_the_networks() -> None:
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
    assert {shape.buffer for shape in shapes("finish_gradient", "densenet-bc-100")} == {
        216,
        300,
        342,
    }


def test_any_network_has_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
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


@pytest.mark.usefixtures("tiny")
def test_suite_on_small_networks(
    tmp_path: Path, threads_set: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*QUIET, "--networks", "tiny,stem", "--threads", "2", "--rounds", "2"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == 0
    assert threads_set == [1, 2, 1, 2, 2, 2]  # the command line's, then each table's and back
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {f"kernels.{suffix}" for suffix in ("md", "json", "png", "svg")}
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["complete"]
    assert [peaks["threads"] for peaks in record["machine"]] == [1, 2]
    assert all(peaks["flops"] > 0 and peaks["bandwidth"] > 0 for peaks in record["machine"])
    cases_of = [sum(len(shapes(kernel, n)) for n in ("tiny", "stem")) for kernel in KERNELS]
    assert len(record["kernels"]) == 2 * sum(cases_of)
    for entry in record["kernels"]:
        assert [len(times) for times in entry["seconds"].values()] == [2, 2]
    text = (tmp_path / "kernels.md").read_text()
    for heading in ("## 1 thread", "## 2 threads"):
        section = text.partition(heading)[2].partition("\n## ")[0]
        assert "Measured peak:" in section
        assert all(f"| {kernel}, " in section for kernel in KERNELS)
    assert "may exceed 100 %" in text
    assert "16 multiplications where the direct convolution does 36" in text
    printed = capsys.readouterr().out
    assert all(line in printed for line in text.splitlines() if line.startswith("| conv"))


@pytest.mark.usefixtures("tiny", "threads_set")
def test_parts_are_kernels(tmp_path: Path) -> None:
    arguments = [*QUIET, "--networks", "tiny", "--threads", "1", "--rounds", "1"]
    parts = ["--parts", "finish_gradient", "--output", str(tmp_path)]
    assert cli.main([*arguments, *parts]) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert record["settings"]["threads"] == [1]
    assert {entry["kernel"] for entry in record["kernels"]} == {"finish_gradient"}
    text = (tmp_path / "kernels.md").read_text()
    assert "GFLOP/s | of peak" not in text
    assert not (tmp_path / "kernels.png").exists()  # a roofline needs products


@pytest.mark.usefixtures("tiny")
def test_interrupted_suite_keeps_what_it_has(
    tmp_path: Path, threads_set: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    def timed(call: Any, device: torch.device) -> float:
        nonlocal calls
        calls += 1
        if calls == 6:  # PyTorch's call of the third case
            raise KeyboardInterrupt
        return original(call, device)

    original = measure.timed
    monkeypatch.setattr(measure, "timed", timed)
    arguments = [*QUIET, "--networks", "tiny", "--threads", "2", "--rounds", "1"]
    assert cli.main([*arguments, "--output", str(tmp_path)]) == cli.INTERRUPTED
    assert threads_set == [1, 2, 1, 2]
    text = (tmp_path / "kernels.md").read_text()
    assert "the results below are partial" in text
    rows = [line for line in text.splitlines() if line.startswith("| conv1x1_forward")]
    assert [row.count("—") for row in rows] == [0, 0, 2]


def test_a_gpu_has_one_table() -> None:
    settings = kernels.plan(Options(device=torch.device("cuda")))["settings"]
    assert settings["threads"] == [torch.get_num_threads()]


def test_rows_say_what_limits_a_kernel() -> None:
    record = kernels.plan(Options())
    record["settings"]["threads"] = [1]
    record["machine"].append({"threads": 1, "flops": 100e9, "bandwidth": 10e9})
    for kernel, flops, moved, ours in (
        ("conv1x1_forward", 8 * 10**7, 10**6, [2e-3, 1e-3]),
        ("conv3x3_forward", 16 * 10**7, 10**6, [1e-3]),
        ("conv3x3_backward", 4 * 10**7, 10**6, [1e-3]),
        ("channel_statistics", 0, 9 * 10**6, [1e-3]),
    ):
        entry = {"threads": 1, "kernel": kernel, "network": "tiny", "shape": asdict(SMALL)}
        counts = {"label": SMALL.label, "flops": flops, "moved": moved}
        seconds = {"ours": ours, "torch": [3e-3, 4e-3]}
        record["kernels"].append({**entry, **counts, "seconds": seconds})
    record.update(command="", complete=True, environment=describe(CPU))
    text = kernels_page.page(record).markdown()
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if SMALL.label in line
    ]
    label = SMALL.label
    usual, limit = ["3", "3.00×"], "arithmetic"
    assert rows == [
        [f"conv1x1_forward, {label}", "1", "80.0", "80.0 %", "1.0", "10.0 %", *usual, limit],
        [f"conv3x3_forward, {label}", "1", "160.0", "160.0 %", "1.0", "10.0 %", *usual, limit],
        [f"conv3x3_backward, {label}", "1", "40.0", "40.0 %", "1.0", "10.0 %", *usual, "overhead"],
        [f"channel_statistics, {label}", "1", "9.0", "90.0 %", *usual, "memory"],
    ]
    assert "Measured peak: 100.0 GFLOP/s, 10.0 GB/s." in text
    assert kernels_page.figure(record) is not None
