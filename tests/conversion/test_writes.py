"""Features that others' code writes to in place: what trained before `convert` trains after it.

Each library's network undergoes the same surgery as it came and converted, before and after, and
takes the same step. densenet_fast's own network is compared with torchvision's.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from comparison import networks
from library_networks import LIBRARIES, assert_same_step, images, make
from torch import Tensor, nn

from densenet_fast import convert
from densenet_fast.blocks.specs import CHECKPOINT_MODES

# What a surgery returns is the network from then on.
Surgery = Callable[[Any], nn.Module]


def last_norm(replacement: Callable[[int], nn.Module]) -> Surgery:
    def operate(model: Any) -> nn.Module:
        model.features.norm5 = replacement(model.features.norm5.num_features)
        return model

    return operate


def transition(model: Any) -> nn.Module:
    weight = model.features.transition1.conv.weight
    conv = nn.Conv2d(*weight.shape[1::-1], 1, bias=False)
    conv.weight = weight
    model.features.transition1 = nn.Sequential(nn.ELU(inplace=True), conv, nn.AvgPool2d(2))
    return model


def before_the_transition(model: Any) -> nn.Module:
    modules = model.features._modules
    for name in list(modules):
        if name == "transition1":
            modules["limit"] = nn.Hardtanh(-1, 1, inplace=True)
        modules[name] = modules.pop(name)
    return model


def relu_of_a_transition(model: Any) -> nn.Module:
    norm = model.features.transition1.norm
    model.features.transition1.norm = nn.Sequential(nn.SiLU(inplace=True), norm)
    return model


def another_head(model: Any) -> nn.Module:
    torch.manual_seed(0)
    channels = model.features.norm5.num_features
    return nn.Sequential(
        *list(model.features.children())[:-1],
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(channels, 4).double(),
    )


class OneByOne(nn.Module):
    """The modules in turn, with something done to what every block returns."""

    def __init__(self, features: nn.Module, write: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.features = features
        self.write = write

    def forward(self, x: Tensor) -> Tensor:
        for name, module in self.features.named_children():
            x = module(x)
            if name.startswith("denseblock"):
                x = self.write(x)
        return x


def own_forward(write: Callable[[Tensor], Tensor]) -> Surgery:
    return lambda model: OneByOne(model.features, write)


def later(write: Callable[[Tensor], Any]) -> Surgery:
    """What a block was given is written to when the block is done."""

    class Later(nn.Module):
        def __init__(self, features: nn.Module) -> None:
            super().__init__()
            self.features = features

        def forward(self, x: Tensor) -> Tensor:
            for name, module in self.features.named_children():
                given, x = x, module(x)
                if name.startswith("denseblock"):
                    write(given)
            return x

    return lambda model: Later(model.features)


def hook(name: str, write: Callable[[Tensor], Any]) -> Surgery:
    def operate(model: Any) -> nn.Module:
        model.get_submodule(f"features.{name}").register_forward_hook(
            lambda module, args, output: write(output)
        )
        return model

    return operate


def pre_hook(name: str, write: Callable[[Tensor], Any]) -> Surgery:
    def operate(model: Any) -> nn.Module:
        model.get_submodule(f"features.{name}").register_forward_pre_hook(
            lambda module, args: write(args[0][0] if isinstance(args[0], list) else args[0])
        )
        return model

    return operate


def hook_after(kept_from: str, at: str) -> Surgery:
    """What one hook has kept, another writes to."""

    def operate(model: Any) -> nn.Module:
        kept: list[Tensor] = []
        hook(kept_from, kept.append)(model)
        hook(at, lambda _: double(kept.pop()))(model)
        return model

    return operate


def replaced_layer(model: Any) -> nn.Module:
    class Layer(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, features: Any) -> Tensor:
            for part in features if isinstance(features, list) else [features]:
                part.mul_(1.5)
            return self.layer(features)

    block = model.features.denseblock2
    name = list(block._modules)[1]
    setattr(block, name, Layer(getattr(block, name)))
    return model


def double(output: Tensor) -> None:
    output.mul_(2)


def zero(output: Tensor) -> None:
    output[:, 3] = 0


def zero_data(output: Tensor) -> None:
    output.data[:, 3] = 0


def zero_array(output: Tensor) -> None:
    output.detach().numpy()[:, 3] = 0


SURGERIES: dict[str, Surgery] = {
    "norm5: SiLU": last_norm(lambda channels: nn.SiLU(inplace=True)),
    "norm5: Dropout2d": last_norm(lambda channels: nn.Dropout2d(0.0, inplace=True)),
    "norm5: ReLU, norm": last_norm(
        lambda channels: nn.Sequential(nn.ReLU(inplace=True), nn.BatchNorm2d(channels)).double()
    ),
    "norm5: Identity": last_norm(lambda channels: nn.Identity()),
    "transition": transition,
    "before the transition": before_the_transition,
    "norm of a transition": relu_of_a_transition,
    "another head": another_head,
    "relu_(block(x))": own_forward(F.relu_),
    "block(x).add_(1)": own_forward(lambda x: x.add_(1)),
    "block(x).data": own_forward(lambda x: zero_data(x) or x),
    "hook": hook("denseblock1", zero),
    "hook, data": hook("denseblock1", zero_data),
    "hook, array": hook("denseblock2", zero_array),
    "hook of a layer": hook("denseblock2.denselayer2", zero_data),
    "hook of a transition": hook("transition1", zero_data),
    "hook of the pooling": hook("pool0", zero_data),
    "hook of the features": hook("norm5", zero_data),
    "pre-hook of the transition": pre_hook("transition1", double),
    "pre-hook of the last norm": pre_hook("norm5", lambda x: double(x.data)),
    "pre-hook of a layer": pre_hook("denseblock2.denselayer2", zero_data),
    "pooling's output, later": hook_after("pool0", "denseblock1"),
    "transition's output, later": hook_after("transition1", "denseblock2"),
    "a block's input, later": later(double),
    "layer": replaced_layer,
}
# These libraries' layers read the block's input itself, and say that it was written to.
READ_THE_INPUT = ("monai", "torchxrayvision")


def trains(model: nn.Module, x: Tensor) -> bool:
    try:
        model(x).square().sum().backward()
    except RuntimeError as error:
        if "modified by an inplace operation" not in str(error):
            raise
        return False
    return True


@pytest.mark.parametrize(
    ("first", "checkpoint"),
    [("convert", "none"), ("operate", "bottleneck"), ("convert", "block"), ("operate", "block")],
)
@pytest.mark.parametrize("surgery", SURGERIES)
@pytest.mark.parametrize("library", LIBRARIES)
def test_writes_to_converted_networks(
    library: str, surgery: str, first: str, checkpoint: Any
) -> None:
    operate = SURGERIES[surgery]
    reference = make(library)
    model = copy.deepcopy(reference)
    if first == "convert":
        convert(model, checkpoint=checkpoint)
    model, expected = operate(model), operate(reference)
    if first == "operate":
        convert(model, checkpoint=checkpoint)
    if library in READ_THE_INPUT and not trains(copy.deepcopy(expected), images()):
        trains(model, images())  # right or noticed
        return
    assert_same_step(model, expected, images())


# A layer of ours returns the concatenation, torchvision's its new channels alone.
@pytest.mark.parametrize("checkpoint", CHECKPOINT_MODES)
@pytest.mark.parametrize("surgery", [name for name in SURGERIES if "layer" not in name])
def test_writes_to_our_own_network(surgery: str, checkpoint: Any) -> None:
    operate = SURGERIES[surgery]
    expected, model = networks(checkpoint=checkpoint, block_config=(2, 3))
    assert_same_step(operate(model), operate(expected), images())
