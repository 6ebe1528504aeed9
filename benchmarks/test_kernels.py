"""Time of every kernel and of PyTorch's operators doing the same work: `pytest benchmarks/`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.kernels.cases import make
from benchmarks.kernels.shapes import CONVOLUTIONS, MEMORY_BOUND, shapes

CPU = torch.device("cpu")
SEED = 0
NETWORK = "densenet121"


@pytest.mark.parametrize("implementation", ["ours", "torch"])
@pytest.mark.parametrize("kernel", [*CONVOLUTIONS, *MEMORY_BOUND])
def test_kernel(benchmark: Any, kernel: str, implementation: str) -> None:
    """The smallest images on which DenseNet-121 has the kernel; a group for each kernel."""
    shape = shapes(kernel, NETWORK)[-1]
    case = make(kernel, shape, SEED, CPU)
    call = case.ours if implementation == "ours" else case.torch
    benchmark.group = f"{kernel}, {shape.label}"
    benchmark.extra_info.update(threads=torch.get_num_threads(), flops=case.flops)
    benchmark.pedantic(call, rounds=10, warmup_rounds=2)
