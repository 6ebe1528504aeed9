"""Construction, state dicts, copies, and the network as a module among modules."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from comparison import SMALL, assert_close, assert_same_steps, networks
from torch import nn
from torchvision.models import densenet as torchvision_densenet

from densenet_fast.modules import densenet as models
from densenet_fast.modules.densenet import EfficientDenseNet


def small(**kwargs: Any) -> EfficientDenseNet:
    return EfficientDenseNet(**{**SMALL, **kwargs})


@pytest.mark.parametrize("name", ["densenet121", "densenet161", "densenet169", "densenet201"])
def test_builders_have_torchvisions_parameters(name: str) -> None:
    """The same seed gives the same names, shapes and values."""
    torch.manual_seed(5)
    expected = getattr(torchvision_densenet, name)(num_classes=10).state_dict()
    torch.manual_seed(5)
    actual = getattr(models, name)(num_classes=10).state_dict()
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[key], expected[key]) for key in expected)


def test_densenet264() -> None:
    with torch.device("meta"):
        network = models.densenet264()
    assert [len(b) for n, b in network.features.named_children() if "block" in n] == [6, 12, 64, 48]
    assert network.classifier.in_features == 2688


def test_builders_pass_arguments_on() -> None:
    with torch.device("meta"):
        network = models.densenet121(num_classes=7, in_channels=1, small_inputs=True)
    assert network.classifier.out_features == 7
    assert network.features.conv0.weight.shape == (64, 1, 3, 3)
    with pytest.raises(TypeError, match="colour"):
        models.densenet121(colour="blue")


def test_positional_signature_is_torchvisions() -> None:
    arguments = (4, (1, 2), 8, 2, 0.1, 5)
    torch.manual_seed(0)
    expected = torchvision_densenet.DenseNet(*arguments, True)
    torch.manual_seed(0)
    actual = EfficientDenseNet(*arguments, True)
    assert list(actual.state_dict()) == list(expected.state_dict())
    assert actual.checkpoint == "bottleneck"
    assert EfficientDenseNet(*arguments, False).checkpoint == "none"
    assert EfficientDenseNet(*arguments, False, checkpoint="block").checkpoint == "none"


def test_state_dicts_load_strictly_both_ways() -> None:
    expected, ours = networks()
    expected.load_state_dict(small().double().state_dict())
    ours.load_state_dict(expected.state_dict())


def test_state_dicts_of_the_first_pretrained_weights() -> None:
    """Keys like denselayer1.norm.1.weight, and no num_batches_tracked."""
    ours = networks()[1]
    old = {
        key.replace("norm1.", "norm.1.")
        .replace("conv1.", "conv.1.")
        .replace("norm2.", "norm.2.")
        .replace("conv2.", "conv.2."): value
        for key, value in small().double().state_dict().items()
        if "num_batches_tracked" not in key
    }
    assert any("denselayer2.conv.2.weight" in key for key in old)
    before = dict(old)
    ours.load_state_dict(old)
    assert list(old) == list(before)
    assert_close(
        ours.state_dict()["features.denseblock1.denselayer2.conv2.weight"],
        old["features.denseblock1.denselayer2.conv.2.weight"],
        "conv2",
    )


def test_mismatching_state_dicts_are_refused() -> None:
    network = small()
    for wrong in (small(growth_rate=5), small(block_config=(2, 3)), small(num_classes=6)):
        with pytest.raises(RuntimeError, match=r"Error.* loading state_dict"):
            network.load_state_dict(wrong.state_dict())


@pytest.mark.parametrize(
    ("compression", "channels"), [(1.0, [14, 26]), (0.5, [7, 9]), (0.3, [4, 4]), (1, [14, 26])]
)
def test_compression(compression: float, channels: list[int]) -> None:
    network = small(compression=compression)
    kept = [network.features.get_submodule(f"transition{i}.conv").out_channels for i in (1, 2)]
    assert kept == channels
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 5)


def test_compression_of_decimal_shares() -> None:
    """floor(0.29 * 100) is 28 in floating point."""
    network = EfficientDenseNet(10, (9, 1), 10, 1, num_classes=2, compression=0.29)
    assert network.features.transition1.conv.out_channels == 29


def test_in_channels() -> None:
    assert small(in_channels=1)(torch.randn(2, 1, 32, 32)).shape == (2, 5)


def test_checkpoint_reaches_every_block() -> None:
    network = small()
    network.checkpoint = "block"
    blocks = [part for part in network.modules() if hasattr(part, "checkpoint")]
    assert len(blocks) == 1 + 3 + 7
    assert {part.checkpoint for part in blocks} == {"block"}


@pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
def test_copies_continue_like_the_original(how: str) -> None:
    expected, ours = networks(checkpoint="block")
    assert_same_steps((expected, ours), (2, 3, 32, 32))
    if how == "deepcopy":
        copied = copy.deepcopy(ours)
    else:
        file = io.BytesIO()
        torch.save(ours, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    assert copied.checkpoint == "block"
    assert_same_steps((copy.deepcopy(expected), copied), (2, 3, 32, 32))
    assert_same_steps((expected, ours), (2, 3, 32, 32))


def test_features_alone_and_in_pieces() -> None:
    expected, ours = networks()
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    ours.eval()
    expected.eval()
    wanted = expected.features(images)
    assert_close(ours.features(images), wanted, "features")
    assert_close(nn.Sequential(*ours.features.children())(images), wanted, "children")
    assert_close(ours.features[5:](ours.features[:5](images)), wanted, "slices")
    through = images
    for (name, part), other in zip(
        ours.features.named_children(), expected.features.children(), strict=True
    ):
        through = part(through)
        images = other(images)
        assert_close(through, images, name)


@pytest.mark.parametrize("behind", [nn.ReLU(inplace=True), nn.Identity()], ids=str)
def test_features_train_in_another_network(behind: nn.Module) -> None:
    pair = [
        nn.Sequential(*part.features.children(), behind, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        for part in networks()
    ]
    assert_same_steps((pair[0], pair[1]), (2, 3, 32, 32))


def test_feature_extractor() -> None:
    from torchvision.models.feature_extraction import create_feature_extractor

    expected, ours = (network.eval() for network in networks())
    nodes = {"features.transition1.pool": "middle", "features.norm5": "last"}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = create_feature_extractor(expected, nodes)(images)
    actual = create_feature_extractor(ours, nodes)(images)
    for name in wanted:
        assert_close(actual[name], wanted[name], name)


def test_same_block_twice_in_one_network() -> None:
    """The statistics of a shared block are updated by every use, in order."""

    class Twice(nn.Module):
        def __init__(self, network: nn.Module) -> None:
            super().__init__()
            self.block = network.features.denseblock1
            self.back = nn.Conv2d(14, 6, 1, bias=False).double()

        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return self.block(self.back(self.block(input)))

    pair = [Twice(network) for network in networks()]
    pair[1].back.load_state_dict(pair[0].back.state_dict())
    for part in pair:
        for norm in part.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
    assert_same_steps((pair[0], pair[1]), (2, 6, 7, 5), steps=3)


def test_norm_shared_by_two_layers_of_a_block() -> None:
    pair = networks()
    for network in pair:
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        block = network.features.denseblock2
        block.denselayer2.norm2 = block.denselayer1.norm2
    assert_same_steps(pair, (2, 3, 32, 32), steps=3)


def test_dropout_follows_the_seed() -> None:
    network = small(drop_rate=0.5)
    images = torch.randn(2, 3, 32, 32)

    def run(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return network(images)

    first = run(1)
    assert torch.equal(first, run(1))
    assert not torch.equal(first, run(2))


@pytest.mark.parametrize("checkpoint", ["bottleneck", "block"])
def test_dropout_of_a_recomputed_block_is_the_same(checkpoint: str) -> None:
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    gradients = []
    for mode in ("none", checkpoint):
        torch.manual_seed(0)
        network = small(drop_rate=0.3, checkpoint=mode).double()
        torch.manual_seed(1)
        network(images).square().sum().backward()
        gradients.append([parameter.grad for parameter in network.parameters()])
    for wanted, actual in zip(*gradients, strict=True):
        assert_close(actual, wanted, "gradient", floor=1e-6)


def test_half_precision_networks_run() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        network = small().to(dtype)
        output = network(torch.randn(2, 3, 32, 32, dtype=dtype))
        assert output.dtype == dtype
        output.sum().backward()
        assert all(p.grad is not None and p.grad.dtype == dtype for p in network.parameters())


def test_nan_and_infinity_propagate() -> None:
    expected, ours = networks()
    for value in (float("nan"), float("inf")):
        images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
        images[0, 0, 5, 5] = value
        for train in (False, True):
            wanted, actual = (m.train(train)(images) for m in (expected, ours))
            assert torch.equal(actual.isnan(), wanted.isnan())
            actual.sum().backward()


def test_double_backward_is_refused() -> None:
    network = small()
    images = torch.randn(2, 3, 32, 32, requires_grad=True)
    (grad,) = torch.autograd.grad(network(images).sum(), images, create_graph=True)
    with pytest.raises(RuntimeError):
        grad.sum().backward()


def test_functional_call() -> None:
    expected, ours = networks()
    other = {name: 2 * value for name, value in ours.named_parameters()}
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    wanted = torch.func.functional_call(expected, other, (images,))
    assert_close(torch.func.functional_call(ours, other, (images,)), wanted, "output")
