"""Several processes that communicate on this machine: each runs the same function."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

needs_gloo = pytest.mark.skipif(
    not (dist.is_available() and dist.is_gloo_available()),
    reason="this PyTorch has no gloo backend",
)
_TIMEOUT = timedelta(seconds=120)  # a rank that waits in vain fails instead of hanging


def run_on_ranks(function: Callable[..., None], *args: Any, ranks: int = 2) -> None:
    """Call `function(*args)` in that many processes, each a rank of one gloo group.

    The first rank's exception becomes this process's. Spawned, not forked: a process with threads
    of OpenMP cannot be forked safely.
    """
    with tempfile.TemporaryDirectory() as folder:
        mp.start_processes(
            _rank, (function, args, ranks, str(Path(folder) / "store")), ranks, start_method="spawn"
        )


def _rank(rank: int, function: Callable[..., None], args: Any, ranks: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=_TIMEOUT
    )
    try:
        function(*args)
    finally:
        dist.destroy_process_group()


@contextmanager
def group_of_one() -> Iterator[None]:
    """A process group in which this process is alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def share(batch: Tensor, sizes: tuple[int, ...] = (2, 3)) -> Tensor:
    """The images of this rank in a batch that all ranks have: rank 0's are the first."""
    return batch.split(sizes)[dist.get_rank()]


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        total = tensor.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        total = grad.contiguous().clone()
        dist.all_reduce(total, group=ctx.group)
        return total, None


class ComposedSyncNorm(nn.Module):
    """`nn.SyncBatchNorm` in training, from differentiable sums over the ranks.

    PyTorch's own refuses tensors on CPUs.
    """

    def __init__(self, norm: nn.SyncBatchNorm) -> None:
        super().__init__()
        self.eps, self.momentum, self.group = norm.eps, norm.momentum, norm.process_group
        self.weight, self.bias = norm.weight, norm.bias
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, input: Tensor) -> Tensor:
        count = _Sum.apply(input.new_tensor([input.numel() / input.shape[1]]), self.group)
        mean = _Sum.apply(input.sum((0, 2, 3)), self.group) / count
        centred = input - mean[:, None, None]
        var = _Sum.apply(centred.square().sum((0, 2, 3)), self.group) / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight / (var + self.eps).sqrt()
        return centred * scale[:, None, None] + self.bias[:, None, None]
