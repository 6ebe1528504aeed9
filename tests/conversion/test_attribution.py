"""What attribution and privacy tools do with a network: hooks everywhere, gradients per sample."""

from __future__ import annotations

from typing import Any

import library_networks
import pytest
import torch
from comparison import assert_close, assert_same_gradients, networks
from torch import Tensor, nn
from torch.nn.utils._per_sample_grad import call_for_per_sample_grads

from densenet_fast import convert, revert

IMAGES = (2, 3, 32, 32)


def test_full_backward_hooks_work_at_every_submodule() -> None:
    """torchvision's own ReLUs, which work in place, raise here."""
    expected, ours = networks()
    seen: set[str] = set()
    for name, module in ours.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    images = torch.randn(IMAGES, dtype=torch.float64, requires_grad=True)
    for network in (expected, ours):
        network(images).square().sum().backward()
    assert_same_gradients(ours, expected)
    assert seen == {name for name, _ in ours.named_modules()}


@pytest.mark.parametrize("library", library_networks.LIBRARIES)
def test_full_backward_hooks_work_in_converted_networks_without_relus_in_place(
    library: str,
) -> None:
    expected, converted = (library_networks.make(library).double() for _ in range(2))
    before = [module.inplace for module in converted.modules() if isinstance(module, nn.ReLU)]
    convert(converted, inplace_relu=False)
    images = library_networks.images().double()
    fused = converted(images)
    seen: set[str] = set()
    for name, module in converted.named_modules():
        module.register_full_backward_hook(lambda *_, name=name: seen.add(name))
    for network in (expected, converted):
        scores = network(images.clone().requires_grad_())
        assert_close(scores, fused, "scores")
        scores.square().sum().backward()
    assert_same_gradients(converted, expected)
    assert {name for name, module in converted.named_modules() if not [*module.children()]} <= seen
    revert(converted)
    after = [module.inplace for module in converted.modules() if isinstance(module, nn.ReLU)]
    assert after == before


def test_relus_in_place_are_a_flag() -> None:
    network = networks()[0]
    with pytest.raises(TypeError, match="inplace_relu must be"):
        convert(network, inplace_relu="no")  # type: ignore[arg-type]


def grad_cam(network: nn.Module, target: str, images: Tensor) -> Tensor:
    """Selvaraju et al. 2017, equations 1 and 2, from what a forward hook holds."""
    held: list[Tensor] = []
    handle = network.get_submodule(target).register_forward_hook(
        lambda module, args, output: held.append(output)
    )
    scores = network(images)
    handle.remove()
    (gradient,) = torch.autograd.grad(scores[:, 1].sum(), held[0])
    weights = gradient.mean((2, 3), keepdim=True)
    return (weights * held[0]).sum(1).relu()


@pytest.mark.parametrize(
    "target", ["conv0", "denseblock2.denselayer2.conv2", "transition1", "denseblock1"]
)
def test_maps_are_torchvisions(target: str) -> None:
    target = f"features.{target}"
    expected, ours = networks()
    images = torch.randn(IMAGES, dtype=torch.float64)
    assert_close(grad_cam(ours, target, images), grad_cam(expected, target, images), target)


def test_torchvisions_maps_at_its_last_norm_are_of_another_tensor() -> None:
    """Its ReLU, behind the norm, writes into what the hook holds; ours does not."""
    expected, ours = networks()
    images = torch.randn(IMAGES, dtype=torch.float64)
    held: list[Tensor] = []
    for network in (expected, ours):
        norm: Any = network.features.norm5
        norm.register_forward_hook(lambda module, args, output: held.append(output))
        network(images)
    assert (held[0] >= 0).all()
    assert (held[1] < 0).any()
    assert_close(held[1].relu(), held[0], "features")


@pytest.mark.parametrize("converted", [False, True])
def test_gradients_per_sample(converted: bool) -> None:
    """Networks without batch statistics, as these need: group norms stand for theirs."""
    expected, ours = networks()
    if converted:
        ours = networks()[0]
        convert(ours)
    for network in (expected, ours):
        for module in list(network.modules()):
            for name, part in module.named_children():
                if isinstance(part, nn.BatchNorm2d):
                    setattr(module, name, nn.GroupNorm(1, part.num_features).double())
                elif isinstance(part, nn.ReLU):
                    part.inplace = False
    # Fewer than 32 images fail in PyTorch's own code, in torchvision's network too.
    images = torch.randn(32, 3, 32, 32, dtype=torch.float64)
    for network in (expected, ours):
        call_for_per_sample_grads(network)(images).square().sum().backward()
    found = dict(ours.named_parameters())
    for name, parameter in expected.named_parameters():
        assert_close(found[name].grad_sample, parameter.grad_sample, name, floor=1e-3)
