"""timm's DenseNet, whose norms have their ReLU inside."""

from __future__ import annotations

from typing import Any

from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.norm_act import BatchNormAct2d, FrozenBatchNormAct2d
from timm.models import densenet
from torch import Tensor, nn

from densenet_fast.conversion.parts import (
    ConvertedBlock,
    ConvertedNetwork,
    ConvertedTransition,
    averages,
)
from densenet_fast.modules import eligibility, layer_parts
from densenet_fast.modules.eligibility import named
from densenet_fast.modules.layer_parts import LayerParts


def norm_obstacle(norm: Any) -> str | None:
    """Why a norm is not a batch normalisation and a ReLU, or None."""
    modules = norm.__dict__["_modules"]
    found = named("drop", eligibility.exactly(modules.get("drop"), nn.Identity))
    return found or named("act", eligibility.exactly(modules.get("act"), nn.ReLU))


def parts(layer: nn.Module) -> LayerParts | str:
    """A layer's parts."""
    state = layer.__dict__
    for name in ("norm1", "norm2"):
        norm = state["_modules"].get(name)
        if not eligibility.norm_with_relu(norm):
            return f"{name} {eligibility.other_type(norm, BatchNormAct2d)}"
    return layer_parts.named_parts(state["_modules"], layer_parts.dropout(state), ())


class Block(ConvertedBlock, densenet.DenseBlock):
    """timm's block."""

    lists = True


class Transition(ConvertedTransition, densenet.DenseTransition):
    """timm's transition; one with an anti-aliasing filter runs its modules."""


class Network(ConvertedNetwork, densenet.DenseNet):
    """timm's network."""

    pooling = "average"

    def head_is_known(self) -> bool:
        """Whether the pooling is the flattened average over all pixels."""
        features: Any = self._modules["features"]
        pool: Any = self.global_pool
        known = eligibility.exactly(pool, SelectAdaptivePool2d) is None
        return known and averages(features, pool.pool, pool.flatten)

    def head(self, pooled: Tensor) -> Tensor:
        """Dropout and the classifier."""
        scores: Tensor = self.classifier(self.head_drop(pooled))
        return scores


layer_parts.READERS[densenet.DenseLayer] = parts
eligibility.NORMS_WITH_RELU.update(
    {BatchNormAct2d: norm_obstacle, FrozenBatchNormAct2d: norm_obstacle}
)
eligibility.FROZEN_NORMS.add(FrozenBatchNormAct2d)
eligibility.OUT_OF_PLACE.update(
    kind.forward for kind in (densenet.DenseLayer, BatchNormAct2d, FrozenBatchNormAct2d)
)
