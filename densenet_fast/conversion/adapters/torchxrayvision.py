"""torchxrayvision's DenseNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchxrayvision import models, utils

from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork, ConvertedTransition
from densenet_fast.modules import layer_parts
from densenet_fast.modules.densenet import relu_and_average
from densenet_fast.modules.layer_parts import LayerParts


def parts(layer: nn.Module) -> LayerParts | str:
    """A layer's parts, which are those of a Sequential with dropout behind it."""
    state = layer.__dict__
    return layer_parts.sequential_parts(state["_modules"], layer_parts.dropout(state))


class Block(ConvertedBlock, models._DenseBlock):
    """torchxrayvision's block."""


class Transition(ConvertedTransition, models._Transition):
    """torchxrayvision's transition."""


class Network(ConvertedNetwork, models.DenseNet):
    """torchxrayvision's network: resizing, sigmoid and thresholds stay its own."""

    def run(self, input: Tensor) -> Tensor:
        """The library's forward, which asks `features2` for the pooled features."""
        return self.plain(input)

    def features2(self, x: Tensor) -> Tensor:
        """The pooled features [N, C] of images [N, C, H, W]."""
        if hasattr(self, "input_resolution"):
            x = utils.fix_resolution(x, self.input_resolution, self)
            utils.warn_normalization(x)
        pooled = self.pooled(x)
        if pooled is None and self.relu_in_place():
            pooled = models.DenseNet.features2(self, x)
        elif pooled is None:
            features: Any = self._modules["features"]
            pooled = relu_and_average(features(x), 2)
        return pooled


layer_parts.READERS[models._DenseLayer] = parts
