"""Blocks and stems on sequences, images and volumes against plain PyTorch."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from block_cases import TAILS, Block, gradients, make_block, make_norm
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_block import CONVOLUTION, plain_block, plain_stem
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks.dense_block import (
    CHECKPOINT_MODES,
    conv_stem,
    dense_block,
    stem_norm_relu_maxpool,
)
from densenet_fast.blocks.specs import Checkpoint, ConvGeometry
from densenet_fast.operators.backends import Setting, use_backend
from densenet_fast.operators.philox import draw_seeds, philox
from densenet_fast.operators.rows import as_rows, empty_channels_last, is_channels_last, rows_of

# Of every number of dimensions, and flat ones.
SIZES = ((9,), (2,), (5, 6), (4, 5, 6), (5, 16, 2), (2, 3, 2))
P = 0.4


@pytest.fixture(params=["auto", "reference"], autouse=True)
def _setting(request: pytest.FixtureRequest) -> Iterator[None]:
    with use_backend(request.param):
        yield


def results(block: Block, output: Tensor) -> list[Tensor]:
    return [output.detach(), *block.buffers(), *gradients(output, block.leaves())]


def compare(
    block: Block, checkpoint: Checkpoint, hold: int = 0, masks: tuple[Tensor, ...] = ()
) -> None:
    other = block.copy()
    output = dense_block(
        block.input, block.layers, tail=block.tail, checkpoint=checkpoint, hold=hold
    )
    exact = plain_block(other.input, other.layers, other.tail, masks)
    for one, two in zip(results(block, output), results(other, exact), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_the_block_is_the_plain_one(
    size: tuple[int, ...], tail: str | None, checkpoint: Checkpoint
) -> None:
    compare(make_block((2, 5, *size), tail=tail), checkpoint)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("width", [0, (0, 8, 0), (8, 0, 8)], ids=str)
@pytest.mark.parametrize("size", [(9,), (5, 6), (4, 5, 6)], ids=str)
def test_layers_without_a_bottleneck(
    size: tuple[int, ...], width: int | tuple[int, ...], tail: str | None, checkpoint: Checkpoint
) -> None:
    for frozen in ((), (0, 2)):
        block = make_block((2, 5, *size), tail=tail, width=width, frozen=frozen)
        compare(block, checkpoint, hold=2)


@pytest.mark.parametrize("size", [(1,), (1, 4, 3), (3, 1, 1)], ids=str)
def test_sizes_of_one(size: tuple[int, ...]) -> None:
    compare(make_block((3, 5, *size), tail="avgpool"), "bottleneck", 1)


@pytest.mark.parametrize("frozen", [(0, 3), tuple(range(7))], ids=["some", "all"])
@pytest.mark.parametrize("size", [(9,), (4, 5, 6)], ids=str)
def test_frozen_norms(size: tuple[int, ...], frozen: tuple[int, ...]) -> None:
    compare(make_block((2, 5, *size), tail="transition", frozen=frozen), "bottleneck")


@settings(max_examples=25)
@given(
    size=st.lists(st.integers(2, 6), min_size=1, max_size=3),
    images=st.integers(1, 3),
    growths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    tail=st.sampled_from(TAILS),
    checkpoint=st.sampled_from(CHECKPOINT_MODES),
    setting=st.sampled_from(("auto", "reference")),
    data=st.data(),
)
def test_any_block(
    size: list[int],
    images: int,
    growths: list[int],
    tail: str | None,
    checkpoint: Checkpoint,
    setting: Setting,
    data: st.DataObject,
) -> None:
    hold = data.draw(st.integers(0, len(growths)))
    widths = data.draw(st.tuples(*[st.sampled_from([0, 3, 8])] * len(growths)))
    with use_backend(setting):
        # With next to no variance in a channel, rounding grows.
        frozen = range(2 * len(growths) + 1) if images * math.prod(size) < 8 else ()
        block = make_block((images, 3, *size), growths, tail, width=widths, frozen=frozen)
        compare(block, checkpoint, hold)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("size", [(6,), (4, 5), (3, 4, 3)], ids=str)
def test_whole_channels_are_dropped(size: tuple[int, ...], checkpoint: Checkpoint) -> None:
    block = make_block((3, 5, *size), tail="transition", dropout=P, whole_channels=True)
    torch.manual_seed(5)
    seeds = draw_seeds(len(block.layers)).tolist()
    masks = []
    for layer, seed in zip(block.layers, seeds, strict=True):
        shape = (3, len(layer.conv2_weight), *[1] * len(size))
        words = philox(math.prod(shape), seed, torch.device("cpu"))
        masks.append((words >= int(P * 2**32)).view(shape).double() / (1 - P))
    assert any((mask == 0).any() for mask in masks)
    torch.manual_seed(5)
    compare(block, checkpoint, masks=tuple(masks))


@pytest.mark.parametrize("p", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("size", [(5,), (2, 3), (2, 3, 2)], ids=str)
def test_dropout_of_channels(size: tuple[int, ...], p: float) -> None:
    ones = torch.ones(40, *size, 6)
    operators.dropout_(ones, 7, p, True)
    words = philox(40 * 6, 7, ones.device).view(40, *[1] * len(size), 6)
    kept = words >= int(p * 2**32) if p < 1 else words < 0
    expected = kept.float().expand(ones.shape)
    torch.testing.assert_close(ones, expected / (1 - p) if p < 1 else expected)


@pytest.mark.parametrize("width", [0, 2])
@pytest.mark.parametrize("size", [(4,), (2, 2, 3)], ids=str)
def test_finite_differences(size: tuple[int, ...], width: int) -> None:
    block = make_block((2, 2, *size), (2, 2), "transition", width=width, seed=3)

    def output(*leaves: Tensor) -> Tensor:
        return dense_block(block.input, block.layers, tail=block.tail)

    torch.autograd.gradcheck(output, block.leaves(), eps=1e-7, atol=1e-5, rtol=1e-4)


# The stem


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("size", [(1,), (8,), (5, 4), (1, 6, 3), (5, 4, 7)], ids=str)
def test_the_stem_is_the_plain_one(size: tuple[int, ...], frozen: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    input = torch.randn(3, 4, *size, generator=generator, dtype=torch.float64).requires_grad_()
    norm = make_norm(4, generator, frozen=frozen)
    leaves = [input, norm.weight, norm.bias]
    found, exact = stem_norm_relu_maxpool(input, norm), plain_stem(input, norm)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    for one, two in zip(gradients(found, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("size", [(13,), (9, 12), (9, 5, 8)], ids=str)
def test_the_stem_with_its_convolution(size: tuple[int, ...], groups: int) -> None:
    generator = torch.Generator().manual_seed(2)
    dims = len(size)
    shapes = ((2, 2, *size), (4, 2 // groups, *[7] * dims), (4,))
    input, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()
        for shape in shapes
    )
    norm = make_norm(4, generator)
    conv = ConvGeometry((2,) * dims, (3,) * dims, (1,) * dims, groups)
    leaves = [input, weight, bias, norm.weight, norm.bias]
    found = conv_stem(input, weight, bias, conv, norm)
    exact = plain_stem(CONVOLUTION[input.dim()](input, weight, bias, *conv), norm)
    torch.testing.assert_close(found, exact, rtol=1e-10, atol=1e-10)
    for one, two in zip(gradients(found, leaves), gradients(exact, leaves), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_places_of_maxima(dims: int) -> None:
    """One digit to base 3 for each dimension, the first in front."""
    one, zero = torch.ones(1), torch.zeros(1)
    for place in range(3**dims):
        digits = [place // 3**at % 3 for at in reversed(range(dims))]
        rows = torch.zeros(1, *[3] * dims, 1)
        rows[(0, *digits, 0)] = 1
        # The second window of five pixels begins at the second one.
        padded = torch.nn.functional.pad(rows, (0, 0, *[1, 1] * dims))
        out, argmax = (
            torch.empty(1, *[3] * dims, 1),
            torch.empty(1, *[3] * dims, 1, dtype=torch.uint8),
        )
        operators.norm_relu_maxpool_forward(padded, one, zero, out, argmax)
        middle = (0, *[1] * dims, 0)
        assert (out[middle], argmax[middle]) == (1, place)


# Layouts and errors


@pytest.mark.parametrize("size", [(5,), (5, 4), (3, 5, 4), (1, 1, 1)], ids=str)
def test_rows(size: tuple[int, ...]) -> None:
    like = torch.empty(0)
    images = empty_channels_last((2, 3, *size), like, 4)
    assert as_rows(images).data_ptr() == images.data_ptr()
    contiguous = torch.randn(2, 3, *size)
    rows = as_rows(contiguous)
    assert torch.equal(rows, rows_of(contiguous))
    assert rows.is_contiguous()
    assert rows.stride()[-2:] == (3, 1)
    assert is_channels_last(empty_channels_last((2, 3, *size), like)) == (len(size) > 1)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((4,), r"three dimensions \[N, C, L\], got shape \(2, 5, 4, 1\)"),
        ((4, 4), r"four dimensions \[N, C, H, W\], got shape \(2, 5, 4, 4, 1\)"),
        ((4, 4, 4), r"five dimensions \[N, C, D, H, W\], got shape \(2, 5, 4, 4, 4, 1\)"),
    ],
)
def test_other_dimensions_are_refused(size: tuple[int, ...], words: str) -> None:
    block = make_block((2, 5, *size))
    with pytest.raises(ValueError, match=words):
        dense_block(block.input[..., None], block.layers)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((1,), "at least 2 pixels, got 1"),
        ((4, 1), "at least 2x2 pixels, got 4x1"),
        ((4, 1, 4), "at least 2x2x2 pixels, got 4x1x4"),
    ],
)
def test_images_too_small_for_the_transition(size: tuple[int, ...], words: str) -> None:
    block = make_block((2, 5, *size), tail="transition")
    before = block.buffers()
    with pytest.raises(ValueError, match=words):
        dense_block(block.input, block.layers, tail=block.tail)
    for one, two in zip(block.buffers(), before, strict=True):
        assert torch.equal(one, two)


def test_a_weight_of_other_dimensions() -> None:
    block = make_block((2, 5, 4, 4, 4))
    first = block.layers[0]
    flat = first._replace(conv1_weight=first.conv1_weight[..., 0])
    with pytest.raises(ValueError, match=r"conv1.weight should have shape \(outputs, 5, 1, 1, 1\)"):
        dense_block(block.input, [flat])
