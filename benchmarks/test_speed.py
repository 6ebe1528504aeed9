"""Times for pytest-benchmark's own comparisons: `pytest benchmarks/ --benchmark-enable`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.calls import make_call
from benchmarks.kernels.cases import make
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, shapes
from benchmarks.networks import densenet_bc
from benchmarks.peers import BASIC_PEERS, initial_state

CPU = torch.device("cpu")


@pytest.mark.parametrize("peer", BASIC_PEERS)
@pytest.mark.parametrize("growth_rate", [12, 24, 32])
@pytest.mark.parametrize("part", ["time", "inference"])
def test_network(benchmark: Any, part: str, growth_rate: int, peer: str) -> None:
    """A training step or inference of a DenseNet-BC-22 on 16 images."""
    spec = densenet_bc(22, growth_rate, batch_size=16)
    call = make_call(part, spec, peer, initial_state(spec, 0), CPU, 0)
    benchmark.group = f"{part}, k={growth_rate}"
    result = benchmark.pedantic(call, rounds=10, warmup_rounds=2)
    assert torch.isfinite(result).all()


@pytest.mark.parametrize("implementation", ["ours", "torch"])
@pytest.mark.parametrize("kernel", [*CONVOLUTIONS, *MEMORY_BOUND])
def test_kernel(benchmark: Any, kernel: str, implementation: str) -> None:
    """A kernel on the smallest images on which DenseNet-121 has it."""
    shape = shapes(kernel, "densenet121")[-1]
    benchmark.group = f"{kernel}, {shape.label}"
    call = getattr(make(kernel, shape, 0, CPU), implementation)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
