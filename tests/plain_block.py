"""The oracle: a dense block and the stem as ordinary PyTorch, differentiated by autograd."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast.blocks.specs import LayerSpec, NormSpec, Tail, TransitionTail

# By the number of a tensor's dimensions.
CONVOLUTION = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
AVERAGE = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
MAXIMUM = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


def plain_norm(input: Tensor, norm: NormSpec) -> Tensor:
    update = not norm.batch_statistics or norm.momentum is not None
    return F.batch_norm(
        input,
        norm.running_mean if update else None,
        norm.running_var if update else None,
        norm.weight,
        norm.bias,
        norm.batch_statistics,
        norm.momentum or 0.0,
        norm.eps,
    )


def plain_block(
    input: Tensor,
    layers: Sequence[LayerSpec],
    tail: Tail | None = None,
    masks: Sequence[Tensor | None] = (),
    normalised: list[Tensor] | None = None,
) -> Tensor:
    """The block and its tail; `masks` are the factors of dropout, [N, k, *size] for each layer.

    `normalised` collects what the ReLUs are given.
    """

    def activation(input: Tensor, norm: NormSpec, linear: bool = False) -> Tensor:
        output = plain_norm(input, norm)
        if linear:
            return output
        if normalised is not None:
            normalised.append(output)
        return F.relu(output)

    features, convolution = input, CONVOLUTION[input.dim()]
    for index, layer in enumerate(layers):
        growth = features
        if layer.conv1_weight is not None:
            growth = convolution(activation(features, layer.norm1), layer.conv1_weight)
        active = activation(growth, layer.norm2)
        growth = convolution(active, layer.conv2_weight, layer.conv2_bias, padding=1)
        if masks and masks[index] is not None:
            growth = growth * masks[index]
        features = torch.cat([features, growth], 1)
    if tail is None:
        return features
    output = activation(features, tail.norm, isinstance(tail, TransitionTail) and tail.linear)
    if isinstance(tail, TransitionTail):
        return AVERAGE[input.dim()](convolution(output, tail.conv_weight), 2)
    return output.flatten(2).mean(2)


def plain_stem(input: Tensor, norm: NormSpec) -> Tensor:
    return MAXIMUM[input.dim()](F.relu(plain_norm(input, norm)), 3, 2, padding=1)
