"""What the predictions count is what the networks do, and a prediction says that it is one."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("torchvision")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import cli, measure, memory, peers
from benchmarks.networks import MAIN_NETWORKS, NETWORKS, NetworkSpec, densenet_bc
from benchmarks.prediction import fused, memory_plan, shapes, usual
from benchmarks.prediction.devices import DEVICES
from benchmarks.prediction.shapes import FORMATS, Block, Op
from benchmarks.suites import predict
from densenet_fast import operators

CPU = torch.device("cpu")
CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BFLOAT16, FLOAT32 = FORMATS["bfloat16"], FORMATS["float32"]
MODES = ("none", "bottleneck", "block")
MAIN = [NETWORKS[name] for name in MAIN_NETWORKS]
SMS = 108  # multiprocessors
SMALL = densenet_bc(22, 4, batch_size=3, image_size=16)
SMALL_IMAGENET = replace(
    NETWORKS["densenet121"], block_config=(3, 2, 2), batch_size=2, image_size=48, num_classes=10
)
# Rows of its first block are a multiple of 4,096 bytes, which the buffer pads.
PADDED = replace(densenet_bc(16, 12, batch_size=2, image_size=8), num_init_features=1000)


def moved(step: list[Op]) -> int:
    return sum(op.moved for op in step)


def flops(step: list[Op], name: str = "") -> int:
    return sum(op.flops for op in step if op.name.startswith(name))


# ---- One operation


def test_conv1x1_forward_by_hand() -> None:
    op = fused.conv1x1_forward(256, 64, 128, BFLOAT16)
    partial = 2 * 2 * 128 * 4  # mean and M2, two tiles
    packed = 64 * 128 * 2
    assert op.read == 256 * 64 * 2 + 64 * 128 * 4 + packed + partial
    assert op.written == 256 * 128 * 2 + packed + partial
    assert op.flops == 2 * 256 * 64 * 128
    assert op.launches == 2  # product, statistics
    again = fused.conv1x1_forward(256, 64, 128, BFLOAT16, again=True)
    assert (op.moved - again.moved, again.launches) == (2 * partial, 1)


def test_conv3x3_by_hand() -> None:
    block = Block(4, 8, 2, 24, 1, 12, 48, None)
    m, weights = 256, 9 * 48 * 12
    assert fused.tiles_3x3(block) == 2
    dgrad, wgrad = fused.conv3x3_backward(block, FLOAT32, SMS)
    packed = 9 * 48 * 16 * 4  # 12 channels padded to 16
    partial = 2 * 2 * 48 * 4
    assert dgrad.read == m * (12 + 48) * 4 + weights * 4 + packed + partial
    assert dgrad.written == m * 48 * 4 + packed + partial
    splits = 8 * weights * 4  # quarters of the two tiles
    assert wgrad.read == m * (12 + 48) * 4 + splits
    assert wgrad.written == splits + weights * 4
    assert dgrad.flops == wgrad.flops == 2 * m * weights


@pytest.mark.parametrize(("outputs", "sweeps"), [(48, 1), (128, 1), (129, 2), (256, 2)])
def test_features_are_read_once_for_each_tile_of_columns(outputs: int, sweeps: int) -> None:
    rows, channels = 10_000, 512
    features = rows * channels * 2
    op = fused.conv1x1_forward(rows, channels, outputs, BFLOAT16, again=True)
    weight = outputs * channels * 4 + fused.packed(outputs, channels, 1, BFLOAT16)
    assert op.read - weight == sweeps * features


def test_usual_layer_by_hand() -> None:
    block = Block(1, 4, 2, 32, 1, 8, 16, None)
    m, c, b, k, e = 16, 32, 16, 8, 4
    forward = list(usual.layer_forward(block, 0, FLOAT32))
    # cat, statistics, normalisation, ReLU, convolution; twice but for cat
    features = (2 + 1 + 2 + 2 + 1) * c + (1 + 1 + 2 + 2 + 1) * b + k
    assert moved(forward) == (m * features + b * c + 9 * b * k) * e
    backward = list(usual.layer_backward(block, 0, FLOAT32, efficient=False))
    # ReLU 3, norm 2 and 3, both products of each convolution, accumulation 3
    features = (8 + 2 + 3) * c + (8 + 2 + 2) * b + 2 * k
    assert moved(backward) == (m * features + 2 * b * c + 2 * 9 * b * k) * e
    again = list(usual.layer_backward(block, 0, FLOAT32, efficient=True))
    assert moved(again) - moved(backward) == m * 7 * c * e


def test_roofline_is_the_slower_of_memory_and_arithmetic() -> None:
    device = DEVICES[0]
    slow_memory = Op("", "forward", 2 * 10**9, 39 * 10**6, 1)
    slow_product = Op("", "forward", 1, 1, 312 * 10**9)
    assert predict.roofline([slow_memory], BFLOAT16, device) == pytest.approx(1e-3)
    assert predict.roofline([slow_product], BFLOAT16, device) == pytest.approx(1e-3)
    both = predict.roofline([slow_memory, slow_product], BFLOAT16, device)
    assert both == pytest.approx(2e-3)
    assert predict.roofline([slow_product], FLOAT32, device) == pytest.approx(2e-3)


def test_only_our_products_get_the_rate_of_mma_sync() -> None:
    h100 = next(device for device in DEVICES if device.name.startswith("H100"))
    assert h100.rate("half", ours=True) == pytest.approx(0.629 * h100.rate("half", ours=False))
    assert all(d.sources and d.tf32_rate * 2 == d.half_rate for d in DEVICES)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("tiles.h", "kUnitRows", fused.TILE_ROWS),
        ("tiles.h", "kLeastSteps", fused.LEAST_STEPS),
        ("pointwise.cu", "kStatisticsRows", fused.REDUCED_ROWS),
        ("pooling.cu", "kUnpoolRows", fused.REDUCED_ROWS),
        ("reductions.cuh", "kTableSize", fused.TABLE_SIZE),
    ],
)
def test_numbers_of_the_cuda_sources(file: str, name: str, value: int) -> None:
    assert re.search(rf"\b{name} = {value};", (CUDA_SOURCES / file).read_text())


# ---- Whole networks


@pytest.mark.parametrize("spec", MAIN, ids=lambda spec: spec.name)
def test_flops_are_pytorchs_own(spec: NetworkSpec) -> None:
    with torch.device("meta"):
        model = peers.build_torchvision(spec, memory_efficient=False)
        images = torch.empty(spec.input_shape)
    with FlopCounterMode(display=False) as counter:
        output = model(images)
        forward = counter.get_total_flops()
        output.sum().backward()
    step = usual.usual_step(spec, FLOAT32)
    assert sum(op.flops for op in step if op.phase == "forward") == forward
    assert flops(step) == counter.get_total_flops()
    assert flops(usual.usual_step(spec, FLOAT32, efficient=True)) == flops(step)
    assert shapes.parameters(spec) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("spec", MAIN, ids=lambda spec: spec.name)
def test_flops_of_ours_differ_by_transitions_and_recomputation(spec: NetworkSpec) -> None:
    usual_flops = flops(usual.usual_step(spec, FLOAT32))
    transitions = flops(usual.usual_step(spec, FLOAT32), "tail")
    first, again = {}, {}
    for mode in MODES:
        step = fused.fused_step(spec, FLOAT32, mode, SMS)
        again[mode] = sum(op.flops for op in step if op.name.endswith("recomputed"))
        first[mode] = flops(step) - again[mode]
        planned = shapes.plans(shapes.fused_network(spec, FLOAT32), mode)
        pointwise, spatial = flops(step, "conv1x1 forward"), flops(step, "conv3x3 forward")
        twice = sum(  # 1x1 convolutions made again for their bottleneck
            2 * block.rows * block.bottleneck * block.start(layer)
            for block, (_, hold) in zip(shapes.blocks(spec), planned, strict=True)
            for layer in range(block.layers - hold)
        )
        recomputed = twice + (pointwise + spatial if mode == "block" else 0)
        assert (twice > 0) == (mode != "none")
        assert flops(step, "conv1x1 re") + flops(step, "conv3x3 re") == recomputed
    assert set(first.values()) == {usual_flops - transitions * 3 // 4}
    assert again["none"] == 0


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda fmt: fmt.name)
@pytest.mark.parametrize("spec", MAIN, ids=lambda spec: spec.name)
def test_order_of_the_implementations(spec: NetworkSpec, fmt: shapes.Format) -> None:
    steps = [fused.fused_step(spec, fmt, mode, SMS) for mode in MODES]
    steps += [usual.usual_step(spec, fmt), usual.usual_step(spec, fmt, efficient=True)]
    bytes_moved = [moved(step) for step in steps]
    assert bytes_moved == sorted(bytes_moved)
    kept = [memory_plan.kept(spec, fmt, name) for name in (*MODES[::-1], "memory-efficient")]
    assert kept == sorted(kept)
    assert kept[-1] < memory_plan.kept(spec, fmt, "naive")


@pytest.mark.parametrize("change", ["batch_size", "growth_rate", "image_size"])
@pytest.mark.parametrize("name", predict.IMPLEMENTATIONS)
def test_larger_networks_need_more(name: str, change: str) -> None:
    planned = predict.IMPLEMENTATIONS[name]
    larger: dict[str, Any] = {change: 2 * getattr(SMALL, change)}
    figures = []
    for spec in (SMALL, replace(SMALL, **larger)):
        step = predict.count(spec, BFLOAT16, name, DEVICES[0])
        kept = memory_plan.kept(spec, BFLOAT16, planned)
        figures.append(
            (moved(step), flops(step), kept, memory_plan.peak(spec, BFLOAT16, planned, SMS))
        )
    assert all(more > less for less, more in zip(*figures, strict=True))


@pytest.mark.parametrize("name", ["none", "bottleneck", "naive"])
def test_kept_bytes_are_linear_in_depth_for_ours_and_quadratic_for_naive(name: str) -> None:
    depths = [replace(SMALL, block_config=(layers,)) for layers in (10, 20, 30)]
    a, b, c = (memory_plan.kept(spec, FLOAT32, name) for spec in depths)
    bend = 10 * 10 * SMALL.growth_rate * (3 * 16 * 16 * 2 + 2) * 4  # rows and the norm's vectors
    assert (c - b) - (b - a) == (bend if name == "naive" else 0)


# ---- Against what can be measured here

PEERS = predict.IMPLEMENTATIONS


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize(
    "spec", [SMALL, SMALL_IMAGENET, PADDED], ids=["small", "imagenet", "padded"]
)
def test_kept_bytes_are_those_that_autograd_keeps(spec: NetworkSpec, peer: str) -> None:
    model = peers.build(peers.PEERS[peer], spec, peers.initial_state(spec, 0), device=CPU)
    images, labels = memory.make_batch(spec, torch.channels_last, CPU, 0)

    def forward() -> Tensor:
        return nn.functional.cross_entropy(model(images), labels)

    measured = measure.saved_for_backward(model, forward, images)
    assert memory_plan.kept(spec, FLOAT32, PEERS[peer], cuda=False) == measured


@pytest.mark.parametrize("peer", ["naive-channels-last", "memory-efficient"])
@pytest.mark.parametrize("spec", [SMALL, SMALL_IMAGENET], ids=["small", "imagenet"])
def test_kept_bytes_under_autocast(spec: NetworkSpec, peer: str) -> None:
    """Of the usual network: on the CPU ours has no kernels for 16-bit types."""
    model = peers.build(peers.PEERS[peer], spec, peers.initial_state(spec, 0), device=CPU)
    images, labels = memory.make_batch(spec, torch.channels_last, CPU, 0)

    def forward() -> Tensor:
        with memory.autocast(CPU, "bfloat16"):
            return nn.functional.cross_entropy(model(images), labels)

    measured = measure.saved_for_backward(model, forward, images)
    assert memory_plan.kept(spec, BFLOAT16, PEERS[peer], cuda=False) == measured


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
@pytest.mark.parametrize("peer", ["naive-channels-last", "memory-efficient", "ours-bottleneck"])
def test_peak_is_near_the_one_measured(peer: str) -> None:
    spec = densenet_bc(22, 12, batch_size=32)
    measured = memory.measure_in_child(memory.MemoryCase(spec, peer, threads=1))
    predicted = memory_plan.peak(spec, FLOAT32, PEERS[peer], None)
    assert predicted == pytest.approx(measured.peak_gradients_allocated, rel=0.1)


# Kernels that one call of an operator starts; the emulator's tests count them.
LAUNCHES: dict[str, Callable[..., int]] = {
    "channel_statistics": lambda *_: 2,
    "norm_coefficients": lambda *_: 1,
    "_update_running_statistics_": lambda *args: bool(args[1]) + bool(args[2]),
    # Two for all layers; what is recomputed has no statistics, and held bottlenecks are there.
    "dense_block_forward_": lambda *args: 2 + len(args[7]) * (2 if args[9] else 4),
    "dense_block_backward_": lambda *args: 2 + len(args[12]) * 9 - args[14],
    "finish_gradient": lambda *_: 1,
    "conv1x1_forward": lambda *args: 2 if args[-1] is None else 3,
    "conv3x3_forward": lambda *args: 2 if args[-1] is None else 3,
    "conv1x1_backward": lambda *_: 5,
    "conv3x3_backward": lambda *_: 5,
    "transition_forward": lambda *args: 2 if args[-1] is None else 3,
    "transition_backward": lambda *_: 5,
    "norm_relu_avgpool_forward": lambda *_: 1,
    "norm_relu_avgpool_backward": lambda *_: 2,
    "norm_relu_maxpool_forward": lambda *_: 1,
    "norm_relu_maxpool_backward": lambda *_: 3,
}
# What PyTorch itself starts in our network, not an operator of ours.
PYTORCHS = ("classifier", "loss", "copy of the input", "deferred sums")


@pytest.mark.parametrize("mode", MODES)
def test_kernels_started_are_those_of_the_operators_called(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec, started = SMALL, 0
    for name, launches in LAUNCHES.items():
        operator = getattr(operators, name)

        def counting(*args: Any, operator: Any = operator, launches: Any = launches, **kw: Any):
            nonlocal started
            started += launches(*args)
            operator(*args, **kw)

        monkeypatch.setattr(operators, name, counting)
    peer = peers.PEERS[f"ours-{mode}"]
    model = peers.build(peer, spec, peers.initial_state(spec, 0), device=CPU)
    memory.training_step(model, *memory.make_batch(spec, torch.channels_last, CPU, 0))
    step = fused.fused_step(spec, FLOAT32, mode, SMS)
    counted = [op for op in step if op.name not in (*PYTORCHS, "stem", "stem recomputed")]
    assert sum(op.launches for op in counted) == started


# ---- The suite


def test_suite_labels_everything_a_prediction(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(spec: Any, peers: list[str], *_: Any) -> list[dict[str, Any]]:
        return [{"peer": name, "seconds": [1e-9, 1.0, 3e-3]} for name in peers]

    monkeypatch.setattr(predict.host, "measure", measured)
    assert cli.main(["predict", "--no-progress", "--full", "--output", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"predict.{suffix}" for suffix in ("md", "json", "png", "svg")
    }
    text = (tmp_path / "predict.md").read_text()
    title, *_ = lines = text.splitlines()
    assert title.startswith("# Prediction, not a measurement")
    heads = [line for line, rule in pairwise(lines) if rule.startswith("| ---")]
    captions = [head.split("|")[1].strip() for head in heads]
    assert captions[0] == "published figures"
    assert len(captions) == 1 + 2 * 2 * 2 * 4  # networks, batches, formats
    assert all(caption.startswith("predicted") for caption in captions[1:])
    plot = predict.figure(json.loads((tmp_path / "predict.json").read_text()))
    assert plot is not None
    assert plot.get_suptitle().startswith("PREDICTION")
    # Three ms: less than a step at 256 images alone.
    ours = [line.split("|") for line in lines if line.startswith("| densenet_fast") and "×" in line]
    waiting = {cells[6].strip() for cells in ours if len(cells) > 10}
    assert waiting == {"3"}
    assert {"(host)" in cell for cells in ours for cell in cells[8:9]} == {True, False}
    printed = capsys.readouterr().out
    assert all(source in printed for device in DEVICES for source in device.sources)


def test_parts_and_networks_can_be_chosen(tmp_path: Path) -> None:
    arguments = ["predict", "--no-progress", "--networks", "densenet-bc-100"]
    assert cli.main([*arguments, "--parts", "operations", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "predict.json").read_text())
    assert record["prediction"] is True
    assert not record["steps"]
    assert {entry["network"] for entry in record["operations"]} == {
        NETWORKS["densenet-bc-100"].title
    }
    assert not (tmp_path / "predict.png").exists()


def test_an_interrupt_leaves_whole_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    count, counted = 0, predict.count

    def interrupted(*arguments: Any) -> list[Op]:
        nonlocal count
        count += 1
        if count == 8:  # the second device of the second format
            raise KeyboardInterrupt
        return counted(*arguments)

    monkeypatch.setattr(predict, "count", interrupted)
    monkeypatch.setattr(predict, "FORMATS", {"a": FLOAT32, "b": BFLOAT16})
    monkeypatch.setattr(predict, "DEVICES", DEVICES[:2])
    names = list(predict.IMPLEMENTATIONS)[:3]
    monkeypatch.setattr(predict, "IMPLEMENTATIONS", {n: predict.IMPLEMENTATIONS[n] for n in names})
    command = ["predict", "--networks", "densenet-bc-100", "--output", str(tmp_path)]
    command += ["--parts", "steps,operations"]
    assert cli.main([*command, "--no-progress"]) == cli.INTERRUPTED
    record = json.loads((tmp_path / "predict.json").read_text())
    assert len(record["steps"]) == 6
    assert "partial" in (tmp_path / "predict.md").read_text()
