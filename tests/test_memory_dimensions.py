"""What `densenet_fast.memory` says of steps on sequences and volumes, against what they take."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor, nn

from benchmarks.children import call_in_child
from benchmarks.measure import sample_memory, saved_for_backward
from benchmarks.memory import CHILD_ENVIRONMENT
from densenet_fast import EfficientDenseNet
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.memory import estimate

EDGES = {1: 8000, 3: 32}
DIMENSIONS = pytest.mark.parametrize("dims", [1, 3])


def network(dims: int, dtype: str, mode: str) -> tuple[EfficientDenseNet, Tensor]:
    torch.manual_seed(0)
    made = EfficientDenseNet(
        32, (3, 4), 64, spatial_dims=dims, in_channels=1, num_classes=10, checkpoint=mode
    )
    images = torch.randn(4, 1, *[EDGES[dims]] * dims)
    return made.to(getattr(torch, dtype)), images.to(getattr(torch, dtype))


def forward(model: nn.Module, images: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(images), torch.arange(len(images)))


def peak(dims: int, dtype: str, mode: str) -> int:
    """Measured in this process, behind a step that made all scratch."""
    torch.set_num_threads(1)
    model, images = network(dims, dtype, mode)
    forward(model, images).backward()
    model.zero_grad(set_to_none=True)
    step = sample_memory(lambda: forward(model, images).backward(), torch.device("cpu"))
    return step.peak_above_rest


@pytest.mark.skipif(sys.platform != "linux", reason="peak memory needs Linux's /proc")
@pytest.mark.usefixtures("forked_children")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dims", "dtype", "mode"),
    [
        (1, "float32", "bottleneck"),
        (1, "float64", "none"),
        (3, "float32", "bottleneck"),
        (3, "float32", "block"),
        (3, "float64", "bottleneck"),
    ],
)
def test_peak_is_within_five_percent_of_the_one_measured(dims: int, dtype: str, mode: str) -> None:
    case = {"dims": dims, "dtype": dtype, "mode": mode}
    measured = call_in_child(
        "test_memory_dimensions:peak", case, threads=1, environment=CHILD_ENVIRONMENT
    )
    model, images = network(dims, dtype, mode)
    assert estimate(model, images.shape).peak == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@DIMENSIONS
def test_kept_bytes_are_those_that_autograd_keeps(dims: int, dtype: str, mode: str) -> None:
    model, images = network(dims, dtype, mode)
    kept = saved_for_backward(model, lambda: forward(model, images), images)
    assert estimate(model, images.shape).kept == kept
