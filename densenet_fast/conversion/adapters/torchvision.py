"""torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models import densenet
from torchvision.ops.misc import FrozenBatchNorm2d

from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork, ConvertedTransition
from densenet_fast.modules import eligibility, layer_parts
from densenet_fast.modules.densenet import relu_and_average


class Block(ConvertedBlock, densenet._DenseBlock):
    """torchvision's block."""

    lists = True


class Transition(ConvertedTransition, densenet._Transition):
    """torchvision's transition."""


class Network(ConvertedNetwork, densenet.DenseNet):
    """torchvision's network."""

    def plain(self, input: Tensor) -> Tensor:
        """The library's forward, whose last ReLU works in place."""
        if self.relu_in_place():
            return super().plain(input)
        features: Any = self._modules["features"]
        return self.head(relu_and_average(features(input), 2))

    def head(self, pooled: Tensor) -> Tensor:
        """The classifier."""
        classifier: Any = self._modules["classifier"]
        scores: Tensor = classifier(pooled)
        return scores


layer_parts.READERS[densenet._DenseLayer] = layer_parts.usual_parts
eligibility.FROZEN_NORMS.add(FrozenBatchNorm2d)
eligibility.OUT_OF_PLACE.update((densenet._DenseLayer.forward, FrozenBatchNorm2d.forward))
