"""torchvision's DenseNet in plain PyTorch, for machines without torchvision.

`install()` puts it in torchvision's place for this process: the same names, parameters and
arithmetic, memory_efficient included, for everything that compares with torchvision's.
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


def DenseNet(  # noqa: N802
    growth_rate: int = 32,
    block_config: tuple[int, ...] = (6, 12, 24, 16),
    num_init_features: int = 64,
    bn_size: int = 4,
    drop_rate: float = 0.0,
    num_classes: int = 1000,
    memory_efficient: bool = False,
) -> nn.Module:
    """The benchmarks' network of these blocks and transitions."""
    from benchmarks.networks import NetworkSpec
    from benchmarks.peers import PlainDenseNet

    sizes = (growth_rate, block_config, num_init_features)
    spec = NetworkSpec("", *sizes, 224, 1, bn_size=bn_size, num_classes=num_classes)
    network = PlainDenseNet(spec, memory_efficient=memory_efficient)
    for layer in network.modules():
        if isinstance(layer, _DenseLayer):
            layer.drop = drop_rate
    return network


def install() -> None:
    """Make this module what `import torchvision` and `torchvision.models.densenet` give."""
    names = ("torchvision", "torchvision.models", "torchvision.models.densenet")
    for name in names:
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        module.__path__ = []  # a package
        sys.modules[name] = module
    top, models, densenet = (sys.modules[name] for name in names)
    vars(top)["models"], vars(models)["densenet"] = models, densenet
    parts = (DenseNet, _DenseBlock, _DenseLayer, _Transition)
    vars(densenet).update({part.__name__: part for part in parts})
