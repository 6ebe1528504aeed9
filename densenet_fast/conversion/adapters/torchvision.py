"""torchvision's DenseNet."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torchvision.models import densenet

from densenet_fast import eligibility, layer_parts
from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork
from densenet_fast.layer_parts import LayerParts
from densenet_fast.layers import Transition as FusedTransition


def parts(layer: nn.Module) -> LayerParts | str:
    """A layer's parts: torchvision's names are ours."""
    state: Any = layer.__dict__
    return layer_parts.named_parts(
        state["_modules"], state["drop_rate"] if state["training"] else 0.0
    )


@eligibility.fused_as("block")
class Block(ConvertedBlock, densenet._DenseBlock):
    """torchvision's block."""

    converted_from = densenet._DenseBlock
    returns_growth = True


@eligibility.fused_as("transition")
class Transition(FusedTransition, densenet._Transition):
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


layer_parts.register(densenet._DenseLayer, parts)
ADAPTERS = (Block, Transition, Network)
