"""NaN and infinity: no gradient hides them where plain PyTorch shows them."""

from __future__ import annotations

import pytest
import torch
from block_cases import TAILS, make_block
from plain_block import plain_block, plain_stem
from torch import Tensor

from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block, stem_norm_relu_maxpool
from densenet_fast.blocks.specs import Checkpoint

FROZEN = {"batch": (), "norm1": (0, 2, 4, 6), "all": tuple(range(7))}
NONFINITE = [float("nan"), float("inf"), -float("inf")]


def assert_nothing_hidden(actual: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
    """Wherever plain PyTorch is not finite, we are not.

    The reverse is not asked for: a frozen norm's gradient is an affine map with factors of 0, which
    keeps a NaN of the data where plain PyTorch never looks at the data.
    """
    for index, (one, other) in enumerate(zip(actual, plain, strict=True)):
        assert not (one.isfinite() & ~other.isfinite()).any(), f"gradient {index}"


@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("frozen", FROZEN)
@pytest.mark.parametrize("value", NONFINITE)
def test_of_the_input(
    backend: str, checkpoint: Checkpoint, tail: str | None, frozen: str, value: float
) -> None:
    block = make_block(tail=tail, frozen=FROZEN[frozen])
    with torch.no_grad():
        block.input[1, 2, 3, 4] = value
    other = block.copy()
    output = dense_block(block.input, block.layers, tail=block.tail, checkpoint=checkpoint)
    plain = plain_block(other.input, other.layers, other.tail)
    assert_nothing_hidden(
        torch.autograd.grad(output.sum(), block.leaves()),
        torch.autograd.grad(plain.sum(), other.leaves()),
    )


@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("value", NONFINITE)
def test_of_the_gradient(backend: str, tail: str | None, value: float) -> None:
    block = make_block(tail=tail)
    other = block.copy()
    output = dense_block(block.input, block.layers, tail=block.tail)
    plain = plain_block(other.input, other.layers, other.tail)
    gradient = torch.ones_like(output, memory_format=torch.contiguous_format)
    gradient.view(-1)[3] = value
    assert_nothing_hidden(
        torch.autograd.grad(output, block.leaves(), gradient),
        torch.autograd.grad(plain, other.leaves(), gradient),
    )


@pytest.mark.parametrize("frozen", [False, True], ids=["batch", "frozen"])
@pytest.mark.parametrize("value", NONFINITE)
def test_of_the_stem(backend: str, frozen: bool, value: float) -> None:
    block = make_block(growths=(), tail="avgpool", frozen=(0,) if frozen else ())
    assert block.tail is not None
    norm = block.tail.norm
    with torch.no_grad():
        block.input[1, 2, 3, 4] = value
    leaves = block.leaves()
    output, plain = stem_norm_relu_maxpool(block.input, norm), plain_stem(block.input, norm)
    assert torch.equal(output.isfinite(), plain.isfinite())
    assert_nothing_hidden(
        torch.autograd.grad(output.sum(), leaves), torch.autograd.grad(plain.sum(), leaves)
    )
