"""torchvision's DenseNet in plain PyTorch, for machines without torchvision.

`install()` puts it in torchvision's place for this process: the same names, signatures, parameters
and arithmetic, memory_efficient included, for everything that compares with torchvision's.
"""

from __future__ import annotations

import importlib.machinery
import sys
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth: int, bn_size: int, drop: float, efficient: bool):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, bn_size * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(bn_size * growth)
        self.conv2 = nn.Conv2d(bn_size * growth, growth, 3, padding=1, bias=False)
        self.drop, self.efficient = drop, efficient

    def bottleneck(self, *features: Tensor) -> Tensor:
        return self.conv1(F.relu(self.norm1(torch.cat(features, 1)), inplace=True))

    def forward(self, features: list[Tensor]) -> Tensor:
        if self.efficient and any(feature.requires_grad for feature in features):
            made = checkpoint(self.bottleneck, *features, use_reentrant=False)
        else:
            made = self.bottleneck(*features)
        growth = self.conv2(F.relu(self.norm2(made), inplace=True))
        return F.dropout(growth, self.drop, self.training) if self.drop else growth


class _DenseBlock(nn.ModuleDict):
    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        for index in range(num_layers):
            channels = num_input_features + index * growth_rate
            layer = _DenseLayer(channels, growth_rate, bn_size, drop_rate, memory_efficient)
            self.add_module(f"denselayer{index + 1}", layer)

    def forward(self, features: Tensor) -> Tensor:
        found = [features]
        for layer in self.values():
            found.append(layer(found))
        return torch.cat(found, 1)


class _Transition(nn.Sequential):
    def __init__(self, num_input_features: int, num_output_features: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_input_features, num_output_features, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    """DenseNet-BC with the ImageNet stem (arXiv 1608.06993)."""

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: tuple[int, ...] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 1000,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        channels = num_init_features
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, channels, 7, 2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(channels))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, 2, padding=1))
        for index, layers in enumerate(block_config, 1):
            made = _DenseBlock(layers, channels, bn_size, growth_rate, drop_rate, memory_efficient)
            self.features.add_module(f"denseblock{index}", made)
            channels += layers * growth_rate
            if index < len(block_config):
                self.features.add_module(f"transition{index}", _Transition(channels, channels // 2))
                channels //= 2
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.classifier.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Class scores [N, num_classes] of images [N, 3, H, W]."""
        features = F.relu(self.features(images), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(features, 1).flatten(1))


def install() -> None:
    """Make this module what `import torchvision` and `torchvision.models.densenet` give."""
    names = ("torchvision", "torchvision.models", "torchvision.models.densenet")
    for name in names:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []  # a package
        sys.modules[name] = module
    top, models, densenet = (sys.modules[name] for name in names)
    top.models, models.densenet = models, densenet  # type: ignore[attr-defined]
    for part in (DenseNet, _DenseBlock, _DenseLayer, _Transition):
        setattr(densenet, part.__name__, part)
