"""What this machine reaches: float32 products and copies, measured by PyTorch's own operators."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch

from benchmarks.measure import timed

MATMUL_SIZES = (1024, 2048, 3072)  # rows and columns of square matrices
COPY_BYTES = 256 << 20  # of each buffer: more than caches hold
ROUNDS = 5
# A kernel that reaches less than this share of either peak is limited by neither.
LEAST_SHARE = 0.5


@dataclass(frozen=True)
class Machine:
    """The measured peaks, with as many threads as the kernels have."""

    flops: float  # FLOP/s
    bandwidth: float  # bytes/s, in both directions together

    def shares(self, seconds: float, flops: int, moved: int) -> tuple[float, float]:
        """How much of each peak a kernel reaches that takes `seconds`."""
        return flops / seconds / self.flops, moved / seconds / self.bandwidth

    def limit(self, seconds: float, flops: int, moved: int) -> str:
        """The peak that a kernel is nearer to, or "overhead" where it is far from both."""
        arithmetic, memory = self.shares(seconds, flops, moved)
        if max(arithmetic, memory) < LEAST_SHARE:
            return "overhead"
        return "arithmetic" if arithmetic >= memory else "memory"


def measure(device: torch.device) -> Machine:
    """Both peaks, with PyTorch's present number of threads."""
    with _precision_of_convolutions():
        flops = matmul_peak(MATMUL_SIZES, device)
    return Machine(flops, copy_bandwidth(COPY_BYTES, device))


@contextmanager
def _precision_of_convolutions() -> Iterator[None]:
    """While it lasts, products on a GPU may use tf32 where convolutions may, as the kernels do."""
    matmul, cudnn = torch.backends.cuda.matmul, cast(Any, torch.backends.cudnn)
    before = matmul.fp32_precision
    matmul.fp32_precision = cudnn.conv.fp32_precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def matmul_peak(
    sizes: Iterable[int],
    device: torch.device,
    rounds: int = ROUNDS,
    dtype: torch.dtype = torch.float32,
) -> float:
    """FLOP/s of `torch.mm` on the size it is fastest on, in its fastest round."""
    best = 0.0
    for size in sizes:
        a, b, out = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(3))

        def multiply(a: torch.Tensor = a, b: torch.Tensor = b, out: torch.Tensor = out) -> None:
            torch.mm(a, b, out=out)

        multiply()
        seconds = min(timed(multiply, device) for _ in range(rounds))
        best = max(best, 2 * size**3 / seconds)
    return best


def copy_bandwidth(size: int, device: torch.device, rounds: int = ROUNDS) -> float:
    """Bytes read and written in a second by a copy of `size` bytes, in its fastest round."""
    source, target = (torch.ones(size // 4, device=device) for _ in range(2))
    seconds = min(timed(lambda: target.copy_(source), device) for _ in range(rounds))
    return 2 * size / seconds
