"""Peak memory of a training step on a GPU, as the caching allocator counts it."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch
from devices import device, on
from torch import nn
from torchvision.models import densenet121 as torchvision_densenet121

from densenet_fast.blocks.dense_block import CHECKPOINT_MODES
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.densenet import densenet121
from densenet_fast.modules.layers import DenseBlock

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def gpu() -> Iterator[None]:
    with on("cuda"):
        yield


def peak(network: nn.Module, size: tuple[int, ...]) -> int:
    """Bytes that a step needs beyond those before it, the parameters' gradients not counted."""
    images = torch.randn(size, device=device())
    network(images).sum().backward()  # libraries take their workspaces
    network.zero_grad(set_to_none=False)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    network(images).sum().backward()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_linear_in_depth(checkpoint: Checkpoint) -> None:
    peaks = []
    for depth in (8, 16, 24):
        block = DenseBlock(depth, 24, 4, 12, 0.0, checkpoint=checkpoint).to(device())
        peaks.append(peak(block, (8, 24, 56, 56)))
        del block
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    # Quadratic growth would make the second step 5/3 of the first.
    assert first > 0
    assert abs(second - first) <= 0.05 * first


def test_less_than_torchvisions() -> None:
    size = (8, 3, 128, 128)
    plain = peak(torchvision_densenet121().to(device()), size)
    efficient = peak(torchvision_densenet121(memory_efficient=True).to(device()), size)
    assert peak(densenet121(checkpoint="none").to(device()), size) < plain
    for checkpoint in ("bottleneck", "block"):
        assert peak(densenet121(checkpoint=checkpoint).to(device()), size) < efficient
