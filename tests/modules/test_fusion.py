"""Whatever makes a layer different from the plain composition sends it through that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import (
    Recorder,
    assert_close,
    assert_same_steps,
    both,
    networks,
    without_inplace,
)
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from densenet_fast.fusion import fusion_report
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock, DenseLayer, Transition

LAYER = "features.denseblock2.denselayer2"
SIZE = (2, 3, 32, 32)


def layer_of(network: nn.Module) -> nn.Module:
    return network.get_submodule(LAYER)


def replace(name: str, make: Callable[[nn.Module], nn.Module]) -> Callable[[nn.Module], None]:
    """A change of one submodule of the layer."""

    def change(network: nn.Module) -> None:
        layer = layer_of(network)
        setattr(layer, name, make(getattr(layer, name)).double())

    return change


def reparametrise(name: str, how: Callable[[nn.Module], Any]) -> Callable[[nn.Module], None]:
    def change(network: nn.Module) -> None:
        torch.manual_seed(0)
        how(getattr(layer_of(network), name))

    return change


def seeded_conv(*args: Any, **kwargs: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(*args, **kwargs)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


class ScaledNorm(nn.BatchNorm2d):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


def own_forward(network: nn.Module) -> None:
    conv = layer_of(network).conv1
    conv.forward = lambda input: 3 * nn.functional.conv2d(input, conv.weight)


def prune_conv(conv: nn.Module) -> None:
    prune.l1_unstructured(conv, "weight", amount=0.5)


CHANGES: dict[str, tuple[Callable[[nn.Module], None], str]] = {
    "other norm": (replace("norm1", lambda m: nn.GroupNorm(1, m.num_features)), "GroupNorm"),
    "no norm": (replace("norm1", lambda m: nn.Identity()), "norm1 is a Identity"),
    "subclassed norm": (replace("norm2", lambda m: ScaledNorm(m.num_features)), "subclass"),
    "other activation": (replace("relu1", lambda m: nn.SiLU()), "relu1 is a SiLU"),
    "inplace activation": (replace("relu2", lambda m: nn.ELU(inplace=True)), "relu2 is a ELU"),
    "groups": (
        replace("conv2", lambda m: seeded_conv(8, 4, 3, padding=1, groups=2, bias=False)),
        "groups 2",
    ),
    "dilation": (
        replace("conv2", lambda m: seeded_conv(8, 4, 3, padding=2, dilation=2, bias=False)),
        "dilation (2, 2)",
    ),
    "kernel": (
        replace("conv2", lambda m: seeded_conv(8, 4, 5, padding=2, bias=False)),
        "kernel_size (5, 5)",
    ),
    "padding mode": (
        replace(
            "conv2", lambda m: seeded_conv(8, 4, 3, padding=1, bias=False, padding_mode="reflect")
        ),
        "reflect",
    ),
    "sequence": (replace("conv2", lambda m: nn.Sequential(m, nn.Tanh())), "Sequential"),
    "parametrisation": (
        reparametrise(
            "conv1", lambda m: parametrize.register_parametrization(m, "weight", Doubled())
        ),
        "conv1 is parametrised",
    ),
    "weight_norm": (reparametrise("conv2", parametrizations.weight_norm), "parametrised"),
    "spectral_norm": (reparametrise("conv1", parametrizations.spectral_norm), "parametrised"),
    "parametrised norm": (
        reparametrise(
            "norm1", lambda m: parametrize.register_parametrization(m, "weight", Doubled())
        ),
        "norm1 is parametrised",
    ),
    "pruned": (reparametrise("conv1", prune_conv), "conv1 has a forward_pre hook"),
    "own forward": (own_forward, "conv1 has its own forward"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changed_layers(name: str) -> None:
    change, reason = CHANGES[name]
    pair = networks()
    both(pair, change)
    pair[1].load_state_dict(pair[0].state_dict())
    report = fusion_report(pair[1])
    assert not report[LAYER].fused
    assert reason in (report[LAYER].reason or "")
    assert sum(not row.fused for row in report) == 1
    assert_same_steps(pair, SIZE)


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda m, x, y: 2 * y),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda m, x: (x[0] + 1,)),
    "backward": lambda m: m.register_full_backward_hook(lambda m, gi, go: (2 * gi[0],)),
    "backward_pre": lambda m: m.register_full_backward_pre_hook(lambda m, go: (2 * go[0],)),
}
PARTS = ("norm1", "relu1", "conv1", "norm2", "relu2", "conv2")


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooked_parts_of_a_layer(kind: str, part: str) -> None:
    pair = networks()
    both(pair, without_inplace)
    handles = [HOOKS[kind](getattr(layer_of(network), part)) for network in pair]
    report = fusion_report(pair[1])
    assert report[LAYER].reason == f"{part} has a {kind} hook"
    assert_same_steps(pair, SIZE)
    for handle in handles:
        handle.remove()
    assert fusion_report(pair[1]).all_fused
    assert_same_steps(pair, SIZE)


@pytest.mark.parametrize(
    "name",
    [
        "features.norm0",
        "features.relu0",
        "features.pool0",
        "features.transition1.norm",
        "features.transition1.conv",
        "features.transition1.pool",
        "features.transition2",
        "features.denseblock2",
        "features.denseblock3",
        "features.norm5",
        "features",
        "classifier",
    ],
)
@pytest.mark.parametrize("kind", HOOKS)
def test_hooked_parts_of_the_network(kind: str, name: str) -> None:
    pair = networks()
    both(pair, without_inplace)
    both(pair, lambda network: HOOKS[kind](network.get_submodule(name)))
    pair[0].forward = lambda x: pair[0].classifier(  # without torchvision's in-place ReLU
        torch.flatten(nn.functional.adaptive_avg_pool2d(pair[0].features(x).relu(), 1), 1)
    )
    assert_same_steps(pair, SIZE)


@pytest.mark.parametrize("name", [LAYER, "features.denseblock2", "features.transition1"])
def test_hooks_see_every_call(name: str) -> None:
    network = networks()[1]
    seen = []
    network.get_submodule(name).register_forward_hook(lambda m, x, y: seen.append(tuple(y.shape)))
    network(torch.randn(SIZE, dtype=torch.float64))
    assert len(seen) == 1


def test_a_hooked_layer_says_so_but_stays_fused_within() -> None:
    network = networks()[1]
    layer_of(network).register_forward_hook(lambda m, x, y: None)
    row = fusion_report(network)[LAYER]
    assert not row.fused
    assert "forward hook" in (row.reason or "")


def test_blocks_are_split_in_longest_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    block = DenseBlock(6, 4, 2, 3, 0.0)
    block.denselayer3.relu1 = nn.SiLU()
    recorder = Recorder(monkeypatch)
    block(torch.randn(2, 4, 5, 5))
    assert recorder.runs == [2, 3]


def test_transition_and_final_norm_run_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    network = networks()[1]
    recorder = Recorder(monkeypatch)
    network(torch.randn(SIZE, dtype=torch.float64))
    assert recorder.runs == [2, 3, 2]


def test_replaced_layer_of_another_type() -> None:
    class Wider(nn.Module):
        def forward(self, features: Tensor) -> Tensor:
            return torch.cat((features, features[:, :3].sin()), 1)

    torch.manual_seed(0)
    block = DenseBlock(3, 4, 2, 3, 0.0).double()
    block["denselayer2"] = Wider()
    assert "Wider" in (fusion_report(block)["denselayer2"].reason or "")
    images = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    through = block.denselayer3(Wider()(block.denselayer1(images)))
    assert_close(block(images), through, "output")


def test_subclasses_are_called() -> None:
    class Louder(DenseLayer):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    torch.manual_seed(0)
    block = DenseBlock(2, 4, 2, 3, 0.0)
    plain = block(images := torch.randn(2, 4, 5, 5))
    block.denselayer2.__class__ = Louder
    assert "subclass" in (fusion_report(block)["denselayer2"].reason or "")
    torch.testing.assert_close(block(images), 2 * plain)


STANDARD_PARTS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "features.pool0": lambda m: nn.AvgPool2d(2),
    "features.relu0": lambda m: nn.SiLU(),
    "features.norm0": lambda m: nn.Identity(),
    "features.transition1": lambda m: nn.Sequential(nn.Conv2d(14, 7, 1), nn.MaxPool2d(2)),
    "features.transition1.norm": lambda m: nn.Identity(),
    "features.transition1.pool": lambda m: nn.AvgPool2d(2, ceil_mode=True),
    "features.norm5": lambda m: nn.Identity(),
    "features.denseblock1": lambda m: nn.Conv2d(6, 14, 1),
    "classifier": lambda m: nn.Identity(),
}


@pytest.mark.parametrize("name", STANDARD_PARTS)
def test_replaced_parts_of_the_network(name: str) -> None:
    pair = networks()

    def change(network: nn.Module) -> None:
        torch.manual_seed(0)
        parent, _, last = name.rpartition(".")
        part = STANDARD_PARTS[name](network.get_submodule(name)).double()
        setattr(network.get_submodule(parent), last, part)

    both(pair, change)
    assert_same_steps(pair, (2, 3, 41, 37))


def test_features_behind_other_names_and_modules() -> None:
    pair = networks()
    for network in pair:
        parts = list(network.features.children())
        network.features = nn.Sequential(*parts[:5], nn.Dropout(0.0), *parts[5:])
    assert_same_steps(pair, SIZE)


def test_synchronised_norms() -> None:
    network = EfficientDenseNet(4, (2, 2), 6, num_classes=3).eval()
    images = torch.randn(2, 3, 32, 32)
    wanted = network(images)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(network)
    assert fusion_report(converted).all_fused
    torch.testing.assert_close(converted(images), wanted)


def test_report_of_a_whole_network() -> None:
    network = networks()[1]
    report = fusion_report(network)
    assert [row.name for row in report if "layer" not in row.name] == [
        "features.norm0",
        "features.transition1",
        "features.transition2",
        "features.norm5",
    ]
    assert len(report) == 4 + 7
    assert str(report).startswith("11 of 11 parts run fused (torch.float64 on cpu)")
    network.features.register_forward_hook(lambda m, x, y: None)
    report = fusion_report(network)
    assert "features has a forward hook" in (report["features.norm5"].reason or "")
    assert report[LAYER].fused


def test_report_of_other_networks() -> None:
    network = nn.ModuleDict({"a": Transition(4, 2), "b": nn.ModuleList([DenseLayer(4, 2, 2, 0.0)])})
    assert [row.name for row in fusion_report(network)] == ["a", "b.0"]
    assert fusion_report(nn.Linear(2, 2)).rows == ()
    with pytest.raises(TypeError, match="module"):
        fusion_report("network")  # type: ignore[arg-type]
