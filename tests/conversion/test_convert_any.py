"""A converted network of any shape, mode and state takes the step that it took before."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from library_networks import assert_same_step, images
from torch import nn

import densenet_fast

models = pytest.importorskip("torchvision.models")


@settings(max_examples=60, deadline=None)
@given(
    library=st.sampled_from(["torchvision", "monai", "torchxrayvision", "timm"]),
    growth=st.integers(1, 6),
    blocks=st.lists(st.integers(1, 3), min_size=1, max_size=3),
    checkpoint=st.sampled_from(["none", "bottleneck", "block"]),
    frozen=st.lists(st.integers(0, 30), max_size=3),
    hooked=st.lists(st.integers(0, 30), max_size=2),
    size=st.integers(16, 40),
    seed=st.integers(0, 99),
)
@example("torchvision", 4, [1, 3, 3], "none", [3, 6], [7], 16, 21)  # variances of 1e-5
def test_any_network_step_is_the_same(
    library: str,
    growth: int,
    blocks: list[int],
    checkpoint: Any,
    frozen: list[int],
    hooked: list[int],
    size: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    config = tuple(blocks)
    model: nn.Module
    if library == "torchvision":
        model = models.DenseNet(growth, config, 4, bn_size=2, num_classes=3)
    elif library == "monai":
        nets = pytest.importorskip("monai.networks.nets")
        model = nets.DenseNet(2, 3, 3, 4, growth, config, 2)
    elif library == "timm":
        densenet = pytest.importorskip("timm.models.densenet")
        model = densenet.DenseNet(growth, config, num_classes=3, bn_size=2)
    else:
        xrv = pytest.importorskip("torchxrayvision.models")
        model = xrv.DenseNet(growth, config, 4, 2, num_classes=3, in_channels=3)
    model.double()
    modules = list(model.modules())
    for index in frozen:
        modules[index % len(modules)].eval()
    for index in hooked:
        modules[index % len(modules)].register_forward_hook(lambda module, args, output: None)
    reference = copy.deepcopy(model)
    densenet_fast.convert(model, checkpoint=checkpoint)
    assert_same_step(model, reference, images(seed, (2, 3, size, size)))
