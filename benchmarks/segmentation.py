"""FC-DenseNet in plain modules, under the names of `densenet_fast.FCDenseNet`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.networks import NetworkSpec


def of(dims: int, name: str) -> Any:
    """PyTorch's module of this name for images of so many dimensions."""
    return getattr(nn, f"{name}{dims}d")


class PlainLayer(nn.Module):
    """norm, ReLU, 3×3 convolution and dropout: the layer's channels alone."""

    def __init__(self, channels: int, growth_rate: int, drop_rate: float, dims: int) -> None:
        super().__init__()
        self.norm1 = of(dims, "BatchNorm")(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = of(dims, "Conv")(channels, growth_rate, 3, padding=1, bias=False)
        self.drop1 = nn.Dropout(drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] to [N, k, H, W]."""
        return self.drop1(self.conv1(self.relu1(self.norm1(features))))


class PlainBlock(nn.ModuleDict):
    """Layers that each read all features so far; returns these or, with `only_new`, the layers'."""

    def __init__(
        self,
        layers: int,
        channels: int,
        growth_rate: int,
        drop_rate: float,
        dims: int,
        *,
        only_new: bool = False,
    ) -> None:
        super().__init__()
        for at in range(layers):
            read = channels + at * growth_rate
            self[f"denselayer{at + 1}"] = PlainLayer(read, growth_rate, drop_rate, dims)
        self.only_new = only_new

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] to [N, C + layers * k, H, W], or to [N, layers * k, H, W]."""
        new: list[Tensor] = []
        for layer in self.values():
            new.append(layer(features))
            features = torch.cat((features, new[-1]), 1)
        return torch.cat(new, 1) if self.only_new else features


class PlainTransitionDown(nn.Sequential):
    """norm, ReLU, 1×1 convolution, dropout and 2×2 maximum."""

    def __init__(self, channels: int, drop_rate: float, dims: int) -> None:
        super().__init__()
        self.norm = of(dims, "BatchNorm")(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = of(dims, "Conv")(channels, channels, 1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.pool = of(dims, "MaxPool")(2)


class PlainTransitionUp(nn.Module):
    """3×3 transposed convolution of stride 2, cut to the skip connection's size, and that."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.conv = of(dims, "ConvTranspose")(channels, channels, 3, stride=2)

    def forward(self, new: Tensor, skip: Tensor) -> Tensor:
        """[N, C, H, W] and [N, C', H', W'] to [N, C + C', H', W']."""
        cut = (slice(None), slice(None), *map(slice, skip.shape[2:]))
        return torch.cat((self.conv(new)[cut], skip), 1)


class PlainFCDenseNet(nn.Module):
    """FC-DenseNet as anybody would write it.

    The middle one of the blocks of `spec` is the bottleneck between the paths.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        growth, rate, channels = spec.growth_rate, spec.drop_rate, spec.num_init_features
        (down, middle, up), dims = spec.paths, spec.dims
        self.conv0 = of(dims, "Conv")(spec.in_channels, channels, 3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        skips = []
        for layers in down:
            self.down_blocks.append(PlainBlock(layers, channels, growth, rate, dims))
            channels += layers * growth
            skips.append(channels)
            self.transitions_down.append(PlainTransitionDown(channels, rate, dims))
        self.bottleneck = PlainBlock(middle, channels, growth, rate, dims, only_new=True)
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        new = middle * growth
        for at, layers in enumerate(up, 1):
            self.transitions_up.append(PlainTransitionUp(new, dims))
            channels = new + skips.pop()
            block = PlainBlock(layers, channels, growth, rate, dims, only_new=at < len(up))
            self.up_blocks.append(block)
            new = layers * growth
            channels += new
        self.classifier = of(dims, "Conv")(channels, spec.num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes, H, W] of images [N, C, H, W]."""
        x = self.conv0(images)
        skips = []
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            x = block(x)
            skips.append(x)
            x = transition(x)
        x = self.bottleneck(x)
        for up, block in zip(self.transitions_up, self.up_blocks, strict=True):
            x = block(up(x, skips.pop()))
        return self.classifier(x)
