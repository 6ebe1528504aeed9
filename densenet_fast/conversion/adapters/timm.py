"""timm's DenseNet, whose norms have their ReLU inside."""

from __future__ import annotations

from typing import Any

from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d
from timm.layers.norm_act import BatchNormAct2d
from timm.models import densenet
from torch import Tensor, nn

from densenet_fast.conversion.parts import ConvertedBlock, ConvertedNetwork, ConvertedTransition
from densenet_fast.modules import eligibility, fusing, layer_parts
from densenet_fast.modules.layer_parts import LayerParts


def norm_obstacle(norm: Any) -> str | None:
    """Why a norm is not a batch normalisation and a ReLU, or None."""
    modules = norm.__dict__["_modules"]
    if (found := eligibility.exactly(modules.get("drop"), nn.Identity)) is not None:
        return f"drop {found}"
    if (found := eligibility.exactly(modules.get("act"), nn.ReLU)) is not None:
        return f"act {found}"
    return None


def parts(layer: nn.Module) -> LayerParts | str:
    """A layer's parts."""
    state: Any = layer.__dict__
    modules = state["_modules"]
    try:
        norm1, conv1 = modules["norm1"], modules["conv1"]
        norm2, conv2 = modules["norm2"], modules["conv2"]
    except KeyError as missing:
        return f"{missing.args[0]} is missing"
    for name, norm in (("norm1", norm1), ("norm2", norm2)):
        if not eligibility.norm_with_relu(norm):
            return f"{name} {eligibility.other_type(norm, BatchNormAct2d)}"
    return LayerParts(norm1, conv1, norm2, conv2, (), layer_parts.dropout(state))


@eligibility.fused_as("block")
class Block(ConvertedBlock, densenet.DenseBlock):
    """timm's block."""

    converted_from = densenet.DenseBlock
    lists = True


@eligibility.fused_as("transition")
class Transition(ConvertedTransition, densenet.DenseTransition):
    """timm's transition; one with an anti-aliasing filter runs its modules."""

    converted_from = densenet.DenseTransition


class Network(ConvertedNetwork, densenet.DenseNet):
    """timm's network."""

    converted_from = densenet.DenseNet
    final = staticmethod(fusing.final_norm_with_relu_obstacle)

    def head_is_known(self) -> bool:
        """Whether the pooling is the flattened average over all pixels."""
        pool: Any = self.global_pool
        return (
            eligibility.exactly(pool, SelectAdaptivePool2d) is None
            and eligibility.exactly(pool.pool, nn.AdaptiveAvgPool2d) is None
            and pool.pool.output_size in (1, (1, 1))
            and eligibility.exactly(pool.flatten, nn.Flatten) is None
            and (pool.flatten.start_dim, pool.flatten.end_dim) == (1, -1)
        )

    def head(self, pooled: Tensor) -> Tensor:
        """Dropout and the classifier."""
        scores: Tensor = self.classifier(self.head_drop(pooled))
        return scores


layer_parts.register(densenet.DenseLayer, parts)
eligibility.register_norm_with_relu(BatchNormAct2d, norm_obstacle)
for kind in (densenet.DenseLayer, BatchNormAct2d):
    eligibility.register_out_of_place(kind)
ADAPTERS = (Block, Transition, Network)
