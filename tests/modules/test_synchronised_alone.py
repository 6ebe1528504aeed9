"""Synchronised norms in a single process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from block_cases import make_block
from processes import group_of_one, needs_gloo
from test_distributed_synchronised import converted, made

from densenet_fast import fusion_report
from densenet_fast.blocks.dense_block import dense_block
from densenet_fast.modules.layers import DenseBlock

pytestmark = needs_gloo


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("initialised", [True, False])
def test_alone_like_other_norms(training: bool, initialised: bool) -> None:
    """No process group, or one of a single rank: bitwise what BatchNorm2d gives."""
    expected, ours = (made(lambda net: net.train(training), torch.float32) for _ in range(2))
    ours = converted(ours)
    images = torch.randn(2, 3, 32, 32)

    def run() -> None:
        assert fusion_report(ours).all_fused
        actual, wanted = ours(images), expected(images)
        assert torch.equal(actual, wanted)
        actual.sum().backward()
        wanted.sum().backward()
        for mine, other in zip(ours.parameters(), expected.parameters(), strict=True):
            assert torch.equal(mine.grad, other.grad)
        for mine, other in zip(ours.buffers(), expected.buffers(), strict=True):
            assert torch.equal(mine, other)

    if initialised:
        with group_of_one():
            run()
    else:
        run()


def test_one_value_alone() -> None:
    block = converted(DenseBlock(1, 3, 2, 4, 0.0))
    message = r"Expected more than 1 value per channel when training, got input size .*1, 3, 1, 1"
    with group_of_one(), pytest.raises(ValueError, match=message):
        block(torch.randn(1, 3, 1, 1))


def test_groups_within_a_block() -> None:
    """Callers of the functional block are told what cannot be mixed, before anything runs."""
    block = make_block(growths=(3, 4))
    before = block.buffers()
    with group_of_one():
        group: Any = dist.group.WORLD
        first = block.layers[0]._replace(
            norm1=block.layers[0].norm1._replace(group=group.group_name)
        )
        with pytest.raises(ValueError, match=r"the same process group, .* got 2 different ones"):
            dense_block(block.input, [first, block.layers[1]])
        frozen = first.norm1._replace(batch_statistics=False)
        with pytest.raises(ValueError, match="should use the batch's statistics"):
            dense_block(block.input, [first._replace(norm1=frozen)])
    for actual, wanted in zip(block.buffers(), before, strict=True):
        assert torch.equal(actual, wanted)
