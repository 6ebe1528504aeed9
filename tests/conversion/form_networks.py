"""Networks of layers, blocks and transitions in many forms; and what tests do with them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
import torch.nn.functional as F
from forms import (
    GROWTH,
    LAYERS,
    START,
    AllAtOnce,
    BiasedBottleneck,
    Bottle,
    Dashed,
    Decoder,
    Functional,
    FunctionalMaximum,
    FunctionalTransition,
    Grouped,
    LazyBlock,
    ListBlock,
    NewestFirst,
    SamePadding,
    SegmentationBlock,
    SequentialBlock,
    SequentialTransition,
    SharedReLU,
    TwoWays,
    Unit,
    UnitTransition,
    WithoutBottleneck,
    biased_linear_transition,
    biased_transition,
    kinds,
    layers_of,
    linear_transition,
    maximum_transition,
    norm_relu_conv,
)
from library_networks import images
from torch import Tensor, nn


class Small(nn.Module):
    """Stages and transitions called one after another, as networks for small images do."""

    def __init__(self, layer: type[nn.Module], transition: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, START, 3, padding=1, bias=False)
        self.dense1 = nn.Sequential(*layers_of(layer, LAYERS[0], START))
        channels = START + GROWTH * LAYERS[0]
        self.trans1 = transition(channels, channels // 2)
        channels //= 2
        self.dense2 = nn.Sequential(*layers_of(layer, LAYERS[1], channels))
        channels += GROWTH * LAYERS[1]
        self.bn = nn.BatchNorm2d(channels)
        self.linear = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.trans1(self.dense1(self.conv1(x)))
        out = F.relu(self.bn(self.dense2(out)))
        out = F.avg_pool2d(out, 4)
        return self.linear(out.view(out.size(0), -1))


def bottles() -> nn.Module:
    """All features in one Sequential, transitions without a ReLU."""
    channels = START + GROWTH * LAYERS[0]
    features = nn.Sequential()
    features.add_module("layers_0", nn.Sequential(*layers_of(Bottle, LAYERS[0], START)))
    features.add_module("down_0", linear_transition(channels, channels // 2))
    channels //= 2
    features.add_module("layers_1", nn.Sequential(*layers_of(Bottle, LAYERS[1], channels)))
    channels += GROWTH * LAYERS[1]
    features.add_module("bn", nn.BatchNorm2d(channels))
    features.add_module("relu", nn.ReLU(inplace=True))
    stem = nn.Conv2d(3, START, 3, padding=1, bias=False)
    head = [nn.AvgPool2d(4), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(OrderedDict(conv1=stem, features=features, head=nn.Sequential(*head)))


class Wrapped(nn.Module):
    """A block around a Sequential."""

    def __init__(self, count: int, channels: int, rate: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(*layers_of(lambda c: SharedReLU(c, rate), count, channels))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def wrapped(rate: float = 0.0) -> nn.Module:
    network = Small(SharedReLU, FunctionalTransition)
    network.dense1 = Wrapped(LAYERS[0], START, rate)
    network.dense2 = Wrapped(LAYERS[1], (START + GROWTH * LAYERS[0]) // 2, rate)
    return network


class OfSequentials(nn.Module):
    """Everything below `features`, as torchvision's network was at first."""

    def __init__(self, dims: int = 2, rate: float = 0.0) -> None:
        super().__init__()
        conv, norm, _ = kinds(dims)
        self.dims = dims
        parts: dict[str, nn.Module] = OrderedDict(conv0=conv(3, START, 3, padding=1, bias=False))
        channels = START
        for at, count in enumerate(LAYERS):
            parts[f"block{at}"] = SequentialBlock(count, channels, dims, rate)
            channels += count * GROWTH
            if at < len(LAYERS) - 1:
                parts[f"down{at}"] = SequentialTransition(channels, channels // 2, dims)
                channels //= 2
        parts["norm_final"] = norm(channels)
        self.features = nn.Sequential(parts)
        self.classifier = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = F.relu(self.features(x), inplace=True)
        return self.classifier(features.flatten(2).mean(2))


class StageWithTransition(nn.Module):
    """Stages that end with their transition, in one Sequential."""

    def __init__(
        self,
        layer: type[nn.Module],
        transition: Callable[..., nn.Module] = FunctionalTransition,
    ) -> None:
        super().__init__()
        channels = START + GROWTH * LAYERS[0]
        self.conv = nn.Conv2d(3, START, 3, padding=1, bias=False)
        self.stage1 = nn.Sequential()
        for at, part in enumerate(layers_of(layer, LAYERS[0], START)):
            self.stage1.add_module(f"block{at + 1}", part)
        self.stage1.add_module("transition", transition(channels, channels // 2))
        self.stage2 = nn.Sequential(*layers_of(layer, LAYERS[1], channels // 2))
        channels = channels // 2 + GROWTH * LAYERS[1]
        self.bn = nn.BatchNorm2d(channels)
        self.fc = nn.Linear(channels, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stage2(self.stage1(self.conv(x)))
        x = F.adaptive_avg_pool2d(F.relu(self.bn(x), inplace=True), output_size=1)
        return self.fc(x.view(x.size(0), -1))


def units(rate: float = 0.0) -> nn.Module:
    """Stages that start with the transition of the stage before."""
    channels = START + GROWTH * LAYERS[0]
    first = nn.Sequential(*layers_of(lambda c: Unit(c, rate), LAYERS[0], START))
    second = nn.Sequential(UnitTransition(channels, channels // 2))
    for part in layers_of(lambda c: Unit(c, rate), LAYERS[1], channels // 2):
        second.append(part)
    channels = channels // 2 + GROWTH * LAYERS[1]
    post = nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True))
    init = nn.Sequential(nn.Conv2d(3, START, 3, padding=1), *norm_relu_conv(START, START, 1)[:2])
    features = OrderedDict(init=init, stage1=first, stage2=second, post=post)
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 5)]
    return nn.Sequential(nn.Sequential(features), *head)


class Backbone(nn.Module):
    """Stages and transitions in lists, the outputs of all of them returned."""

    def __init__(self, frugal: bool = False) -> None:
        super().__init__()
        channels = START + GROWTH * LAYERS[0]
        self.act = nn.ReLU()
        stem = nn.Conv2d(3, START, 3, padding=1, bias=False)
        pool = nn.MaxPool2d(3, 2, 1)
        self.stem = nn.Sequential(stem, nn.BatchNorm2d(START), self.act, pool)
        self.stages = nn.ModuleList([ListBlock(LAYERS[0], START, frugal)])
        self.stages.append(ListBlock(LAYERS[1], channels // 2, frugal))
        behind = nn.BatchNorm2d(channels // 2 + GROWTH * LAYERS[1])
        self.transitions = nn.ModuleList([SequentialTransition(channels, channels // 2, 2)])
        self.transitions.append(nn.Sequential(behind, self.act))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        found = []
        for stage, transition in zip(self.stages, self.transitions, strict=True):
            x = transition(stage(x))
            found.append(x)
        return tuple(found)


def layers_alone(layer: type[nn.Module]) -> nn.Module:
    stem = nn.Conv2d(3, START, 3, padding=1, bias=False)
    return nn.Sequential(stem, nn.Sequential(*layers_of(layer, 2, START)))


def lazy() -> nn.Module:
    """Everything in one Sequential, of modules that have learned their sizes."""
    channels = (START + GROWTH * LAYERS[0]) // 2
    conv = nn.LazyConv2d(channels, kernel_size=1)
    down = nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), conv, nn.AvgPool2d(2, stride=2))
    network = nn.Sequential(
        OrderedDict(
            stem=nn.LazyConv2d(START, kernel_size=3, padding=1),
            block0=LazyBlock(LAYERS[0]),
            down0=down,
            block1=LazyBlock(LAYERS[1]),
            norm=nn.LazyBatchNorm2d(),
            relu=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d((1, 1)),
            flat=nn.Flatten(),
            last=nn.LazyLinear(5),
        )
    )
    network(torch.zeros(1, 3, 8, 8))
    return network


class Segmentation(nn.Module):
    """A path down, one up, and the features in between handed over."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        channels = START + 2 * GROWTH
        self.first = nn.Conv2d(3, START, 3, padding=1)
        self.down = SegmentationBlock(2, START, rate, only_new=False)
        parts = [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1)]
        self.transition = nn.Sequential(*parts, nn.Dropout2d(rate), nn.MaxPool2d(2))
        self.middle = SegmentationBlock(2, channels, rate, only_new=True)
        self.up = nn.ConvTranspose2d(2 * GROWTH, 2 * GROWTH, 2, 2)
        self.behind = SegmentationBlock(2, channels + 2 * GROWTH, rate, only_new=False)
        self.last = nn.Conv2d(channels + 4 * GROWTH, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(self.first(x))
        x = self.up(self.middle(self.transition(skip)))
        return self.last(self.behind(torch.cat([x, skip], 1)))


FORMS: dict[str, Callable[[], nn.Module]] = {
    "functional": lambda: Small(Functional, FunctionalTransition),
    "newest first": lambda: Small(NewestFirst, FunctionalTransition),
    "without bottleneck": lambda: Small(WithoutBottleneck, FunctionalTransition),
    "bottles": bottles,
    "wrapped": wrapped,
    "wrapped, dropout": lambda: wrapped(0.2),
    "sequentials": OfSequentials,
    "sequentials in 1-D": lambda: OfSequentials(1),
    "sequentials in 3-D": lambda: OfSequentials(3),
    "stages with transitions": lambda: StageWithTransition(SharedReLU),
    "stages without bottleneck": lambda: StageWithTransition(WithoutBottleneck),
    "stages with maxima": lambda: StageWithTransition(SharedReLU, maximum_transition),
    "newest first, maxima": lambda: StageWithTransition(NewestFirst, maximum_transition),
    "newest first, linear": lambda: StageWithTransition(NewestFirst, biased_linear_transition),
    "linear maximum": lambda: Small(
        Functional, lambda *sizes: linear_transition(*sizes, nn.MaxPool2d)
    ),
    "units": units,
    "lists": Backbone,
    "lists, frugal": lambda: Backbone(frugal=True),
    "maximum": lambda: Small(Functional, maximum_transition),
    "functional maximum": lambda: Small(WithoutBottleneck, FunctionalMaximum),
    "biased": lambda: Small(BiasedBottleneck, biased_transition),
    "biased transition": lambda: Small(NewestFirst, biased_transition),
    "dashed": lambda: StageWithTransition(Dashed),
    "lazy": lazy,
    "same padding": lambda: Small(SamePadding, FunctionalTransition),
    "grouped": lambda: layers_alone(Grouped),
    "two ways": lambda: layers_alone(TwoWays),
    "all at once": lambda: layers_alone(AllAtOnce),
    "decoder": lambda: layers_alone(Decoder),
    "segmentation": lambda: Segmentation(0.0),
    "segmentation, dropout": lambda: Segmentation(0.2),
}


class First(nn.Module):
    """A network with one output: of several the last one."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor:
        output = self.network(x)
        return output[-1] if isinstance(output, tuple) else output


def make(form: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return FORMS[form]().double()


def input_of(network: nn.Module, seed: int = 0) -> Tensor:
    dims = getattr(network, "dims", 2)
    return images(seed, (2, 3, *[8] * dims))
