"""Networks unpickled from files of old versions, whose modules lack what came later."""

from __future__ import annotations

import copy

import pytest
import torch
from library_networks import LIBRARIES, assert_same_step, images, make
from torch import nn

from densenet_fast import convert, fusion_report
from densenet_fast.memory import estimate
from densenet_fast.modules.densenet import EfficientDenseNet

LATER = ["ceil_mode", "divisor_override", "drop_rate", "padding_mode", "return_indices"]
LATER += ["track_running_stats"]


def without(network: nn.Module, names: list[str]) -> int:
    """Delete the settings from every module, and say how many there were."""
    modules = [m for m in network.modules() if m is not network]
    found = [(module, name) for module in modules for name in names if name in vars(module)]
    for module, name in found:
        delattr(module, name)
    return len(found)


@pytest.mark.parametrize("name", [*LATER, "all"])
@pytest.mark.parametrize("library", ["densenet_fast", *LIBRARIES])
def test_missing_settings_have_their_old_default(library: str, name: str) -> None:
    if library == "densenet_fast":
        torch.manual_seed(0)
        network: nn.Module = EfficientDenseNet(8, (2, 3), 16, num_classes=5).double()
    else:
        network = make(library)
    reference = copy.deepcopy(network)
    if library != "densenet_fast":
        convert(network)
    deleted = without(network, LATER if name == "all" else [name])
    assert deleted > 0 or (library, name) == ("monai", "drop_rate")
    assert fusion_report(network).all_fused
    if library == "densenet_fast":
        assert estimate(network, images().shape).peak > 0
    for training in (True, False):
        assert_same_step(network.train(training), reference.train(training), images())


def test_other_poolings_without_their_settings() -> None:
    network = EfficientDenseNet(8, (2, 3), 16, num_classes=5)
    network.features.pool0 = nn.MaxPool2d([3, 3], dilation=2)
    network.features.transition1.pool = nn.AvgPool2d(3)
    without(network, LATER)
    report = fusion_report(network)
    reason = "the pooling has stride=[3, 3], not that of a 3×3 maximum of stride 2"
    assert report["features.norm0"].reason == reason
    reason = "pool has kernel_size=3, not that of a plain 2×2 average"
    assert report["features.transition1"].reason == reason
    network.features.transition1.pool = nn.AvgPool2d([2, 2])
    assert fusion_report(network)["features.transition1"].fused
