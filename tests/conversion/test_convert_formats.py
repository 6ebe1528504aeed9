"""What leaves converted modules has the memory format that the library's modules give."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from library_networks import LIBRARIES, images, make
from torch import Tensor

from densenet_fast import convert

PARTS = ("features", "features.denseblock1", "features.transition1", "features.denseblock2")


def format_of(tensor: Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that have any."""
    return tuple(s for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1)


def formatted(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("weights_last", [False, True])
@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", [*LIBRARIES, "torchvision-memory-efficient", "timm-deep"])
def test_outputs(
    name: str, part: str, images_last: bool, weights_last: bool, gradients: bool
) -> None:
    model = make(name).to(memory_format=formatted(weights_last))
    reference = copy.deepcopy(model)
    convert(model)
    module, expected = model.get_submodule(part), reference.get_submodule(part)
    channels = next(module.parameters()).shape[0 if part.startswith("features.") else 1]
    x = images(shape=(2, channels, 32, 48)).contiguous(memory_format=formatted(images_last))
    if name == "torchvision-memory-efficient" and part != "features" and gradients:
        x.requires_grad_()  # without it, the library recomputes nothing
    with torch.set_grad_enabled(gradients):
        assert format_of(module(x)) == format_of(expected(x))


@pytest.mark.parametrize("images_last", [False, True])
@pytest.mark.parametrize("library", LIBRARIES)
def test_hooks(library: str, images_last: bool) -> None:
    """What hooked modules are given and give, of the library's code and of ours."""
    model = make(library)
    reference = copy.deepcopy(model)
    convert(model)
    names = (
        "conv0",
        "pool0",
        "denseblock1",
        "transition1",
        "denseblock2.denselayer2",
        "denseblock2.denselayer3.norm1",
        "norm5",
    )
    if library == "monai":
        names = tuple(name.replace("layer3.", "layer3.layers.") for name in names)
    seen: list[list[tuple[int, ...]]] = [[], []]
    for network, formats in zip((model, reference), seen, strict=True):

        def look(module: Any, args: Any, output: Tensor, to: Any = formats) -> None:
            given = args[0] if isinstance(args[0], list) else [args[0]]
            to.extend(format_of(tensor) for tensor in (*given, output))

        for name in names:
            network.get_submodule(f"features.{name}").register_forward_hook(look)
        network(images(shape=(2, 3, 64, 96)).contiguous(memory_format=formatted(images_last)))
    assert seen[0] == seen[1]


@pytest.mark.parametrize("library", LIBRARIES)
def test_views_of_features(library: str) -> None:
    model = make(library)
    expected = copy.deepcopy(model).features(images())
    convert(model)
    output = model.features(images())
    torch.testing.assert_close(output.view(len(output), -1), expected.view(len(output), -1))
    assert output[0].view(-1).shape == expected[0].view(-1).shape
    ours, theirs = (x.detach().numpy().ravel("K") for x in (output, expected))
    assert abs(ours - theirs).max() < 1e-11
