"""Which bottlenecks are held: as many as cost no peak, and without any effect on results."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import pytest
import torch
from block_cases import TAILS, make_block
from comparison import SMALL
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from densenet_fast.blocks.dense_block import CHECKPOINT_MODES, dense_block
from densenet_fast.blocks.memory_plan import (
    BlockSize,
    DoesNotFitError,
    HeadSize,
    NetworkSize,
    Plan,
    StemSize,
    held_below_peak,
    uniform,
    within_budget,
)
from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.operators import reference
from densenet_fast.operators.backends import use_backend

RECOMPUTING: tuple[Checkpoint, ...] = ("bottleneck", "block")


@st.composite
def networks(draw: st.DrawFn) -> NetworkSize:
    """Blocks of any sizes, larger behind smaller ones too, with anything before and behind them."""
    blocks = []
    for _ in range(draw(st.integers(1, 5))):
        widths = draw(st.lists(st.integers(1, 64), min_size=1, max_size=6))
        channels, growth = draw(st.integers(1, 100)), draw(st.integers(1, 20))
        end = channels + growth * len(widths)
        pixels, output = draw(st.integers(1, 500)), draw(st.integers(0, 5000))
        weights = draw(st.integers(0, 5000))
        lasting = draw(st.sampled_from([0, weights]))
        blocks.append(BlockSize(pixels, channels, end, widths, growth, output, 4, weights, lasting))
    sizes = [draw(st.integers(0, 20000)) for _ in range(4)]
    stem = StemSize(features=sizes[0], pooled=sizes[1], recomputable=draw(st.booleans()))
    return NetworkSize(stem, blocks, HeadSize(sizes[2], sizes[3], sizes[3]))


def one_more(network: NetworkSize, plans: Sequence[Plan], at: int) -> list[Plan] | None:
    """The plans with one bottleneck more held in a block, if there is one."""
    mode, hold = plans[at]
    if hold == len(network.blocks[at].widths):
        return None
    return [*plans[:at], Plan(mode, hold + 1), *plans[at + 1 :]]


@given(networks(), st.data())
def test_no_backward_rises_above_the_peak_without(
    network: NetworkSize, data: st.DataObject
) -> None:
    modes = [data.draw(st.sampled_from(CHECKPOINT_MODES)) for _ in network.blocks]
    nothing = [uniform([block], mode)[0] for block, mode in zip(network.blocks, modes, strict=True)]
    plans = held_below_peak(network, modes)
    assert [plan.mode for plan in plans] == modes
    for block, plan in zip(network.blocks, plans, strict=True):
        assert 0 <= plan.hold <= len(block.widths)
        assert plan.hold == len(block.widths) or plan.mode != "none"
    assert max(network.backwards(plans)) <= max(network.backwards(nothing))


@given(networks(), st.floats(0.3, 3))
def test_what_is_planned_for_a_budget_keeps_to_it(network: NetworkSize, share: float) -> None:
    smallest = min(
        network.peak([Plan(mode, 0) for mode in modes])
        for modes in product(RECOMPUTING, repeat=len(network.blocks))
    )
    budget = int(share * smallest)
    if budget < min(smallest, network.peak(uniform(network.blocks, "none"))):
        with pytest.raises(DoesNotFitError) as caught:
            within_budget(network, budget)
        assert (caught.value.budget, caught.value.needed) == (budget, smallest)
        return
    plans = within_budget(network, budget)
    assert network.peak(plans) <= budget
    repeated = [b.recomputed_products(p) for b, p in zip(network.blocks, plans, strict=True)]
    for at in range(len(plans)):  # and no bottleneck more fits
        if plans[at].mode == "bottleneck" and (more := one_more(network, plans, at)) is not None:
            again = network.blocks[at].recomputed_products(more[at])
            assert again < repeated[at]
            conservative = [Plan(mode, 0) for mode, _ in plans]
            assert max(network.backwards(conservative)) + held_bytes(network, more) > budget


def held_bytes(network: NetworkSize, plans: Sequence[Plan]) -> int:
    return sum(b.bottlenecks(p.hold) for b, p in zip(network.blocks, plans, strict=True))


def test_a_budget_large_enough_recomputes_nothing() -> None:
    blocks = [BlockSize(90, 4, 12, [8, 8], 4, 0, 4, 0, 0)] * 2
    network = NetworkSize(StemSize(features=400, recomputable=True), blocks, HeadSize())
    everything = network.peak(uniform(blocks, "none"))
    assert within_budget(network, everything) == uniform(blocks, "none")
    less = within_budget(network, everything - 1)
    assert less != uniform(blocks, "none")
    assert network.peak(less) < everything


def test_what_does_not_fit_says_by_how_much() -> None:
    network = NetworkSize(StemSize(), [BlockSize(2**20, 4, 12, [8, 8], 4, 0, 4, 0, 0)], HeadSize())
    with pytest.raises(DoesNotFitError, match=r"at least, .* more than the .* budget of 1.0 MiB"):
        within_budget(network, 2**20)


def test_all_are_held_where_nothing_is_recomputed() -> None:
    block = BlockSize(9, 4, 12, [8, 8], 4, 0, 4, 0, 0)
    network = NetworkSize(StemSize(), [block, block], HeadSize())
    assert held_below_peak(network, ["none", "none"]) == [Plan("none", 2)] * 2
    assert held_below_peak(NetworkSize(StemSize(), [], HeadSize()), []) == []


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
    original = reference.conv1x1_forward

    def counted(features: Tensor, *rest: Any) -> None:
        found.append(features.shape[1])
        original(features, *rest)

    with use_backend("reference"), monkeypatch.context() as patch:
        loss = network(torch.randn(2, 3, 32, 32)).sum()
        patch.setattr(reference, "conv1x1_forward", counted)
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
    assert second == [16, 16, 16, *first]
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
    network.features.denseblock3.checkpoint = "block"  # the plan knows a mixture of modes
    assert recomputed(network, monkeypatch) == [2, 2, 8, 8]
    network = EfficientDenseNet(**SMALL)
    for module in (network.features[:4], network.features.denseblock1):
        module.requires_grad_(False)
    assert recomputed(network, monkeypatch) == everywhere[:5]
