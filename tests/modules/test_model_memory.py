"""What a network keeps between forward and backward, and that nothing outlives a step."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from comparison import SMALL, assert_close, assert_same_steps, both, networks
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from densenet_fast.blocks.specs import Checkpoint
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.operators.rows import channels_last_format

SIZE = (2, 3, 32, 32)


def kept_images(network: nn.Module, images: Tensor) -> list[tuple[int, ...]]:
    """Shapes [N, C, H, W] of all that a forward keeps for its backward, besides the parameters."""
    known = {tensor.data_ptr() for tensor in (*network.parameters(), *network.buffers(), images)}
    found: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.dim() == 4 and tensor.data_ptr() not in known:
            found[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = network(images)
    assert output.requires_grad
    stored = {tensor.untyped_storage().data_ptr() for tensor in found.values()}
    assert len(stored) == len(found)
    for tensor in found.values():
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return sorted(tuple(tensor.shape) for tensor in found.values())


STEM = [(2, 8, 8, 6)]  # positions of the maxima, one byte each
STEM_CONVOLUTION = [
    (6, 3, 7, 7),  # its weight with the channels innermost
    (2, 6, 16, 16),  # its output
]
FEATURES = [(2, 14, 8, 8), (2, 19, 4, 4), (2, 17, 2, 2)]
INPUTS = [(2, 6, 8, 8), (2, 7, 4, 4), (2, 9, 2, 2)]
BOTTLENECKS = [*[(2, 8, 8, 8)] * 2, *[(2, 4, 4, 8)] * 3, *[(2, 2, 2, 8)] * 2]


@pytest.mark.parametrize(
    ("checkpoint", "kept"),
    [
        ("none", STEM_CONVOLUTION + FEATURES + BOTTLENECKS),
        ("bottleneck", FEATURES + BOTTLENECKS[2:]),  # the first block's step is the fullest
        ("block", INPUTS),
    ],
)
def test_kept_between_forward_and_backward(checkpoint: str, kept: list[tuple[int, ...]]) -> None:
    network = EfficientDenseNet(**SMALL, checkpoint=checkpoint)
    assert kept_images(network, torch.randn(SIZE)) == sorted(STEM + kept)


def live_tensors() -> list[Tensor]:
    gc.collect()
    return [thing for thing in gc.get_objects() if issubclass(type(thing), Tensor)]


@pytest.mark.parametrize("checkpoint", ["none", "bottleneck", "block"])
def test_nothing_outlives_a_step(checkpoint: str) -> None:
    network = EfficientDenseNet(**SMALL, checkpoint=checkpoint)
    images = torch.randn(SIZE)

    def step() -> None:
        network(images).sum().backward()
        with torch.no_grad():
            network.eval()(images)
        network.train()

    step()
    step()  # looking at the gradients of the first makes Python objects of them
    before = live_tensors()  # held: what earlier tests left might die meanwhile
    step()
    assert len(live_tensors()) == len(before)


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
def test_nothing_between_the_modules_is_held(train: bool) -> None:
    """Outputs of modules on the way die when the module behind them is done."""
    network = EfficientDenseNet(**SMALL).train(train)
    alive: list[weakref.ref[Tensor]] = []
    dead_then: list[bool] = []
    network.features.conv0.register_forward_hook(
        lambda module, args, output: alive.append(weakref.ref(output))
    )
    network.features.denseblock2.register_forward_pre_hook(
        lambda module, args: dead_then.append(alive[0]() is None)
    )
    with torch.set_grad_enabled(train):
        output = network(torch.randn(SIZE))
    assert dead_then == [not train]  # in training, autograd keeps it for the norm's backward
    del output
    assert alive[0]() is None


def conv0_of(network: nn.Module) -> nn.Conv2d:
    return network.features.conv0


@pytest.mark.parametrize("small_inputs", [False, True])
def test_first_convolution_feeds_fused_steps_without_a_copy(small_inputs: bool) -> None:
    expected, ours = networks(small_inputs=small_inputs)
    ours.checkpoint = "none"  # otherwise the stem makes the convolution itself
    seen: list[bool] = []
    original = conv0_of(ours)._conv_forward

    def watched(input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = original(input, weight, bias)
        seen.append(output.is_contiguous(memory_format=torch.channels_last))
        return output

    conv0_of(ours)._conv_forward = watched  # type: ignore[method-assign]
    assert_same_steps((expected, ours), SIZE)
    assert seen == [True, True]
    assert conv0_of(ours).weight.is_contiguous()


def own_forward(conv: nn.Conv2d) -> None:
    conv.forward = lambda input: 2 * nn.functional.conv2d(input, conv.weight, None, 2, 3)


CHANGES: dict[str, Callable[[nn.Conv2d], object]] = {
    "forward hook": lambda conv: conv.register_forward_hook(lambda m, args, output: 2 * output),
    "backward hook": lambda conv: conv.register_full_backward_hook(lambda m, gi, go: None),
    "weight_norm": parametrizations.weight_norm,
    "padding": lambda conv: setattr(conv, "padding_mode", "circular"),
    "own forward": own_forward,
    "bias": lambda conv: conv.register_parameter(
        "bias", nn.Parameter(torch.linspace(-1, 1, 6, dtype=torch.float64))
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_first_convolutions_that_differ(name: str) -> None:
    pair = networks()
    both(pair, lambda network: CHANGES[name](conv0_of(network)))
    assert_same_steps(pair, SIZE)


def test_first_convolution_of_another_kind() -> None:
    pair = networks()

    def change(network: nn.Module) -> None:
        torch.manual_seed(0)
        network.features.conv0 = nn.Conv2d(3, 6, 5, padding="same").double()

    both(pair, change)
    assert_same_steps(pair, SIZE)


def test_evaluation_without_gradients_matches_that_with_them() -> None:
    _, ours = networks()
    images = torch.randn(SIZE, dtype=torch.float64)
    ours.eval()
    wanted = ours(images)
    with torch.no_grad():
        assert_close(ours(images), wanted, "no_grad")
    with torch.inference_mode():
        assert_close(ours(images), wanted, "inference_mode")


@pytest.mark.parametrize("checkpoint", ["none", "block"])
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_autograd_takes_the_gradients_of_weights_without_a_copy(
    checkpoint: Checkpoint, dims: int, layout: torch.memory_format
) -> None:
    if layout is torch.channels_last:
        layout = channels_last_format(dims + 2)
    network = EfficientDenseNet(
        4, (2, 1), 8, spatial_dims=dims, num_classes=3, checkpoint=checkpoint
    )
    network.to(memory_format=layout)
    arrived: dict[str, int] = {}
    for name, parameter in network.named_parameters():
        parameter.register_hook(
            lambda gradient, name=name: arrived.update({name: gradient.data_ptr()})
        )
    network(torch.randn(2, 3, *(32,) * dims)).sum().backward()
    named = dict(network.named_parameters())
    assert arrived.keys() == named.keys()
    for name, parameter in named.items():
        assert parameter.grad is not None
        if name != "features.conv0.weight":  # PyTorch's own
            assert parameter.grad.data_ptr() == arrived[name], name
