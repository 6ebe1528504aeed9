"""The steps that a forward consists of: a module called, or several modules fused into one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from densenet_fast import graph_block, graph_stem, stem_convolution
from densenet_fast.dense_block import conv_stem, dense_block, stem_norm_relu_maxpool
from densenet_fast.eligibility import NORMS, Norm, parameter, weight_shape
from densenet_fast.graph_library import recorded
from densenet_fast.norm_modules import StepCounts, norm_spec
from densenet_fast.specs import (
    AvgPoolTail,
    Checkpoint,
    ConvGeometry,
    LayerSpec,
    Tail,
    TransitionTail,
)

if TYPE_CHECKING:
    from densenet_fast.layer_parts import LayerParts
    from densenet_fast.layers import Transition

    FusedRun = list[LayerParts]
    Segment = FusedRun | nn.Module


class Step(Protocol):
    """One step of a forward."""

    def run(self, input: Tensor) -> Tensor:
        """The step's output."""


@dataclass
class ModuleStep:
    """A module, called as such: its hooks run, its type decides."""

    module: nn.Module

    def run(self, input: Tensor) -> Tensor:
        """The module's output."""
        return self.module(input)


@dataclass
class ConvStep:
    """A convolution in front of a fused step, which wants its input's channels innermost.

    A weight in that layout makes the convolution write its output so, without another copy of the
    images: autograd keeps them as they came.
    """

    module: nn.Conv2d

    def run(self, input: Tensor) -> Tensor:
        """The module's output."""
        state = self.module.__dict__
        weight, bias = parameter(state, "weight"), parameter(state, "bias")
        return stem_convolution.module_forward(self.module, input, weight, bias)


@dataclass
class StemStep:
    """norm0, relu0 and pool0 as one node, with the convolution where that is recomputed."""

    norm: Norm
    conv: nn.Conv2d | None = None

    def run(self, input: Tensor) -> Tensor:
        """The pooled features."""
        counts = StepCounts()
        norm = norm_spec(self.norm, counts)
        weight = bias = geometry = None
        if self.conv is not None:
            conv: Any = self.conv.__dict__
            geometry = ConvGeometry(
                conv["stride"], conv["padding"], conv["dilation"], conv["groups"]
            )
            weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
        if recorded(input):
            return graph_stem.stem(input, weight, bias, geometry, norm, counts.counters)
        with counts:
            if weight is None or geometry is None:
                return stem_norm_relu_maxpool(input, norm)
            return conv_stem(input, weight, bias, geometry, norm)


@dataclass
class DenseStep:
    """A block's segments, and what is fused behind the last of them.

    A segment is a run of layers for one fused node, or a layer to be called as a module. `tail` is
    a transition, or the norm of norm, ReLU and average over all pixels. `hold` counts the last
    layers whose bottlenecks are held for the backward (see `densenet_fast.memory_plan`). A layer
    that is called returns the features so far with its own behind them, or with `lists` its own,
    from a list of the block's input and what every layer before has added.
    """

    segments: Sequence[Segment]
    checkpoint: Checkpoint
    tail: Transition | Norm | None = None
    hold: int = 0
    lists: bool = False

    def run(self, input: Tensor) -> Tensor:
        """The concatenated features, or what the tail makes of them."""
        segments = list(self.segments)
        last: FusedRun = []
        if segments and isinstance(segments[-1], list):
            last = segments[-1]
            segments.pop()
        features = [input]
        for segment in segments:
            if isinstance(segment, list):
                widths = [part.shape[1] for part in features]
                widths += [weight_shape(layer.conv2)[0] for layer in segment]
                whole = self._fused(_joined(features), segment, None)
                features = list(whole.split(widths, 1)) if self.lists else [whole]
            elif self.lists:
                features.append(segment(features))
            else:
                features = [segment(*features)]
        if last or self.tail is not None:
            return self._fused(_joined(features), last, self.tail)
        return _joined(features)

    def _fused(self, input: Tensor, run: FusedRun, tail: Transition | Norm | None) -> Tensor:
        counts = StepCounts()
        layers = [_layer_spec(layer, counts) for layer in run]
        behind: Tail | None = None
        if isinstance(tail, NORMS):
            behind = AvgPoolTail(norm_spec(tail, counts))
        elif tail is not None:
            behind = TransitionTail(norm_spec(tail.norm, counts), tail.conv.weight)
        if recorded(input):
            return graph_block.dense_block(
                input, layers, behind, self.checkpoint, self.hold, counts.counters
            )
        with counts:
            return dense_block(
                input, layers, tail=behind, checkpoint=self.checkpoint, hold=self.hold
            )


def _joined(features: list[Tensor]) -> Tensor:
    return features[0] if len(features) == 1 else torch.cat(features, 1)


def _layer_spec(layer: LayerParts, counts: StepCounts) -> LayerSpec:
    return LayerSpec(
        norm1=norm_spec(layer.norm1, counts),
        conv1_weight=parameter(layer.conv1.__dict__, "weight"),
        norm2=norm_spec(layer.norm2, counts),
        conv2_weight=parameter(layer.conv2.__dict__, "weight"),
        dropout=layer.dropout,
    )
