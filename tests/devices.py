"""Where tests run: a backend, and the device on which all cases make their tensors meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from densenet_fast.operators import extension
from densenet_fast.operators.backends import Setting, use_backend

CPU = pytest.param(
    "cpu", marks=pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")
)
CUDA = pytest.param("cuda", marks=pytest.mark.cuda)
HALF = (torch.float16, torch.bfloat16)
BACKENDS = ("reference", CPU, CUDA)
# Backends with the types of half the width that they compute in.
HALF_TYPES = (
    *(("reference", dtype) for dtype in HALF),
    pytest.param("cpu", torch.bfloat16, marks=CPU.marks),
    *(pytest.param("cuda", dtype, marks=CUDA.marks) for dtype in HALF),
)

_device = torch.device("cpu")


def device() -> torch.device:
    """The device under test."""
    return _device


@contextmanager
def tf32(allow: bool) -> Iterator[None]:
    """Whether PyTorch and our kernels may round factors of float32 products to tf32."""
    settings = (torch.backends.cudnn.conv, torch.backends.cuda.matmul)
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "tf32" if allow else "ieee"
        yield
    finally:
        for setting, precision in zip(settings, before, strict=True):
            setting.fp32_precision = precision


@contextmanager
def on(backend: Setting) -> Iterator[None]:
    """Force a backend, in exact float32, and test on its device; the CPU for all but "cuda"."""
    global _device
    before = _device
    with use_backend(backend), tf32(False):
        _device = torch.device("cuda" if backend == "cuda" else "cpu")
        try:
            yield
        finally:
            _device = before


def captured(run: Callable[[], Any], warm_up: int = 3) -> torch.cuda.CUDAGraph:
    """A graph of `run`, which has run before on a side stream, as PyTorch asks for."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(warm_up):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph
