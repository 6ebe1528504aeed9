"""Other libraries' DenseNets, compiled networks, and ResNets: what the `networks` suite adds.

All DenseNets have the weights of the naive network; a ResNet is another family with its own.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from benchmarks.networks import NetworkSpec

State = Mapping[str, Tensor]


def build_monai(spec: NetworkSpec) -> nn.Module:
    """MONAI's DenseNet, of any dimensions; its transitions keep half the channels."""
    nets: Any = importlib.import_module("monai.networks.nets")
    network: nn.Module = nets.DenseNet(
        spatial_dims=spec.dims,
        in_channels=spec.in_channels,
        out_channels=spec.num_classes,
        init_features=spec.num_init_features,
        growth_rate=spec.growth_rate,
        block_config=spec.block_config,
        bn_size=spec.bn_size,
    )
    return network


def torchvision_state(state: State) -> dict[str, Tensor]:
    """MONAI's keys as torchvision calls them."""
    return {
        key.replace(".layers.", ".").replace("class_layers.out.", "classifier."): tensor
        for key, tensor in state.items()
    }


def monai_state(state: State) -> dict[str, Tensor]:
    """torchvision's keys as MONAI calls them."""
    return {
        re.sub(r"(denselayer\d+)\.", r"\1.layers.", key).replace(
            "classifier.", "class_layers.out."
        ): tensor
        for key, tensor in state.items()
    }


def build_timm(spec: NetworkSpec) -> nn.Module:
    """timm's DenseNet, which has torchvision's keys."""
    densenet: Any = importlib.import_module("timm.models.densenet")
    network: nn.Module = densenet.DenseNet(
        growth_rate=spec.growth_rate,
        block_config=spec.block_config,
        num_classes=spec.num_classes,
        in_chans=spec.in_channels,
        bn_size=spec.bn_size,
    )
    return network


def build_resnet(name: str, spec: NetworkSpec) -> nn.Module:
    """torchvision's ResNet of that name."""
    models: Any = importlib.import_module("torchvision.models")
    network: nn.Module = getattr(models, name)(num_classes=spec.num_classes)
    return network


def like_torchvision(spec: NetworkSpec) -> bool:
    """Whether other libraries assemble this network: ImageNet's stem, halving transitions."""
    usual = not spec.small_inputs and spec.in_channels == 3 and spec.compression == 0.5
    return usual and not spec.segmentation


def like_timm(spec: NetworkSpec) -> bool:
    """Whether timm does, whose first convolution always has 64 channels."""
    return like_torchvision(spec) and spec.num_init_features == 64


def beside_resnets(spec: NetworkSpec) -> bool:
    """DenseNet-121 stands for its family beside the other one."""
    return like_torchvision(spec) and spec.block_config == (6, 12, 24, 16)
