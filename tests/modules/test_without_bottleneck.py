"""DenseNet without B: layers of norm, ReLU and one 3-wide convolution, against plain modules."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import assert_same_gradients_in_a_graph, tiny
from library_networks import assert_same_step, assert_same_training
from library_networks import sized_images as images
from torch import Tensor, nn

import densenet_fast
from benchmarks.measure import saved_for_backward
from densenet_fast import DenseBlock, DenseLayer, EfficientDenseNet, memory
from densenet_fast.blocks.specs import CHECKPOINT_MODES
from densenet_fast.modules.dimensions import MODULES

pytestmark = pytest.mark.usefixtures("fresh_compiler")

DIMENSIONS = pytest.mark.parametrize("dims", [1, 2, 3])
SMALL: dict[str, Any] = {
    "num_init_features": 6,
    "num_classes": 3,
    "in_channels": 2,
    "bottleneck": False,
    "compression": 1.0,
}


class PlainLayer(nn.Module):
    """What a layer is, as anybody would write it."""

    def __init__(self, read: int, growth: int, dims: int) -> None:
        super().__init__()
        kinds = MODULES[dims]
        self.norm1, self.relu1 = kinds.norm(read), nn.ReLU()
        self.conv1 = kinds.conv(read, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.conv1(self.relu1(self.norm1(x)))), 1)


class PlainNetwork(nn.Module):
    """The same names, so that a state dict fits."""

    def __init__(self, dims: int, growth: int = 4, blocks: tuple[int, ...] = (2, 2)) -> None:
        super().__init__()
        kinds, channels = MODULES[dims], 6
        self.features = nn.Sequential()
        add = self.features.add_module
        add("conv0", kinds.conv(2, channels, 7, stride=2, padding=3, bias=False))
        add("norm0", kinds.norm(channels))
        add("relu0", nn.ReLU())
        add("pool0", kinds.maximum(3, stride=2, padding=1))
        for at, layers in enumerate(blocks, 1):
            block = nn.Sequential()
            for layer in range(1, layers + 1):
                block.add_module(f"denselayer{layer}", PlainLayer(channels, growth, dims))
                channels += growth
            add(f"denseblock{at}", block)
            if at < len(blocks):
                transition = nn.Sequential()
                transition.add_module("norm", kinds.norm(channels))
                transition.add_module("relu", nn.ReLU())
                transition.add_module("conv", kinds.conv(channels, channels, 1, bias=False))
                transition.add_module("pool", kinds.average(2, stride=2))
                add(f"transition{at}", transition)
        add("norm5", kinds.norm(channels))
        self.classifier = nn.Linear(channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(F.relu(self.features(x)).flatten(2).mean(2))


def network(dims: int = 2, **changes: Any) -> EfficientDenseNet:
    return tiny(spatial_dims=dims, **{**SMALL, **changes}).double()


def plain(ours: EfficientDenseNet, dims: int = 2) -> PlainNetwork:
    made = PlainNetwork(dims).double()
    made.load_state_dict(ours.state_dict())
    return made


@pytest.mark.parametrize("checkpoint", [*CHECKPOINT_MODES, "auto"])
@DIMENSIONS
def test_training_is_the_plain_one(dims: int, checkpoint: Any) -> None:
    ours = network(dims, checkpoint=checkpoint, memory_budget=2**26)
    expected = plain(ours, dims)
    assert densenet_fast.fusion_report(ours).all_fused
    assert_same_training(ours, expected, images(dims))


def test_frozen_norms_and_parts_that_want_no_gradient() -> None:
    ours = network()
    expected = plain(ours)
    for model in (ours, expected):
        model.features.denseblock1.denselayer2.norm1.eval()
        model.features.denseblock2.denselayer1.conv1.requires_grad_(False)
        model(images(2)).square().sum().backward()
    for (name, one), other in zip(ours.named_parameters(), expected.parameters(), strict=True):
        assert (one.grad is None) == (name == "features.denseblock2.denselayer1.conv1.weight")
        if one.grad is not None:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def test_dropout_is_that_of_other_layers() -> None:
    """The same draws whatever the mode; in evaluation nothing is dropped."""
    outputs = []
    for mode in CHECKPOINT_MODES:
        ours = network(drop_rate=0.5, checkpoint=mode)
        torch.manual_seed(3)
        output = ours(images(2))
        output.square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in ours.named_parameters()}
        outputs.append((output, gradients.pop("features.conv0.weight"), *gradients.values()))
    for other in outputs[1:]:
        # PyTorch's convolution, of another layout where it is made again.
        torch.testing.assert_close(other[1], outputs[0][1], rtol=1e-12, atol=1e-12)
        for at, (one, two) in enumerate(zip(outputs[0], other, strict=True)):
            assert at == 1 or torch.equal(one, two)
    expected = plain(ours)
    torch.testing.assert_close(
        ours.eval()(images(2)), expected.eval()(images(2)), rtol=1e-9, atol=1e-9
    )


@pytest.mark.parametrize("mode", CHECKPOINT_MODES)
@pytest.mark.parametrize("dims", [2, 3])
def test_kept_bytes_are_those_that_autograd_keeps(dims: int, mode: str) -> None:
    model = network(dims, checkpoint=mode).float()
    x = images(dims).float()

    def forward() -> Tensor:
        return F.cross_entropy(model(x), torch.arange(3))

    kept = saved_for_backward(model, forward, x)
    assert memory.estimate(model, x.shape).kept == kept


def test_a_layer_and_a_block_by_themselves() -> None:
    x = torch.randn(2, 6, 5, 7, dtype=torch.float64)
    layer = DenseLayer(6, 4, 4, 0.0, bottleneck=False).double()
    other = PlainLayer(6, 4, 2).double()
    other.load_state_dict(layer.state_dict())
    assert_same_step(layer, other, x)
    block = DenseBlock(2, 6, 4, 4, 0.0, bottleneck=False).double()
    others = nn.Sequential(PlainLayer(6, 4, 2), PlainLayer(10, 4, 2)).double()
    values = block.state_dict().values()
    others.load_state_dict(dict(zip(others.state_dict(), values, strict=True)))
    assert_same_step(block, others, x)


def test_a_layer_with_a_hook_is_called() -> None:
    ours, called = network(), []
    expected = plain(ours)
    ours.features.denseblock1.denselayer2.conv1.register_forward_hook(
        lambda *_: called.append(True)
    )
    assert_same_step(ours, expected, images(2))
    assert called == [True]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_graphs_scripts_and_snapshots() -> None:
    ours = network().float()
    x = images(2).float()
    assert_same_gradients_in_a_graph(ours, x)
    ours.eval()
    with torch.no_grad():
        expected = ours(x)
    fast = densenet_fast.optimize_for_inference(ours)
    assert torch.equal(fast(x), expected)
    torch.testing.assert_close(torch.jit.script(ours)(x), expected)
    program = torch.export.export(ours, (x,)).module()
    torch.testing.assert_close(program(x), expected)
    file = io.BytesIO()
    torch.save(ours, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)


def test_arguments() -> None:
    with pytest.raises(TypeError, match="bottleneck"):
        EfficientDenseNet(bottleneck=2)  # type: ignore[arg-type]
    layer = DenseLayer(6, 4, 4, 0.0, bottleneck=False)
    with pytest.raises(ValueError, match="expects 6 input channels"):
        layer(torch.zeros(2, 5, 4, 4))


def test_the_paper_s_network_without_b_and_c() -> None:
    """L = 40, k = 12: 1.0 million parameters (arXiv 1608.06993, table 2)."""
    made = EfficientDenseNet(
        12,
        (12, 12, 12),
        16,
        num_classes=10,
        small_inputs=True,
        bottleneck=False,
        compression=1.0,
    )
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(1.0e6, rel=0.05)
