"""DenseNets as people write them: one mathematics under many classes, names and containers."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

START, GROWTH, WIDTH = 6, 4, 8  # channels of the first features, of a layer's, of a bottleneck
LAYERS = (2, 3)


def norm_relu_conv(channels: int, out: int, taps: int, inplace: bool = True) -> list[nn.Module]:
    conv = nn.Conv2d(channels, out, taps, padding=taps // 2, bias=False)
    return [nn.BatchNorm2d(channels), nn.ReLU(inplace), conv]


def layers_of(kind: Callable[..., nn.Module], count: int, channels: int) -> list[nn.Module]:
    return [kind(channels + GROWTH * at) for at in range(count)]


class Functional(nn.Module):
    """A layer without a module for what has no parameters."""

    newest_first = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(F.relu(self.bn1(x)))
        new = self.conv2(F.relu(self.bn2(new)))
        return torch.cat([new, x] if self.newest_first else (x, new), 1)


class NewestFirst(Functional):
    newest_first = True


class BiasedBottleneck(Functional):
    """Every convolution with the bias that it has by default."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1)
        self.conv2 = nn.Conv2d(WIDTH, GROWTH, 3, padding=1)


class WithoutBottleneck(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, GROWTH, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.bn(x), inplace=True))], dim=1)


class FunctionalTransition(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class FunctionalMaximum(FunctionalTransition):
    """The same with a bias, a dropout of nothing and a maximum."""

    def __init__(self, channels: int, out: int) -> None:
        super().__init__(channels, out)
        self.conv = nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(F.dropout(self.conv(F.relu(self.bn(x))), 0.0, self.training), 2, 2)


class Bottle(nn.Module):
    """A layer whose operations are a Sequential."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        parts = norm_relu_conv(channels, WIDTH, 1) + norm_relu_conv(WIDTH, GROWTH, 3)
        self.bottle_neck = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.bottle_neck(x)], 1)


def linear_transition(channels: int, out: int, pool: type[nn.Module] = nn.AvgPool2d) -> nn.Module:
    conv = nn.Conv2d(channels, out, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), conv, pool(2, stride=2))


def biased_linear_transition(channels: int, out: int) -> nn.Module:
    return nn.Sequential(nn.BatchNorm2d(channels), nn.Conv2d(channels, out, 1), nn.AvgPool2d(2))


class SharedReLU(nn.Module):
    """A layer with one ReLU for both norms, and dropout behind both convolutions."""

    def __init__(self, channels: int, rate: float = 0.0) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1, stride=1, padding=0, bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, GROWTH, 3, stride=1, padding=1, bias=False)
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, inplace=False, training=self.training)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.rate > 0:
            out = F.dropout(out, p=self.rate, inplace=False, training=self.training)
        return torch.cat([x, out], 1)


def kinds(dims: int) -> tuple[Any, Any, Any]:
    return (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1],
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1],
        (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)[dims - 1],
    )


class SequentialLayer(nn.Sequential):
    """A layer that is a Sequential, with dropout and concatenation in its forward."""

    def __init__(self, channels: int, dims: int, rate: float) -> None:
        conv, norm, _ = kinds(dims)
        super().__init__()
        self.add_module("norm1", norm(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", conv(channels, WIDTH, kernel_size=1, stride=1, bias=False))
        self.add_module("norm2", norm(WIDTH))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", conv(WIDTH, GROWTH, kernel_size=3, padding=1, bias=False))
        self.drop_rate = rate

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([x, new], 1)


class SequentialBlock(nn.Sequential):
    def __init__(self, count: int, channels: int, dims: int, rate: float) -> None:
        super().__init__()
        for at in range(count):
            self.add_module(f"layer{at}", SequentialLayer(channels + at * GROWTH, dims, rate))


class SequentialTransition(nn.Sequential):
    def __init__(self, channels: int, out: int, dims: int) -> None:
        conv, norm, average = kinds(dims)
        super().__init__(
            OrderedDict(
                norm=norm(channels),
                relu=nn.ReLU(inplace=True),
                conv=conv(channels, out, kernel_size=1, stride=1, bias=False),
                pool=average(kernel_size=2, stride=2),
            )
        )


class PreConv(nn.Module):
    def __init__(self, channels: int, out: int, taps: int) -> None:
        super().__init__()
        self.bn, self.activ, self.conv = norm_relu_conv(channels, out, taps)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(self.activ(self.bn(x)))


class Unit(nn.Module):
    """A layer of two modules that are norm, ReLU and convolution each."""

    def __init__(self, channels: int, rate: float = 0.0) -> None:
        super().__init__()
        self.conv1 = PreConv(channels, WIDTH, 1)
        self.conv2 = PreConv(WIDTH, GROWTH, 3)
        self.use_dropout = rate > 0
        if self.use_dropout:
            self.dropout = nn.Dropout(p=rate)

    def forward(self, x: Tensor) -> Tensor:
        identity = x
        x = self.conv2(self.conv1(x))
        if self.use_dropout:
            x = self.dropout(x)
        return torch.cat((identity, x), dim=1)


class UnitTransition(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.conv = PreConv(channels, out, 1)
        self.pool = nn.AvgPool2d(kernel_size=2, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(self.conv(x))


class OfLists(nn.Module):
    """A layer that takes the list of all features and returns its own, or checkpoints itself."""

    def __init__(self, channels: int, frugal: bool) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1, bias=False)
        self.act = nn.ReLU()
        self.norm2 = nn.BatchNorm2d(WIDTH)
        self.conv2 = nn.Conv2d(WIDTH, GROWTH, 3, padding=1, bias=False)
        self.drop_rate, self.frugal = 0.0, frugal

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(self.act(self.norm1(torch.cat(features, 1))))

    def forward(self, features: list[Tensor] | Tensor) -> Tensor:
        if isinstance(features, Tensor):
            features = [features]
        if self.frugal and any(part.requires_grad for part in features):
            new = checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            new = self.bottleneck(*features)
        new = self.conv2(self.act(self.norm2(new)))
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return new


class ListBlock(nn.Module):
    only_new = False

    def __init__(self, count: int, channels: int, frugal: bool = False) -> None:
        super().__init__()
        self.block = nn.ModuleList(layers_of(lambda c: OfLists(c, frugal), count, channels))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.block:
            features.append(layer(features))
        return torch.cat(features[1:] if self.only_new else features, 1)


class OnlyNew(ListBlock):
    only_new = True


class SegmentationBlock(nn.Module):
    """A block without bottlenecks, of convolutions with a bias and dropout of channels."""

    def __init__(self, count: int, channels: int, rate: float, only_new: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for at in range(count):
            norm, relu, _ = norm_relu_conv(channels + at * GROWTH, GROWTH, 3)
            conv = nn.Conv2d(channels + at * GROWTH, GROWTH, 3, padding=1, bias=True)
            self.layers.append(nn.Sequential(norm, relu, conv, nn.Dropout2d(rate)))
        self.only_new = only_new

    def forward(self, x: Tensor) -> Tensor:
        new = []
        for layer in self.layers:
            new.append(layer(x))
            x = torch.cat([x, new[-1]], 1)
        return torch.cat(new, 1) if self.only_new else x


class Dashed(nn.Sequential):
    """A layer that is a Sequential of names that are no identifiers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        parts = norm_relu_conv(channels, WIDTH, 1) + norm_relu_conv(WIDTH, GROWTH, 3)
        for at, part in enumerate(parts):
            self.add_module(f"{('norm', 'relu', 'conv')[at % 3]}-{1 + at // 3}", part)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, super().forward(x)], 1)


class LazyBlock(nn.Module):
    """Layers without bottleneck that learn their sizes from the first input."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.net = nn.Sequential()
        for _ in range(count):
            conv = nn.LazyConv2d(GROWTH, kernel_size=3, padding=1)
            self.net.append(nn.Sequential(nn.LazyBatchNorm2d(), nn.ReLU(), conv))

    def forward(self, X: Tensor) -> Tensor:
        for layer in self.net:
            Y = layer(X)
            X = torch.cat((X, Y), dim=1)
        return X


class SamePadding(Functional):
    """A layer with the paddings and eps of Keras."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.bn1 = nn.BatchNorm2d(channels, eps=1.001e-5)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1, padding="same", bias=False)
        self.bn2 = nn.BatchNorm2d(WIDTH, eps=1.001e-5)
        self.conv2 = nn.Conv2d(WIDTH, GROWTH, 3, padding="same", bias=False)


# Of the family, and not fused.


class Grouped(Functional):
    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.conv1 = nn.Conv2d(channels, WIDTH, 1, groups=2, bias=False)


def conv_norm_relu(channels: int, out: int, taps: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, taps, padding=taps // 2, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out), nn.ReLU(inplace=True))


class TwoWays(nn.Module):
    """A layer of two branches, of convolutions with their norm and ReLU behind."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = GROWTH // 2
        self.near = nn.Sequential(
            conv_norm_relu(channels, WIDTH, 1), conv_norm_relu(WIDTH, half, 3)
        )
        self.far = nn.Sequential(
            conv_norm_relu(channels, WIDTH, 1),
            conv_norm_relu(WIDTH, half, 3),
            conv_norm_relu(half, half, 3),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.near(x), self.far(x)], 1)


class AllAtOnce(nn.Module):
    """Convolutions one behind another, whose outputs are concatenated at the end alone."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        widths = [channels, *[GROWTH] * 3]
        self.layers = nn.ModuleList(conv_norm_relu(width, GROWTH, 3) for width in widths[:-1])
        self.concat = conv_norm_relu(sum(widths), channels + GROWTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        outputs = [x]
        for layer in self.layers:
            outputs.append(layer(outputs[-1]))
        return self.concat(torch.cat(outputs, dim=1))


class Decoder(nn.Module):
    """A layer with a grouped 5×5 convolution, and a norm and ReLU behind it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        conv = nn.Conv2d(WIDTH, GROWTH, 5, padding=2, groups=4, bias=False)
        norm, relu, _ = norm_relu_conv(WIDTH, GROWTH, 1)
        self.units = nn.ModuleList()
        self.units.append(nn.Sequential(*norm_relu_conv(channels, WIDTH, 1), norm, relu, conv))
        self.blk_bna = nn.Sequential(nn.BatchNorm2d(channels + GROWTH), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        for unit in self.units:
            x = torch.cat([x, unit(x)], 1)
        return self.blk_bna(x)


def maximum_transition(channels: int, out: int) -> nn.Module:
    return nn.Sequential(*norm_relu_conv(channels, out, 1), nn.MaxPool2d(2))


def biased_transition(channels: int, out: int) -> nn.Module:
    parts = [nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 1), nn.AvgPool2d(2)]
    return nn.Sequential(*parts)
