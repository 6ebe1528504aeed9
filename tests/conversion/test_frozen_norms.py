"""Frozen norms of torchvision and timm, which are no batch norms, run fused as if they were."""

from __future__ import annotations

import copy

import pytest
import torch
from form_networks import FORMS
from library_networks import TOLERANCE, assert_same_step, images, make
from torch import nn

from densenet_fast import convert, fusion_report, optimize_for_inference

norm_act = pytest.importorskip("timm.layers.norm_act")
misc = pytest.importorskip("torchvision.ops.misc")

NETWORKS = ("torchvision", "timm", "monai", "torchxrayvision", "newest first", "units")


def frozen(name: str) -> tuple[nn.Module, torch.Tensor]:
    """A network whose norms have become frozen ones, with running statistics of some images."""
    torch.manual_seed(0)
    network = FORMS[name]().double() if name in FORMS else make(name)
    x = images(shape=(3, 3, 8, 8) if name in FORMS else (3, 3, 32, 32))
    network(x)
    return norm_act.freeze_batch_norm_2d(network), x


@pytest.mark.parametrize("name", NETWORKS)
def test_a_step_is_the_same(name: str) -> None:
    network, x = frozen(name)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in network.modules())
    reference = copy.deepcopy(network)
    assert convert(network).complete
    assert fusion_report(network).all_fused, str(fusion_report(network))
    assert_same_step(network, reference, x)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["torchvision", "timm"])
def test_compiled_and_for_inference(name: str) -> None:
    network, x = frozen(name)
    reference = copy.deepcopy(network)
    convert(network)
    graph = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert_same_step(graph, reference, x)
    actual = optimize_for_inference(network)(x)
    torch.testing.assert_close(actual, reference(x), rtol=TOLERANCE, atol=TOLERANCE)


def test_one_value_per_channel_is_enough() -> None:
    network, _ = frozen("torchvision")
    block = network.features.denseblock2
    reference = copy.deepcopy(block)
    convert(block)
    one = torch.randn(1, block.denselayer1.conv1.in_channels, 1, 1, dtype=torch.float64)
    torch.testing.assert_close(block(one), reference(one), rtol=TOLERANCE, atol=TOLERANCE)


def test_a_frozen_norm_of_a_class_of_ones_own_is_called() -> None:
    class Ours(misc.FrozenBatchNorm2d):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    network, x = frozen("torchvision")
    network.features.denseblock1.denselayer2.norm1.__class__ = Ours
    reference = copy.deepcopy(network)
    convert(network)
    report = fusion_report(network)
    row = report["features.denseblock1.denselayer2"]
    assert row.reason == "norm1 is a Ours, not a BatchNorm2d"
    assert [other.name for other in report if not other.fused] == [row.name]
    assert_same_step(network, reference, x)
