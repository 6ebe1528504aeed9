"""MONAI's DenseNet, in one, two and three dimensions."""

from __future__ import annotations

from typing import Any

from monai.networks.nets import densenet
from torch import Tensor, nn

from densenet_fast.conversion.parts import (
    ConvertedBlock,
    ConvertedNetwork,
    ConvertedTransition,
    averages,
)
from densenet_fast.modules import eligibility, layer_parts
from densenet_fast.modules.dimensions import MODULES, OF_TYPE
from densenet_fast.modules.layer_parts import LayerParts


def parts(layer: nn.Module) -> LayerParts | str:
    """A layer's parts, which are in a Sequential of its own."""
    layers: Any = layer.__dict__["_modules"].get("layers")
    if (found := eligibility.exactly(layers, nn.Sequential)) is not None:
        return f"layers {found}"
    modules = dict(layers.__dict__["_modules"])
    if next(reversed(modules), None) == "dropout":
        dropout = modules.pop("dropout")
        # In one dimension MONAI's is PyTorch's Dropout, of elements.
        whole = type(dropout) is not nn.Dropout
        dims = OF_TYPE.get(type(modules.get("conv1")), 2)
        found = eligibility.exactly(dropout, MODULES[dims].dropout if whole else nn.Dropout)
        if found is not None:
            return f"dropout {found}"
        share = dropout.p if dropout.training else 0.0
        return layer_parts.sequential_parts(modules, share, whole_channels=whole)
    return layer_parts.sequential_parts(modules, 0.0)


class Block(ConvertedBlock, densenet._DenseBlock):
    """MONAI's block."""


class Transition(ConvertedTransition, densenet._Transition):
    """MONAI's transition."""


class _Network(ConvertedNetwork):
    def head_is_known(self) -> bool:
        """Whether the classifier's first modules are ReLU, average over all pixels, flatten."""
        features: Any = self._modules["features"]
        layers: Any = self._modules["class_layers"]
        return (
            eligibility.exactly(layers, nn.Sequential) is None
            and list(layers._modules) == ["relu", "pool", "flatten", "out"]
            and eligibility.exactly(layers.relu, nn.ReLU) is None
            and averages(features, layers.pool, layers.flatten)
        )

    def head(self, pooled: Tensor) -> Tensor:
        """The classifier."""
        layers: Any = self._modules["class_layers"]
        scores: Tensor = layers.out(pooled)
        return scores


class Network(_Network, densenet.DenseNet):
    """MONAI's network."""


class Network121(_Network, densenet.DenseNet121):
    """MONAI's DenseNet-121."""


class Network169(_Network, densenet.DenseNet169):
    """MONAI's DenseNet-169."""


class Network201(_Network, densenet.DenseNet201):
    """MONAI's DenseNet-201."""


class Network264(_Network, densenet.DenseNet264):
    """MONAI's DenseNet-264."""


layer_parts.READERS[densenet._DenseLayer] = parts
