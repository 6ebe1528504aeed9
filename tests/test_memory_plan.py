"""Which bottlenecks are held: as many as cost no peak, and without any effect on results."""

from __future__ import annotations

import pytest
import torch
from block_cases import TAILS, make_block
from comparison import SMALL
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densenet_fast import ops
from densenet_fast.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.memory_plan import BlockSize, held_bottlenecks
from densenet_fast.model import EfficientDenseNet
from densenet_fast.specs import Checkpoint

RECOMPUTING: tuple[Checkpoint, ...] = ("bottleneck", "block")


@st.composite
def chains(draw: st.DrawFn) -> list[BlockSize]:
    """Blocks of any sizes, larger behind smaller ones too."""
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        widths = draw(st.lists(st.integers(1, 64), min_size=0, max_size=6))
        channels, growth = draw(st.integers(1, 100)), draw(st.integers(1, 20))
        end = channels + growth * len(widths)
        pixels, output = draw(st.integers(1, 500)), draw(st.integers(0, 5000))
        weights = draw(st.integers(0, 5000))
        lasting = draw(st.sampled_from([0, weights]))
        blocks.append(BlockSize(pixels, channels, end, widths, growth, output, weights, lasting))
    return blocks


def moments(blocks: list[BlockSize], held: list[int], mode: Checkpoint) -> list[int]:
    """Elements alive in the backward of each block, with the last `held` bottlenecks held."""
    extra = [
        block.pixels * sum(block.widths[len(block.widths) - count :])
        for block, count in zip(blocks, held, strict=True)
    ]
    found = []
    for at, block in enumerate(blocks):
        kept = sum(earlier.kept(mode) for earlier in blocks[: at + 1])
        kept += sum(later.lasting for later in blocks[at + 1 :])
        bottlenecks = extra[at] if mode == "block" else sum(extra[: at + 1])
        found.append(kept + bottlenecks + block.backward(mode))
    return found


@given(chains(), st.sampled_from(RECOMPUTING))
def test_no_backward_rises_above_the_peak_without(
    blocks: list[BlockSize], mode: Checkpoint
) -> None:
    held = held_bottlenecks(blocks, mode)
    assert all(0 <= count <= len(block.widths) for block, count in zip(blocks, held, strict=True))
    peak = max(moments(blocks, [0] * len(blocks), mode))
    assert max(moments(blocks, held, mode)) == peak
    for at, block in enumerate(blocks):  # and one more anywhere would
        if held[at] < len(block.widths):
            more = [*held[:at], held[at] + 1, *held[at + 1 :]]
            assert max(moments(blocks, more, mode)) > peak


def test_all_are_held_where_nothing_is_recomputed() -> None:
    block = BlockSize(9, 4, 12, [8, 8], 4, 0, 0, 0)
    assert held_bottlenecks([block, block], "none") == [2, 2]
    assert held_bottlenecks([], "bottleneck") == []


@pytest.mark.parametrize("checkpoint", RECOMPUTING)
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_results_do_not_depend_on_what_is_held(
    backend: str, checkpoint: Checkpoint, tail: str | None, dropout: float
) -> None:
    results: list[list[Tensor]] = []
    for hold in range(4):
        torch.manual_seed(0)
        block = make_block(
            (2, 5, 6, 7), [3, 2, 4], tail, width=6, dtype=torch.float32, dropout=dropout
        )
        output = dense_block(
            block.input, block.layers, tail=block.tail, checkpoint=checkpoint, hold=hold
        )
        (output * torch.arange(output.numel()).view(output.shape).cos()).sum().backward()
        gradients = [leaf.grad for leaf in block.leaves()]
        assert all(gradient is not None for gradient in gradients)
        results.append([output, *(gradient for gradient in gradients if gradient is not None)])
    for held in results[1:]:
        for one, other in zip(results[0], held, strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("hold", [-1, 4])
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
def test_more_than_there_are_cannot_be_held(hold: int, checkpoint: Checkpoint) -> None:
    block = make_block((2, 5, 6, 7), [3, 2, 4], None, width=6, dtype=torch.float32)
    with pytest.raises(ValueError, match=f"number of layers, 3, got {hold}"):
        dense_block(block.input, block.layers, checkpoint=checkpoint, hold=hold)


def recomputed(network: EfficientDenseNet, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Pixels of the images of every 1x1 convolution that a backward makes again."""
    found: list[int] = []
    loss = network(torch.randn(2, 3, 32, 32)).sum()
    original = ops.conv1x1_forward

    def counted(features: Tensor, *rest: Tensor | None) -> None:
        found.append(features.shape[1])
        original(features, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(ops, "conv1x1_forward", counted)
        loss.backward()
    return found


def test_networks_recompute_where_the_step_is_fullest(monkeypatch: pytest.MonkeyPatch) -> None:
    network = EfficientDenseNet(**SMALL)
    assert recomputed(network, monkeypatch) == [8, 8]  # the first block's two layers
    network.checkpoint = "block"
    assert recomputed(network, monkeypatch) == [2, 2, 4, 4, 4, 8, 8, 8, 8]
    network.checkpoint = "none"
    assert recomputed(network, monkeypatch) == []


def test_room_under_the_gradients_that_the_step_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    network = EfficientDenseNet(8, (3, 8, 2), 8, bn_size=2, small_inputs=True)
    first = recomputed(network, monkeypatch)
    assert first == [16, 16, 32, 32, 32]
    second = recomputed(network, monkeypatch)  # gradients exist by now
    assert second == [16, 16, *first]
    network.zero_grad()
    assert recomputed(network, monkeypatch) == first
    for parameter in network.parameters():
        parameter.grad = None
        parameter.register_post_accumulate_grad_hook(lambda parameter: None)
    assert recomputed(network, monkeypatch) == second


def test_nothing_is_held_where_the_plan_does_not_know_the_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    everywhere = [2, 2, 4, 4, 4, 8, 8]
    network = EfficientDenseNet(**SMALL)
    network.features.denseblock2.denselayer2.register_forward_hook(lambda *_: None)
    assert recomputed(network, monkeypatch) == [2, 2, 4, 4, 4, 8, 8]
    network = EfficientDenseNet(**SMALL)
    network.features.denseblock3.checkpoint = "block"
    assert recomputed(network, monkeypatch) == [2, 2, *everywhere]
    network = EfficientDenseNet(**SMALL)
    for module in (network.features[:4], network.features.denseblock1):
        module.requires_grad_(False)
    assert recomputed(network, monkeypatch) == everywhere[:5]
