"""Whole networks on a GPU against torchvision's: precision, autocast, repeatability."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from block_cases import TAILS, gradients, make_block
from comparison import SMALL, networks, step
from devices import device, on, tf32
from test_kernels_networks import network as tiny_network
from test_kernels_networks import step as tiny_step
from test_kernels_networks import unfused
from torch import Tensor, nn

from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.densenet import EfficientDenseNet

pytestmark = pytest.mark.cuda
HALF = (torch.float16, torch.bfloat16)
DTYPES = (*HALF, torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The first convolution is PyTorch's: it repeats its bits only if asked to."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    with on("cuda"):
        yield


def results(network: nn.Module, images: Tensor) -> list[Tensor]:
    """Output, all gradients and the running statistics of a training step."""
    network.zero_grad()
    output, grad = step(network, images)
    assert grad is not None
    buffers = [b for b in network.buffers() if b.is_floating_point()]
    found = [output, grad, *(p.grad for p in network.parameters()), *buffers]
    return [value.detach().clone() for value in found]


def error(actual: list[Tensor], truth: list[Tensor]) -> float:
    """The sum of all relative errors."""
    return sum(
        float((one.double() - two).norm() / (two.norm() + 1e-12))
        for one, two in zip(actual, truth, strict=True)
    )


def assert_as_accurate(
    dtype: torch.dtype, context: AbstractContextManager[None], checkpoint: Checkpoint
) -> tuple[float, float]:
    """At most twice torchvision's error against float64, in the median of several networks.

    In a single one chance decides, as rounding may switch a ReLU (see test_model_exactness).
    Returns torchvision's error and ours.
    """
    errors: tuple[list[float], list[float]] = ([], [])
    for seed in range(9):
        expected, ours = networks(dtype, seed=seed, checkpoint=checkpoint, growth_rate=8)
        images = torch.randn(8, 3, 32, 32).to(device(), dtype)
        truth = results(copy.deepcopy(expected).double(), images.double())
        for network, found in zip((expected, ours), errors, strict=True):
            with context:
                found.append(error(results(network, images), truth))
    theirs, ours = map(statistics.median, errors)
    assert ours <= 2 * theirs, f"error {ours:.3g}, torchvision's is {theirs:.3g}"
    return theirs, ours


@pytest.mark.parametrize("dtype", [*HALF, torch.float32], ids=str)
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_as_accurate_as_torchvision(dtype: torch.dtype, checkpoint: Checkpoint) -> None:
    assert_as_accurate(dtype, nullcontext(), checkpoint)


def test_as_accurate_as_torchvision_with_tf32() -> None:
    with tf32(True):
        assert_as_accurate(torch.float32, nullcontext(), "bottleneck")


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    assert_as_accurate(torch.float32, torch.autocast(device().type, dtype), "bottleneck")
    network = EfficientDenseNet(**SMALL).to(device())
    with torch.autocast(device().type, dtype):
        output = network(torch.randn(4, 3, 32, 32, device=device()))
    assert output.dtype == dtype
    output.sum().backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name


def test_tf32_follows_pytorchs_setting() -> None:
    """Other bits with it than without: otherwise one of the two settings does nothing."""
    if device().type == "cuda" and torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("tf32 needs compute capability 8.0")
    block = make_block((2, 40, 9, 9), (12,), dtype=torch.float32)
    outputs = []
    for allow in (False, True, False):
        with tf32(allow), torch.no_grad():
            outputs.append(dense_block(block.input, block.layers))
    assert torch.equal(outputs[0], outputs[2])
    assert not torch.equal(outputs[0], outputs[1])
    error = (outputs[0] - outputs[1]).norm() / outputs[0].norm()
    assert error < 2**-9


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_blocks_repeat_their_bits(
    dtype: torch.dtype, checkpoint: Checkpoint, tail: str | None, dropout: float
) -> None:
    found = []
    for _ in range(3):
        block = make_block((3, 20, 13, 11), (12,) * 4, tail, width=48, dropout=dropout, dtype=dtype)
        torch.manual_seed(7)
        output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
        found.append([output.detach(), *gradients(output, block.leaves()), *block.buffers()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tail", TAILS)
def test_modes_have_the_same_bits(dtype: torch.dtype, tail: str | None) -> None:
    found = []
    for checkpoint in CHECKPOINT_MODES:
        block = make_block((3, 20, 13, 11), (12,) * 4, tail, width=48, dtype=dtype)
        output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
        found.append([output.detach(), *gradients(output, block.leaves()), *block.buffers()])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_networks_repeat_their_bits(checkpoint: Checkpoint) -> None:
    images = torch.randn(4, 3, 40, 33).to(device())
    found = []
    for _ in range(3):
        _, ours = networks(torch.float32, checkpoint=checkpoint, drop_rate=0.2)
        torch.manual_seed(3)
        found.append(results(ours, images))
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("dims", [1, 3])
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_sequences_and_volumes(dims: int, checkpoint: Checkpoint) -> None:
    """In float64 a step is that of PyTorch's own modules, and it repeats its bits."""
    size = (3, 3, *(35, 40, 33)[:dims])

    def made() -> nn.Module:
        return tiny_network(checkpoint, torch.float64, spatial_dims=dims)

    first, second = (tiny_step(made(), torch.float64, size) for _ in range(2))
    for name, value in tiny_step(unfused(made()), torch.float64, size).items():
        assert torch.equal(first[name], second[name]), name
        torch.testing.assert_close(first[name], value, rtol=1e-9, atol=1e-11, msg=name)
