"""The stem's convolution in bfloat16 where PyTorch's own is slow: another type, the same values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from densenet_fast.blocks import stem_convolution
from densenet_fast.blocks.specs import ConvGeometry
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

GEOMETRY = ConvGeometry((2, 2), (3, 3), (1, 1), 1)


@pytest.fixture(autouse=True, params=[True, False], ids=["fast", "slow"])
def bfloat16_is_fast(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[bool]:
    if not extension.LOADED:
        pytest.skip("no compiled kernels")
    monkeypatch.setattr(stem_convolution, "_bfloat16_is_fast", lambda: request.param)
    with use_backend("auto"):
        yield request.param


def tensors(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 19, 16), (8, 3, 7, 7), (8,))
    input, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return input, weight, bias


def assert_rounded(actual: Tensor, exact: Tensor) -> None:
    """One rounding of a float32 result; PyTorch's own convolution may round its sums on the way."""
    assert actual.dtype == torch.bfloat16
    assert actual.shape == exact.shape
    error = (actual.double() - exact).abs()
    if stem_convolution._bfloat16_is_fast():
        assert error.max() <= 2**-5 * exact.abs().max()
    else:
        assert (error <= 2**-8 * exact.abs() + 1e-5 * exact.abs().max()).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_forward_and_backward(bfloat16_is_fast: bool, dtype: torch.dtype) -> None:
    input, weight, bias = (tensor.to(dtype) for tensor in tensors(torch.bfloat16))
    leaves = [tensor.double().requires_grad_() for tensor in (input, weight, bias)]
    exact = F.conv2d(*leaves, stride=2, padding=3)
    output = stem_convolution.forward(input, GEOMETRY, weight, bias, torch.bfloat16)
    assert output.is_contiguous(memory_format=torch.channels_last)
    assert_rounded(output, exact.detach())
    grad = torch.randn(exact.shape).bfloat16()
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    found = stem_convolution.backward(grad, input, GEOMETRY, weight, bias, [True] * 3)
    for actual, truth in zip(found, wanted, strict=True):
        assert actual is not None
        assert actual.dtype == dtype
        assert_rounded(actual.bfloat16(), truth)
        assert torch.equal(actual.bfloat16().to(dtype), actual)
    found = stem_convolution.backward(grad, input, GEOMETRY, weight, None, [False, True, False])
    assert [gradient is None for gradient in found] == [True, False, True]


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bfloat16"])
@pytest.mark.parametrize("padding", [(3, 3), "valid"], ids=str)
def test_module(bfloat16_is_fast: bool, autocast: bool, padding: str | tuple[int, int]) -> None:
    """Parameters keep the type of their gradients, and images need none."""
    module = nn.Conv2d(3, 8, 7, stride=2, padding=padding)
    images = torch.randn(2, 3, 19, 16)
    if not autocast:
        module, images = module.bfloat16(), images.bfloat16()
    rounded = [tensor.bfloat16().double() for tensor in (images, module.weight, module.bias)]
    exact = F.conv2d(*rounded, stride=2, padding=padding)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = stem_convolution.module_forward(module, images, module.weight, module.bias)
    assert_rounded(output, exact.detach())
    output.float().sum().backward()
    for parameter in module.parameters():
        assert parameter.grad is not None
        assert parameter.grad.dtype == parameter.dtype


class CopiesOf(TorchDispatchMode):
    """The types that tensors of this shape are converted to."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.types = shape, []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._to_copy.default and args[0].shape == self.shape:
            self.types.append(kwargs["dtype"])
        return func(*args, **(kwargs or {}))


def test_autocast_copies_the_images_no_more_than_it_must(bfloat16_is_fast: bool) -> None:
    module = nn.Conv2d(3, 8, 7, stride=2, padding=3)
    images = torch.randn(2, 3, 19, 16)
    with torch.autocast("cpu", torch.bfloat16), CopiesOf(images.shape) as copies:
        stem_convolution.module_forward(module, images, module.weight, module.bias)
    wide = [] if bfloat16_is_fast else [torch.float32]
    assert copies.types == [torch.bfloat16, *wide]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_types_are_left_alone(bfloat16_is_fast: bool, dtype: torch.dtype) -> None:
    assert stem_convolution._fast_type(torch.empty(1, dtype=dtype)) == dtype


def test_the_reference_computes_as_pytorch_does(bfloat16_is_fast: bool) -> None:
    with use_backend("reference"):
        tensor = torch.empty(1, dtype=torch.bfloat16)
        assert stem_convolution._fast_type(tensor) == torch.bfloat16
