"""DenseLayer, DenseBlock and Transition alone in other networks."""

from __future__ import annotations

import copy

import pytest
import torch
from comparison import assert_close, assert_same_gradients, assert_same_steps, blocks, shake, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.densenet import _DenseLayer, _Transition

from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition

MODES = ("none", "bottleneck", "block")


class Concatenated(nn.Module):
    """torchvision's layer with its input in front of its output, and `k` times as many outputs."""

    def __init__(self, c: int, growth: int, bn_size: int, drop_rate: float, k: int = 1) -> None:
        super().__init__()
        self.layer = _DenseLayer(c, growth, bn_size, drop_rate)
        self.layer.conv2 = nn.Conv2d(growth * bn_size, k * growth, 3, padding=1, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat((input, self.layer(input)), 1)


class Alone(nn.Module):
    """Our layer under the same names as in `Concatenated`."""

    def __init__(self, layer: DenseLayer) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, input: Tensor) -> Tensor:
        return self.layer(input)


def layers(c: int, growth: int, bn_size: int, k: int = 1) -> tuple[nn.Module, nn.Module]:
    expected = Concatenated(c, growth, bn_size, 0.0, k).double()
    shake(expected)
    ours = Alone(DenseLayer(c, growth, bn_size, 0.0, k)).double()
    ours.load_state_dict(expected.state_dict())
    return expected, ours


def transitions(c: int, out: int) -> tuple[nn.Module, Transition]:
    expected = _Transition(c, out).double()
    shake(expected)
    ours = Transition(c, out).double()
    ours.load_state_dict(expected.state_dict())
    return expected, ours


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("k", [1, 3])
def test_layer(k: int, train: bool) -> None:
    pair = layers(5, 4, 2, k)
    for part in pair:
        part.train(train)
    assert pair[1](torch.randn(2, 5, 6, 7, dtype=torch.float64)).shape == (2, 5 + 4 * k, 6, 7)
    pair = layers(5, 4, 2, k)
    assert_same_steps(pair, (2, 5, 6, 7))


def test_layer_has_torchvisions_names() -> None:
    assert list(DenseLayer(6, 4, 2, 0.0).state_dict()) == list(_DenseLayer(6, 4, 2, 0).state_dict())


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("size", [(2, 5, 6, 8), (1, 5, 7, 3), (3, 5, 2, 2)], ids=str)
def test_transition(size: tuple[int, ...], train: bool) -> None:
    pair = transitions(5, 3)
    for part in pair:
        part.train(train)
    assert_same_steps(pair, size)


def test_transition_leaves_its_input_alone() -> None:
    """Even where the ReLU would work in place on it."""
    transition = Transition(4, 2)
    transition.norm = nn.Identity()
    images = torch.randn(2, 4, 4, 4)
    before = images.clone()
    transition(images)
    assert torch.equal(images, before)


@pytest.mark.parametrize("first", [nn.Identity(), nn.ReLU(inplace=True)], ids=str)
def test_layer_leaves_its_input_alone(first: nn.Module) -> None:
    layer = DenseLayer(4, 2, 2, 0.0)
    layer.norm1 = first
    images = torch.randn(2, 4, 4, 4)
    before = images.clone()
    output = layer(images)
    assert torch.equal(images, before)
    assert torch.equal(output[:, :4], before)


@given(
    num_layers=st.integers(1, 4),
    channels=st.integers(1, 9),
    bn_size=st.integers(1, 4),
    growth=st.integers(1, 9),
    n=st.integers(1, 3),
    h=st.integers(1, 7),
    w=st.integers(2, 7),
    checkpoint=st.sampled_from(MODES),
    train=st.booleans(),
)
@settings(max_examples=40, derandomize=True)
def test_block_of_any_shape(
    num_layers: int,
    channels: int,
    bn_size: int,
    growth: int,
    n: int,
    h: int,
    w: int,
    checkpoint: str,
    train: bool,
) -> None:
    pair = blocks(num_layers, channels, bn_size, growth, checkpoint=checkpoint)
    for part in pair:
        part.train(train)
    # With two values per channel every normalised value is ±1 but for eps, and gradients cancel.
    if train and n * h * w < 4:
        n += 3
    assert_same_steps(pair, (n, channels, h, w), steps=1)


@given(
    k=st.integers(1, 3),
    channels=st.integers(1, 9),
    bn_size=st.integers(1, 4),
    growth=st.integers(1, 5),
    h=st.integers(2, 7),
    w=st.integers(2, 7),
)
@settings(max_examples=15, derandomize=True)
def test_layer_of_any_shape(
    k: int, channels: int, bn_size: int, growth: int, h: int, w: int
) -> None:
    assert_same_steps(layers(channels, growth, bn_size, k), (2, channels, h, w), steps=1)


@given(
    c=st.integers(1, 12),
    out=st.integers(1, 12),
    n=st.integers(1, 3),
    h=st.integers(2, 9),
    w=st.integers(2, 9),
)
@settings(max_examples=15, derandomize=True)
def test_transition_of_any_shape(c: int, out: int, n: int, h: int, w: int) -> None:
    assert_same_steps(transitions(c, out), (n, c, h, w), steps=1)


def test_layers_emitting_different_growths_in_one_block() -> None:
    """A block's layers may be exchanged for wider ones: they still run as one."""
    expected, ours = nn.Sequential(), DenseBlock(3, 4, 2, 2, 0.0).double()
    channels = 4
    for i, k in enumerate((1, 3, 2)):
        pair = layers(channels, 2, 2, k)
        expected.append(pair[0])
        ours[f"denselayer{i + 1}"] = pair[1].layer
        channels += 2 * k
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    actual, actual_grad = step(ours, images)
    wanted, wanted_grad = step(expected, images)
    assert_close(actual, wanted, "output")
    assert_close(actual_grad, wanted_grad, "input gradient")
    for mine, theirs in zip(ours.parameters(), expected.parameters(), strict=True):
        assert_close(mine.grad, theirs.grad, "gradient")


def test_block_reused_in_one_network() -> None:
    expected, ours = blocks(2, 4, 2, 3)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for part in (expected, ours):
        first = part(images)
        second = part(first[:, 6:])
        (first[:, :4].square().sum() + second.square().sum()).backward()
    assert_same_gradients(ours, expected)


def test_output_may_be_used_twice() -> None:
    expected, ours = blocks(2, 4, 2, 3)
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    for part in (expected, ours):
        output = part(images)
        (output.square().sum() + output[:, 3:].sin().sum()).backward()
    assert_same_gradients(ours, expected)


@pytest.mark.parametrize("p", [0.2, 0.5])
def test_dropout_keeps_the_expected_share_and_mean(p: float) -> None:
    torch.manual_seed(0)
    block = DenseBlock(1, 4, 2, 8, p)
    images = torch.randn(4, 4, 32, 32)
    dropped = block(images)[:, 4:]
    block["denselayer1"].drop_rate = 0.0
    whole = block(images)[:, 4:]
    kept = dropped != 0
    count = dropped.numel()
    assert abs(kept.double().mean().item() - (1 - p)) < 5 * (p * (1 - p) / count) ** 0.5
    torch.testing.assert_close(dropped[kept], (whole / (1 - p))[kept])
    for other in (1, 2, 3):  # neighbours are independent
        together = (kept & kept.roll(1, other)).double().mean().item()
        assert abs(together - (1 - p) ** 2) < 5 * (0.25 / count) ** 0.5


@pytest.mark.parametrize("checkpoint", MODES)
def test_gradients_belong_to_the_dropped_forward(checkpoint: str) -> None:
    """Finite differences under a fixed seed."""
    block = DenseBlock(2, 3, 2, 2, 0.4, checkpoint=checkpoint).double()
    shake(block)

    def run(images: Tensor) -> Tensor:
        torch.manual_seed(7)
        return block(images)

    images = torch.randn(2, 3, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (images,))


def test_memory_efficient_false_keeps_everything() -> None:
    assert DenseBlock(1, 4, 2, 3, 0.0).checkpoint == "bottleneck"
    assert DenseBlock(1, 4, 2, 3, 0.0, False).checkpoint == "none"
    assert DenseLayer(4, 3, 2, 0.0, 1, False).checkpoint == "none"
    assert "checkpoint='block'" in repr(DenseLayer(4, 3, 2, 0.0, checkpoint="block"))


def test_block_is_a_dictionary_of_layers() -> None:
    block = DenseBlock(2, 4, 2, 3, 0.0)
    assert list(block) == ["denselayer1", "denselayer2"]
    assert block["denselayer2"].norm1.num_features == 7
    copied = copy.deepcopy(block)
    assert copied["denselayer1"] is not block["denselayer1"]


def test_nothing_is_kept_without_gradients() -> None:
    block = DenseBlock(2, 4, 2, 3, 0.0)
    with torch.no_grad():
        assert block(torch.randn(2, 4, 5, 5)).grad_fn is None
    block.requires_grad_(False)
    assert block(torch.randn(2, 4, 5, 5)).grad_fn is None
