"""Networks whose modules were exchanged: `convert` computes what the library's forward would."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from library_networks import LIBRARIES, TOLERANCE, assert_same_step, images, make, monai_network
from torch import Tensor, nn

from densenet_fast import convert, fusion_report

LAYER = "features.denseblock1.denselayer2"


class Scale(nn.Module):
    """Something that a network cannot do without."""

    def forward(self, input: Tensor) -> Tensor:
        return 1.5 * input


class AlwaysDropout(nn.Dropout2d):
    """Dropout in evaluation too, as for uncertainties; here always of the first channel."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat((torch.zeros_like(input[:, :1]), input[:, 1:]), 1)


def reordered(layers: nn.Sequential) -> None:
    layers.add_module("relu1", layers._modules.pop("relu1"))


def hooked(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, output: 2 * output)


Change = Callable[[Any], None]
SEQUENTIAL: dict[str, tuple[Change, str]] = {
    "appended": (
        lambda layers: layers.append(Scale()),
        "its submodules are norm1, relu1, conv1, norm2, relu2, conv2, 6",
    ),
    "reordered": (reordered, "its submodules are norm1, conv1, norm2, relu2, conv2, relu1"),
}
DROPOUT: dict[str, tuple[Change, str]] = {
    "identity": (
        lambda layers: setattr(layers, "dropout", nn.Identity()),
        "dropout is a Identity, not a Dropout2d",
    ),
    "subclass": (
        lambda layers: setattr(layers, "dropout", AlwaysDropout(0.5)),
        "dropout is a subclass of Dropout2d (AlwaysDropout)",
    ),
    "hooked": (lambda layers: hooked(layers.dropout), "dropout has a forward hook"),
    "not last": (
        lambda layers: layers.append(Scale()),
        "its submodules are norm1, relu1, conv1, norm2, relu2, conv2, dropout, 7",
    ),
}


def assert_one_layer_is_plain(model: nn.Module, change: Change, path: str, reason: str) -> None:
    """The layer that was changed is computed as the library does, and named."""
    change(model.get_submodule(path))
    reference = copy.deepcopy(model)
    convert(model)
    report = fusion_report(model)
    assert (report[LAYER].fused, report[LAYER].reason) == (False, reason)
    assert [row.name for row in report if not row.fused] == [LAYER]
    assert_same_step(model, reference, images())


@pytest.mark.parametrize("change", SEQUENTIAL)
@pytest.mark.parametrize("library", ["monai", "torchxrayvision"])
def test_a_layer_that_is_a_sequential_runs_all_it_has(library: str, change: str) -> None:
    path = f"{LAYER}.layers" if library == "monai" else LAYER
    assert_one_layer_is_plain(make(library), SEQUENTIAL[change][0], path, SEQUENTIAL[change][1])


@pytest.mark.parametrize("change", DROPOUT)
def test_dropout_of_monai_that_is_another_module(change: str) -> None:
    torch.manual_seed(0)
    model = monai_network(dropout_prob=0.5).double().eval()
    assert_one_layer_is_plain(model, DROPOUT[change][0], f"{LAYER}.layers", DROPOUT[change][1])


@pytest.mark.parametrize("library", LIBRARIES)
def test_a_transition_whose_relu_is_gone(library: str) -> None:
    model: Any = make(library)
    transition = model.features.transition1
    if "relu" in transition._modules:
        del transition.relu
    reference = copy.deepcopy(model)
    convert(model)
    assert fusion_report(model)["features.transition1"].fused
    assert_same_step(model, reference, images())


# Layers that take a list of features


class Newest(nn.Module):
    """A layer that reads what the block's input and the layer before it have added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        return self.conv(torch.cat((features[0], features[-1]), 1))


# Which layers of a block of five are called.
CALLED: dict[str, tuple[int, ...]] = {
    "first": (1,),
    "middle": (3,),
    "last": (5,),
    "neighbours": (2, 3),
    "apart": (2, 4, 5),
    "all": (1, 2, 3, 4, 5),
}


def network_of_five(library: str) -> Any:
    models = pytest.importorskip(f"{library}.models.densenet")
    torch.manual_seed(0)
    network = models.DenseNet(8, (5,), num_classes=5).double()
    return network, network.features.denseblock1


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_hooks_see_the_list_of_features(library: str, called: str) -> None:
    model, block = network_of_five(library)
    seen: list[list[Tensor]] = []
    for at in CALLED[called]:
        block[f"denselayer{at}"].register_forward_pre_hook(
            lambda module, args: seen.append(list(args[0]))
        )
    reference = copy.deepcopy(model)
    convert(model)
    assert_same_step(model, reference, images())
    ours, theirs = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)
    plain = {f"features.denseblock1.denselayer{at}" for at in CALLED[called]}
    rows = fusion_report(model)
    assert {row.name for row in rows if "layer" in row.name and not row.fused} == plain


@pytest.mark.parametrize("called", CALLED)
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_layer_of_ones_own_takes_the_list_of_features(library: str, called: str) -> None:
    model, block = network_of_five(library)
    width = model.features.conv0.out_channels
    for at in CALLED[called]:
        block[f"denselayer{at}"] = Newest(width + (8 if at > 1 else width)).double()
    reference = copy.deepcopy(model)
    convert(model)
    assert_same_step(model, reference, images())


@pytest.mark.parametrize("checkpoint", ["none", "bottleneck", "block"])
@pytest.mark.parametrize("library", LIBRARIES)
def test_without_the_last_norm(library: str, checkpoint: Any) -> None:
    """The library's ReLU in place must not write to the features that the backward reads."""
    model = make(library)
    reference = copy.deepcopy(model)
    convert(model, checkpoint=checkpoint)
    for network in (model, reference):
        network.features.norm5 = nn.Identity()
    assert_same_step(model, reference, images())


@pytest.mark.slow
def test_a_graph_without_the_last_norm() -> None:
    model = make("torchvision")
    reference = copy.deepcopy(model)
    convert(model)
    for network in (model, reference):
        network.features.norm5 = nn.Identity()
    graph = torch.compile(model, backend="aot_eager", fullgraph=True)
    for network in (graph, reference):
        network(images()).square().sum().backward()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=TOLERANCE, atol=TOLERANCE)


class PowerMean(nn.Module):
    """Pooling to one pixel that is no average."""

    def forward(self, input: Tensor) -> Tensor:
        return input.pow(3).mean((2, 3), keepdim=True)


POOLINGS: dict[str, Change] = {
    "another pooling": lambda pool: setattr(pool, "pool", PowerMean()),
    "a hooked pooling": lambda pool: hooked(pool.pool),
    "a hooked flatten": lambda pool: hooked(pool.flatten),
}


@pytest.mark.parametrize("change", POOLINGS)
def test_a_pooling_of_timm_that_is_no_average(change: str) -> None:
    model = make("timm")
    POOLINGS[change](model.global_pool)
    reference = copy.deepcopy(model)
    convert(model)
    assert [row.name for row in fusion_report(model) if not row.fused] == ["features.norm5"]
    assert_same_step(model, reference, images())


def test_a_pooling_of_timm_to_more_pixels() -> None:
    model = make("timm")
    model.global_pool.pool.output_size = 2
    model.classifier = nn.Linear(4 * model.classifier.in_features, 5).double()
    reference = copy.deepcopy(model)
    convert(model)
    assert_same_step(model, reference, images())
