"""The stem's norm, ReLU and max-pool as one node, against their plain composition."""

from __future__ import annotations

import pytest
import torch
from block_cases import gradients, make_norm
from devices import device
from plain_block import plain_stem
from torch import Tensor

from densenet_fast.blocks.dense_block import NormSpec, stem_norm_relu_maxpool

SHAPES = ((2, 3, 8, 8), (1, 20, 7, 13), (3, 5, 1, 2), (2, 4, 33, 1), (3, 6, 1, 1))


def case(
    shape: tuple[int, ...], *, frozen: bool = False, affine: bool = True
) -> tuple[Tensor, NormSpec]:
    generator = torch.Generator().manual_seed(0)
    norm = make_norm(shape[1], generator, frozen=frozen, affine=affine)
    input = torch.randn(shape, generator=generator, dtype=torch.float64)
    return input.to(device()).requires_grad_(), norm


def own_statistics(norm: NormSpec) -> NormSpec:
    """The same parameters, and running statistics of its own."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm._replace(
        running_mean=norm.running_mean.clone(), running_var=norm.running_var.clone()
    )


def leaves(input: Tensor, norm: NormSpec) -> list[Tensor]:
    every = (input, norm.weight, norm.bias)
    return [tensor for tensor in every if tensor is not None and tensor.requires_grad]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "bare"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_stem(
    backend: str,
    shape: tuple[int, ...],
    frozen: bool,
    affine: bool,
    layout: torch.memory_format,
) -> None:
    input, norm = case(shape, frozen=frozen, affine=affine)
    input = input.detach().contiguous(memory_format=layout).requires_grad_()
    other = own_statistics(norm)
    output, exact = stem_norm_relu_maxpool(input, norm), plain_stem(input, other)
    assert output.is_contiguous(memory_format=torch.channels_last)
    found = [output.detach(), *gradients(output, leaves(input, norm))]
    expected = [exact.detach(), *gradients(exact, leaves(input, norm))]
    found += [norm.running_mean, norm.running_var]
    expected += [other.running_mean, other.running_var]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
def test_gradcheck(backend: str, frozen: bool) -> None:
    input, norm = case((2, 2, 3, 4), frozen=frozen)
    torch.autograd.gradcheck(
        lambda *_: stem_norm_relu_maxpool(input, norm), leaves(input, norm), eps=1e-7, atol=1e-5
    )


def test_the_input_and_one_byte_for_each_output_are_kept(backend: str) -> None:
    input, norm = case((2, 16, 12, 12))
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = stem_norm_relu_maxpool(input, norm)
    vectors = 4 * 16 * 8  # mean, variance, weight, bias
    assert sum(saved.values()) == input.numel() * 8 + output.numel() + vectors
    saved.clear()
    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        stem_norm_relu_maxpool(input, norm)
    assert not saved


def test_partial_gradients(backend: str) -> None:
    input, norm = case((2, 3, 5, 5))
    exact = gradients(plain_stem(input, own_statistics(norm)), leaves(input, norm))
    every = leaves(input, norm)
    for index, tensor in enumerate(every):
        for other in every:
            other.requires_grad_(other is tensor)
        (found,) = gradients(stem_norm_relu_maxpool(input, norm), [tensor])
        torch.testing.assert_close(found, exact[index], rtol=1e-10, atol=1e-10)


def test_errors(backend: str) -> None:
    input, norm = case((2, 3, 5, 5))
    with pytest.raises(ValueError, match="four dimensions"):
        stem_norm_relu_maxpool(input[0, 0], norm)
    with pytest.raises(ValueError, match=r"norm.weight should have shape \(2,\)"):
        stem_norm_relu_maxpool(input[:, :2], norm)
    with pytest.raises(TypeError, match="type of the input"):
        stem_norm_relu_maxpool(input.float(), norm)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        stem_norm_relu_maxpool(input[:1, :, :1, :1], norm)
    first = torch.autograd.grad(
        stem_norm_relu_maxpool(input, norm).square().sum(), input, create_graph=True
    )
    with pytest.raises(RuntimeError, match="the fused stem cannot be differentiated twice"):
        first[0].sum().backward()
