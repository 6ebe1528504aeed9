"""Networks of any shape, and the two backends against each other."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from comparison import SMALL, assert_close, assert_same_steps, networks, shake, step
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torchvision.models.densenet import _DenseBlock, _Transition

from densenet_fast.fusion import fusion_report
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.operators.backends import use_backend

MODES = ("none", "bottleneck", "block")


class OfAnyShape(nn.Module):
    """torchvision's blocks and transitions with what its network does not offer."""

    def __init__(self, ours: EfficientDenseNet) -> None:
        """The shapes of `ours`, taken from its parameters."""
        super().__init__()
        parts: OrderedDict[str, nn.Module] = OrderedDict()
        for name, part in ours.features.named_children():
            if name.startswith("denseblock"):
                first = part["denselayer1"]
                width, channels = first.conv1.weight.shape[:2]
                growth = first.conv2.out_channels
                parts[name] = _DenseBlock(len(part), channels, width // growth, growth, 0.0)
            elif name.startswith("transition"):
                parts[name] = _Transition(part.conv.in_channels, part.conv.out_channels)
            elif isinstance(part, nn.Conv2d):
                parts[name] = nn.Conv2d(
                    part.in_channels,
                    part.out_channels,
                    part.kernel_size,
                    part.stride,
                    part.padding,
                    bias=False,
                )
            elif isinstance(part, nn.BatchNorm2d):
                parts[name] = nn.BatchNorm2d(part.num_features)
            else:
                parts[name] = {"relu0": nn.ReLU(), "pool0": nn.MaxPool2d(3, 2, 1)}[name]
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(ours.classifier.in_features, ours.classifier.out_features)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images).relu().mean((2, 3)))


@given(
    shape=st.fixed_dictionaries(
        {
            "growth_rate": st.integers(1, 6),
            "block_config": st.lists(st.integers(1, 3), min_size=1, max_size=3),
            "num_init_features": st.integers(2, 9),
            "bn_size": st.integers(1, 4),
            "num_classes": st.integers(1, 4),
            "small_inputs": st.booleans(),
            "compression": st.floats(0.4, 1.0),
            "in_channels": st.integers(1, 4),
            "checkpoint": st.sampled_from(MODES),
        }
    ),
    n=st.integers(2, 3),
    h=st.integers(1, 9),
    w=st.integers(1, 9),
    train=st.booleans(),
)
@settings(max_examples=40, derandomize=True)
def test_network_of_any_shape(shape: dict[str, Any], n: int, h: int, w: int, train: bool) -> None:
    torch.manual_seed(0)
    ours = EfficientDenseNet(**shape).double()
    expected = OfAnyShape(ours).double()
    shake(expected)
    ours.load_state_dict(expected.state_dict())
    for network in (expected, ours):
        network.train(train)
    # As small as the pooling allows, but for `h` and `w`; two pixels at least behind the last.
    halvings = len(shape["block_config"]) - 1 + (0 if shape["small_inputs"] else 2)
    least = 2 << halvings
    images = (n, shape["in_channels"], least - 1 + h, least - 1 + w)
    assert fusion_report(ours).all_fused
    assert_same_steps((expected, ours), images, steps=1)


@pytest.mark.parametrize("checkpoint", MODES)
def test_reference_backend_equals_torchvision(checkpoint: str) -> None:
    with use_backend("reference"):
        pair = networks(checkpoint=checkpoint)
        assert {row.backend for row in fusion_report(pair[1])} == {"reference"}
        assert_same_steps(pair, (2, 3, 33, 40))


def test_backends_draw_the_same_dropout() -> None:
    network = EfficientDenseNet(**SMALL, drop_rate=0.4).double()
    shake(network)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    results = []
    for backend in ("auto", "reference"):
        network.zero_grad()
        with use_backend(backend):
            torch.manual_seed(3)
            results.append([*step(network, images), *(p.grad for p in network.parameters())])
    for actual, wanted in zip(*results, strict=True):
        assert_close(actual, wanted, "backend", floor=1e-6)


def test_dropout_may_change_later() -> None:
    network = EfficientDenseNet(**SMALL)
    images = torch.randn(2, 3, 32, 32)
    plain = network(images)
    for part in network.modules():
        if hasattr(part, "drop_rate"):
            part.drop_rate = 0.5
    assert not torch.equal(network(images), plain)
    for part in network.modules():
        if hasattr(part, "drop_rate"):
            part.drop_rate = 0.0
    torch.testing.assert_close(network(images), plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_errs_no_more_than_torchvision(dtype: torch.dtype) -> None:
    """Norm of the output's error against float64, in evaluation, where no batch is too small."""
    expected, ours = networks(torch.float32, growth_rate=8, num_classes=20)
    exact = networks(growth_rate=8, num_classes=20)[0].eval()
    images = torch.randn(4, 3, 48, 48).to(dtype)
    with torch.no_grad():
        truth = exact(images.double())
        errors = [
            torch.linalg.vector_norm(network.to(dtype).eval()(images).double() - truth).item()
            for network in (ours, expected)
        ]
    assert errors[0] <= 2 * errors[1]
