"""The stem with its convolution as one node that makes the convolution again in the backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from block_cases import gradients, make_norm
from devices import device
from plain_block import plain_stem
from test_dense_block_stem import own_statistics
from torch import Tensor

from densenet_fast.blocks.dense_block import NormSpec, conv_stem
from densenet_fast.blocks.specs import ConvGeometry

GEOMETRIES = {
    "torchvision": ((8, 3, 7, 7), ConvGeometry((2, 2), (3, 3), (1, 1), 1), (2, 3, 20, 17)),
    "small": ((5, 2, 3, 3), ConvGeometry((1, 1), (1, 1), (1, 1), 1), (3, 2, 6, 9)),
    "groups": ((6, 2, 3, 1), ConvGeometry((1, 2), (2, 0), (2, 1), 2), (2, 4, 7, 8)),
}


def case(name: str, *, bias: bool, frozen: bool) -> tuple[list[Tensor], ConvGeometry, NormSpec]:
    shape, geometry, images = GEOMETRIES[name]
    generator = torch.Generator().manual_seed(0)
    norm = make_norm(shape[0], generator, frozen=frozen, affine=True)
    sizes = [images, shape, *([shape[:1]] if bias else [])]
    tensors = [torch.randn(s, generator=generator, dtype=torch.float64) for s in sizes]
    return [tensor.to(device()).requires_grad_() for tensor in tensors], geometry, norm


def fused(tensors: list[Tensor], geometry: ConvGeometry, norm: NormSpec) -> Tensor:
    input, weight, *bias = tensors
    return conv_stem(input, weight, bias[0] if bias else None, geometry, norm)


def plain(tensors: list[Tensor], g: ConvGeometry, norm: NormSpec) -> Tensor:
    input, weight, *bias = tensors
    convolved = F.conv2d(
        input, weight, bias[0] if bias else None, g.stride, g.padding, g.dilation, g.groups
    )
    return plain_stem(convolved, norm)


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_conv_stem(backend: str, name: str, bias: bool, frozen: bool) -> None:
    tensors, geometry, norm = case(name, bias=bias, frozen=frozen)
    other = own_statistics(norm)
    output, exact = fused(tensors, geometry, norm), plain(tensors, geometry, other)
    assert norm.weight is not None
    assert norm.bias is not None
    leaves = [*tensors, norm.weight, norm.bias]
    found = [output.detach(), *gradients(output, leaves), norm.running_mean, norm.running_var]
    expected = [exact.detach(), *gradients(exact, leaves), other.running_mean, other.running_var]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_partial_gradients(backend: str) -> None:
    tensors, geometry, norm = case("torchvision", bias=True, frozen=False)
    assert norm.weight is not None
    assert norm.bias is not None
    every = [*tensors, norm.weight, norm.bias]
    exact = gradients(plain(tensors, geometry, own_statistics(norm)), every)
    for index, tensor in enumerate(every):
        for other in every:
            other.requires_grad_(other is tensor)
        (found,) = gradients(fused(tensors, geometry, norm), [tensor])
        torch.testing.assert_close(found, exact[index], rtol=1e-10, atol=1e-10)


def test_one_byte_for_each_output_is_kept(backend: str) -> None:
    tensors, geometry, norm = case("torchvision", bias=False, frozen=False)
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = fused(tensors, geometry, norm)
    vectors = 4 * 8 * 8  # mean, variance, weight, bias
    assert sum(saved.values()) == sum(t.numel() * 8 for t in tensors) + output.numel() + vectors
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        fused(tensors, geometry, norm)
    assert not saved


def test_second_derivatives_find_an_error() -> None:
    tensors, geometry, norm = case("small", bias=False, frozen=False)
    (gradient,) = torch.autograd.grad(
        fused(tensors, geometry, norm).square().sum(), tensors[1], create_graph=True
    )
    with pytest.raises(RuntimeError, match="the fused stem cannot be differentiated twice"):
        gradient.sum().backward()
