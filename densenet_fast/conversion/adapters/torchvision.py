"""torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models import densenet

from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork, ConvertedTransition
from densenet_fast.modules import eligibility, layer_parts


class Block(ConvertedBlock, densenet._DenseBlock):
    """torchvision's block."""

    lists = True


class Transition(ConvertedTransition, densenet._Transition):
    """torchvision's transition."""


class Network(ConvertedNetwork, densenet.DenseNet):
    """torchvision's network."""

    def head(self, pooled: Tensor) -> Tensor:
        """The classifier."""
        classifier: Any = self._modules["classifier"]
        scores: Tensor = classifier(pooled)
        return scores


layer_parts.READERS[densenet._DenseLayer] = layer_parts.usual_parts
eligibility.OUT_OF_PLACE.add(densenet._DenseLayer.forward)
