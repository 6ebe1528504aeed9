"""Dropout inside a fused block: the seed decides, the backward sees the same mask."""

from __future__ import annotations

import pytest
import torch
from block_cases import TAILS, Block, gradients, make_block
from devices import device
from plain_block import plain_block
from torch import Tensor

from densenet_fast.blocks import nodes
from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.operators.philox import draw_seeds, philox

P = 0.3


def run(block: Block, checkpoint: Checkpoint = "bottleneck") -> Tensor:
    return dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)


def mask(block: Block, index: int, seed: int) -> Tensor:
    """The factors of one layer's dropout as [N, k, H, W]."""
    images, _, height, width = block.input.shape
    growth = block.layers[index].conv2_weight.shape[0]
    words = philox(images * height * width * growth, seed, device())
    keep = (words >= int(P * 2**32)).view(images, height, width, growth)
    return keep.permute(0, 3, 1, 2).double() / (1 - P)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize(
    ("frozen", "biased"),
    [((), ()), ((0, 3), (0, 2)), (tuple(range(7)), ()), ((), (1, 2))],
    ids=["batch", "some", "all", "biased"],
)
def test_the_block_is_the_plain_one_with_its_masks(
    backend: str,
    checkpoint: Checkpoint,
    tail: str | None,
    frozen: tuple[int, ...],
    biased: tuple[int, ...],
) -> None:
    block = make_block(tail=tail, dropout=P, frozen=frozen, biased=biased)
    other = block.copy()
    torch.manual_seed(5)
    output = run(block, checkpoint)
    torch.manual_seed(5)
    seeds = draw_seeds(len(block.layers)).tolist()
    masks = [mask(block, index, seed) for index, seed in enumerate(seeds)]
    exact = plain_block(other.input, other.layers, other.tail, masks)
    actual = [output.detach(), *block.buffers(), *gradients(output, block.leaves())]
    expected = [exact.detach(), *other.buffers(), *gradients(exact, other.leaves())]
    for one, two in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


def test_manual_seed_repeats_a_step_and_steps_differ(backend: str) -> None:
    block = make_block(dropout=P)
    torch.manual_seed(1)
    first, second = run(block), run(block)
    torch.manual_seed(1)
    again = run(block)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    # Layers of one step differ, too.
    zeros = first.detach()[:, 5:8] == 0
    assert not torch.equal(zeros, first.detach()[:, 8:11] == 0)


@pytest.mark.parametrize("recorded", [False, True], ids=["eager", "graph"])
def test_seeds_are_drawn_on_the_host(
    backend: str, recorded: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    block = make_block(dropout=P)
    torch.manual_seed(1)
    expected = run(block)
    torch.manual_seed(1)
    monkeypatch.setattr(nodes, "recorded", lambda _: recorded)
    with torch.device("meta"):  # as set_default_device does
        output = run(block)
    assert torch.equal(output, expected)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_modes_draw_the_same_masks(backend: str, checkpoint: Checkpoint) -> None:
    results = []
    for mode in ("bottleneck", checkpoint):
        block = make_block(tail="avgpool", dropout=P)
        torch.manual_seed(2)
        output = run(block, mode)
        torch.rand(1)  # what others draw in between does not matter
        results.append([output.detach(), *gradients(output, block.leaves())])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_no_dropout_draws_no_random_numbers(backend: str) -> None:
    block = make_block()
    before = torch.get_rng_state()
    run(block)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_dropping_everything_leaves_the_input(backend: str, checkpoint: Checkpoint) -> None:
    block = make_block(dropout=1.0)
    output = run(block, checkpoint)
    assert torch.equal(output[:, :5], block.input)
    assert (output[:, 5:] == 0).all()
    found = gradients(output, block.leaves())
    assert all((gradient == 0).all() for gradient in found[1:])


def test_finite_differences(backend: str) -> None:
    """Of one mode: `test_modes_draw_the_same_masks` has the others' gradients."""
    block = make_block((2, 2, 3, 2), (2, 2), "avgpool", width=2, dropout=P, seed=3)

    def output(*leaves: Tensor) -> Tensor:
        torch.manual_seed(4)
        return run(block, "block")

    torch.autograd.gradcheck(output, block.leaves(), eps=1e-7, atol=1e-5, rtol=1e-4)
