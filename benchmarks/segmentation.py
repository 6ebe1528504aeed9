"""FC-DenseNet in plain modules, under the names of `densenet_fast.FCDenseNet`."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.networks import NetworkSpec


class PlainLayer(nn.Module):
    """norm, ReLU, 3×3 convolution and dropout: the layer's channels alone."""

    def __init__(self, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, growth_rate, 3, padding=1, bias=False)
        self.drop1 = nn.Dropout(drop_rate)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, H, W] to [N, k, H, W]."""
        return self.drop1(self.conv1(self.relu1(self.norm1(features))))


class PlainBlock(nn.ModuleDict):
    """Layers that each read all features so far."""

    def __init__(self, layers: int, channels: int, growth_rate: int, drop_rate: float) -> None:
        super().__init__()
        for at in range(layers):
            read = channels + at * growth_rate
            self[f"denselayer{at + 1}"] = PlainLayer(read, growth_rate, drop_rate)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """All features, and the new ones alone."""
        new: list[Tensor] = []
        for layer in self.values():
            new.append(layer(features))
            features = torch.cat((features, new[-1]), 1)
        return features, torch.cat(new, 1)


class PlainTransitionDown(nn.Sequential):
    """norm, ReLU, 1×1 convolution, dropout and 2×2 maximum."""

    def __init__(self, channels: int, drop_rate: float) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, channels, 1, bias=False)
        self.drop = nn.Dropout(drop_rate)
        self.pool = nn.MaxPool2d(2)


class PlainTransitionUp(nn.Module):
    """3×3 transposed convolution of stride 2, cut to the skip connection's size, and that."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(channels, channels, 3, stride=2)

    def forward(self, new: Tensor, skip: Tensor) -> Tensor:
        """[N, C, H, W] and [N, C', H', W'] to [N, C + C', H', W']."""
        height, width = skip.shape[2:]
        return torch.cat((self.conv(new)[:, :, :height, :width], skip), 1)


class PlainFCDenseNet(nn.Module):
    """FC-DenseNet as anybody would write it.

    The middle one of the blocks of `spec` is the bottleneck between the paths.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        growth, rate, channels = spec.growth_rate, spec.drop_rate, spec.num_init_features
        down, middle, up = spec.paths
        self.conv0 = nn.Conv2d(spec.in_channels, channels, 3, padding=1, bias=False)
        self.down_blocks, self.transitions_down = nn.ModuleList(), nn.ModuleList()
        self.transitions_up, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        skips = []
        for layers in down:
            self.down_blocks.append(PlainBlock(layers, channels, growth, rate))
            channels += layers * growth
            skips.append(channels)
            self.transitions_down.append(PlainTransitionDown(channels, rate))
        self.bottleneck = PlainBlock(middle, channels, growth, rate)
        new = middle * growth
        for layers in up:
            self.transitions_up.append(PlainTransitionUp(new))
            channels = new + skips.pop()
            self.up_blocks.append(PlainBlock(layers, channels, growth, rate))
            new = layers * growth
            channels += new
        self.classifier = nn.Conv2d(channels, spec.num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Logits [N, num_classes, H, W] of images [N, C, H, W]."""
        x = self.conv0(images)
        skips = []
        for block, transition in zip(self.down_blocks, self.transitions_down, strict=True):
            x, _ = block(x)
            skips.append(x)
            x = transition(x)
        _, new = self.bottleneck(x)
        for up, block in zip(self.transitions_up, self.up_blocks, strict=True):
            x, new = block(up(new, skips.pop()))
        return self.classifier(x)
