"""Rarer things that must not be computed without calling the modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comparison import assert_same_steps, both, networks
from torch import Tensor, nn

from densenet_fast.fusion import fusion_report
from densenet_fast.modules.densenet import EfficientDenseNet
from densenet_fast.modules.layers import DenseBlock, DenseLayer

LAYER = "features.denseblock2.denselayer2"
SIZE = (2, 3, 32, 32)


def layer_of(network: nn.Module) -> Any:
    return network.get_submodule(LAYER)


class Tagged(Tensor):
    """A tensor that computes as any other, but need not."""


def tagged(module: nn.Module, name: str) -> None:
    tensor = getattr(module, name)
    subclassed = tensor.detach().as_subclass(Tagged)
    if isinstance(tensor, nn.Parameter):
        module._parameters[name] = nn.Parameter(subclassed)
    else:
        module._buffers[name] = subclassed


def as_attribute(module: nn.Module, name: str) -> None:
    """What is registered no longer: a buffer computed by somebody else."""
    tensor = getattr(module, name).clone()
    delattr(module, name)
    object.__setattr__(module, name, tensor)


STATES: dict[str, tuple[Callable[[Any], None], str]] = {
    "subclass weight": (lambda layer: tagged(layer.conv1, "weight"), "conv1 holds a Tagged"),
    "subclass scale": (lambda layer: tagged(layer.norm1, "weight"), "norm1 holds a Tagged"),
    "subclass mean": (lambda layer: tagged(layer.norm2, "running_mean"), "norm2 holds a Tagged"),
    "no eps": (lambda layer: setattr(layer.norm1, "eps", 0.0), "norm1 has eps=0.0"),
    "unregistered mean": (
        lambda layer: as_attribute(layer.norm1, "running_mean"),
        "no registered running_mean",
    ),
}


@pytest.mark.parametrize("name", STATES)
def test_states_of_a_layer(name: str) -> None:
    change, reason = STATES[name]
    pair = networks()
    both(pair, lambda network: change(layer_of(network)))
    row = fusion_report(pair[1])[LAYER]
    assert not row.fused
    assert reason in (row.reason or "")
    both(pair, lambda network: network.eval())
    expected, ours = pair
    images = torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(
        torch.Tensor(ours(images)), torch.Tensor(expected(images)), rtol=1e-9, atol=1e-12
    )


@pytest.mark.parametrize(
    "kind",
    [nn.BatchNorm2d, nn.SyncBatchNorm, nn.ReLU, nn.Conv2d, nn.AvgPool2d, nn.MaxPool2d],
    ids=lambda k: k.__name__,
)
def test_patched_classes(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """As libraries do that watch or change every module of a type."""
    pair = networks()
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, input: 1.5 * original(self, input))
    report = fusion_report(pair[1])
    assert f"{kind.__name__}.forward is patched" in str(report)
    assert_same_steps(pair, SIZE)


def test_patched_call(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = networks()
    original, calls = nn.Module.__call__, []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(self))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "__call__", call)
    assert "__call__ is patched" in str(fusion_report(pair[1]))
    pair[1](torch.randn(SIZE, dtype=torch.float64))
    assert calls.count(nn.BatchNorm2d) == 18


@pytest.mark.slow
@pytest.mark.parametrize("name", ["features.denseblock2", LAYER, f"{LAYER}.conv1", "features"])
def test_compiled_parts(name: str) -> None:
    pair = networks()
    pair[1].get_submodule(name).compile(backend="eager")
    assert_same_steps(pair, SIZE)


@pytest.mark.slow
def test_wrapped_parts() -> None:
    """A compiled block is a module of another type; inside it is fused."""
    pair = networks()
    keys = list(pair[1].state_dict())
    wrapped = torch.compile(pair[1].features.denseblock2, backend="eager")
    pair[1].features.denseblock2 = wrapped
    rows = [row.name for row in fusion_report(pair[1])]
    assert "features.denseblock2._orig_mod.denselayer2" in rows
    images = torch.randn(SIZE, dtype=torch.float64)
    torch.testing.assert_close(pair[1](images), pair[0](images), rtol=1e-9, atol=1e-12)
    assert len(pair[1].state_dict()) == len(keys)


def test_missing_submodules_are_named() -> None:
    layer = DenseLayer(4, 2, 2, 0.0)
    layer.relu2 = None  # type: ignore[assignment]
    assert fusion_report(layer)["DenseLayer"].reason == "relu2 is missing"
    with pytest.raises(TypeError, match="not callable"):
        layer(torch.randn(2, 4, 3, 3))
    del layer.relu1
    assert fusion_report(layer)["DenseLayer"].reason == "relu1 is missing"


@pytest.mark.parametrize("empty", [nn.Sequential(), nn.ModuleList()], ids=["Sequential", "List"])
def test_empty_containers_are_modules_too(empty: nn.Module) -> None:
    """They are false in a condition."""
    block = DenseBlock(2, 4, 2, 3, 0.0)
    block["denselayer2"].norm1 = empty
    assert type(empty).__name__ in (fusion_report(block)["denselayer2"].reason or "")
    if isinstance(empty, nn.Sequential):
        images = torch.randn(2, 4, 5, 5)
        before = images.clone()
        assert block(images).shape == (2, 10, 5, 5)
        assert torch.equal(images, before)


def test_norms_that_write_to_their_input() -> None:
    """Of a subclass of a norm one cannot know."""

    class InPlace(nn.BatchNorm2d):
        def forward(self, input: Tensor) -> Tensor:
            return input.mul_(2)

    layer = DenseLayer(4, 2, 2, 0.0)
    layer.norm1 = InPlace(4)
    images = torch.randn(2, 4, 3, 3)
    before = images.clone()
    output = layer(images)
    assert torch.equal(images, before)
    assert torch.equal(output[:, :4], before)


def test_fused_and_plain_layers_take_turns() -> None:
    pair = networks(block_config=(5, 6), checkpoint="block")

    def change(network: nn.Module) -> None:
        for name in (
            "denseblock1.denselayer3",
            "denseblock2.denselayer1",
            "denseblock2.denselayer6",
        ):
            network.features.get_submodule(name).relu2 = nn.Tanh()

    both(pair, change)
    plain = [row.name for row in fusion_report(pair[1]) if not row.fused]
    assert plain == [
        "features.denseblock1.denselayer3",
        "features.denseblock2.denselayer1",
        "features.denseblock2.denselayer6",
        "features.norm5",
    ]
    assert_same_steps(pair, SIZE, steps=3)


def test_default_device_changes_nothing() -> None:
    with torch.device("cpu"):
        network = EfficientDenseNet(4, (2, 2), 6, num_classes=3)
        assert fusion_report(network).all_fused
        assert network(torch.randn(SIZE)).shape == (2, 3)
