"""torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torchvision.models import densenet

from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork, ConvertedTransition
from densenet_fast.modules import eligibility, layer_parts


@eligibility.fused_as("block")
class Block(ConvertedBlock, densenet._DenseBlock):
    """torchvision's block."""

    converted_from = densenet._DenseBlock
    lists = True


@eligibility.fused_as("transition")
class Transition(ConvertedTransition, densenet._Transition):
    """torchvision's transition."""

    converted_from = densenet._Transition


class Network(ConvertedNetwork, densenet.DenseNet):
    """torchvision's network."""

    converted_from = densenet.DenseNet

    def head(self, pooled: Tensor) -> Tensor:
        """The classifier."""
        classifier: Any = self._modules["classifier"]
        scores: Tensor = classifier(pooled)
        return scores


layer_parts.register(densenet._DenseLayer, layer_parts.usual_parts)
eligibility.register_out_of_place(densenet._DenseLayer)
ADAPTERS = (Block, Transition, Network)
