"""Modules that stand in several places of one network: each place counts."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from comparison import SMALL, assert_close, assert_same_steps, networks, shake
from torch import nn
from torchvision.models.densenet import DenseNet, _DenseBlock

from densenet_fast.fusion import fusion_report
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock, DenseLayer

MODES = ("none", "bottleneck", "block")


def cumulative(network: nn.Module) -> None:
    for part in network.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.momentum = None


def with_every_stage_twice(network: nn.Module) -> nn.Module:
    """Block and transition run twice, with the same parameters: 6 channels to 12, to 6, to 12."""
    parts = network.features
    stage = OrderedDict(
        [
            ("conv0", parts.conv0),
            ("denseblock1", parts.denseblock1),
            ("transition1", parts.transition1),
            ("again", parts.denseblock1),
            ("transition_again", parts.transition1),
            ("denseblock2", parts.denseblock2),
            ("norm5", parts.norm5),
        ]
    )
    network.features = nn.Sequential(stage)
    return network


@pytest.mark.parametrize("checkpoint", MODES)
def test_block_and_transition_in_two_places(checkpoint: str) -> None:
    shape = {**SMALL, "growth_rate": 2, "block_config": (3, 2)}
    pair = (
        DenseNet(**shape).double(),
        EfficientDenseNet(**shape, checkpoint=checkpoint).double(),
    )
    for network in pair:
        shake(network)
        with_every_stage_twice(network)
        cumulative(network)
    pair[1].load_state_dict(pair[0].state_dict())
    assert_same_steps(pair, (2, 3, 24, 24), steps=3)
    counts = [pair[1].get_buffer(f"features.{name}.num_batches_tracked") for name in COUNTED]
    assert counts == [6, 6, 3]
    assert [row.name for row in fusion_report(pair[1])].count("features.again.denselayer1") == 1


COUNTED = ("denseblock1.denselayer1.norm1", "transition1.norm", "norm5")


def test_layer_in_two_places_of_a_block() -> None:
    class Halved(nn.Module):
        """Halves the channels, so that the layer behind it may be the one before it."""

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features[:, ::2]

    torch.manual_seed(0)
    layer = DenseLayer(4, 4, 2, 0.0)
    block = DenseBlock(1, 4, 2, 4, 0.0)
    block["denselayer1"] = layer
    block["halved"] = Halved()
    block["denselayer2"] = layer
    block.double().eval()
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    assert_close(block(images), layer(layer(images)[:, ::2]), "output")
    assert_close(torch.fx.symbolic_trace(block)(images), block(images), "traced")


def test_one_activation_for_the_whole_network() -> None:
    pair = networks()
    for network in pair:
        shared = nn.ReLU(inplace=True)
        for parent in list(network.modules()):
            for name, part in list(parent.named_children()):
                if isinstance(part, nn.ReLU):
                    setattr(parent, name, shared)
    assert fusion_report(pair[1]).all_fused
    assert_same_steps(pair, (2, 3, 32, 32))


def test_one_pooling_and_activation_for_all_transitions() -> None:
    """Sequences list a module that occurs twice in them twice."""
    pair = networks()
    for network in pair:
        features = network.features
        features.transition2.pool = features.transition1.pool
        features.transition2.relu = features.transition1.relu = features.relu0
    assert fusion_report(pair[1]).all_fused
    assert_same_steps(pair, (2, 3, 32, 32))


def test_convolution_shared_by_two_layers() -> None:
    """Its gradients add up within one node."""
    pair = (_DenseBlock(3, 4, 2, 3, 0.0).double(), DenseBlock(3, 4, 2, 3, 0.0).double())
    for block in pair:
        shake(block)
        block["denselayer3"].conv2 = block["denselayer1"].conv2
        block["denselayer2"].norm2 = block["denselayer1"].norm2
    pair[1].load_state_dict(pair[0].state_dict())
    assert_same_steps(pair, (2, 4, 5, 5))
