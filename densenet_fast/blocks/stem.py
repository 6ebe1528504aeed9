"""The stem: norm, ReLU and 3-wide max-pool of stride 2 as one node, and with the convolution.

The convolution's output is the largest tensor of the network, and making it again costs little
(about a hundredth of a DenseNet-121 step): where blocks recompute, so does the stem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import autocast, nodes, norms, stem_convolution
from densenet_fast.blocks.checks import check_input, check_norm
from densenet_fast.blocks.specs import ConvGeometry, NormSpec, Tensors
from densenet_fast.operators.rows import (
    as_rows,
    empty_channels_last,
    images_of,
    rows_of,
    statistics_dtype,
)

_STEM = (
    "Tensor?[] parameters, Tensor?[] buffers, int[] conv, ScalarType stored, float eps, "
    "bool batch_statistics, str group"
)


def stem_norm_relu_maxpool(input: Tensor, norm: NormSpec) -> Tensor:
    """max_pool(relu(norm(input)), kernel 3, stride 2, padding 1) of `[N, C, *size]`.

    Keeps `input` and one byte per output element for the backward.
    """
    check_input(input)
    return _stem(input, None, None, None, input.dtype, norm)


def conv_stem(
    input: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, norm: NormSpec
) -> Tensor:
    """`stem_norm_relu_maxpool` of the convolution of `[N, Cin, *size]`, in autocast's type if on.

    Keeps `input` as it came and one byte per output element; the backward makes the convolution
    again.
    """
    stored = autocast.computed_type(input.dtype, input.device.type)
    return _stem(input, weight, bias, conv, stored, norm)


def _stem(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: ConvGeometry | None,
    stored: torch.dtype,
    norm: NormSpec,
) -> Tensor:
    numbers = [] if conv is None else [*conv.stride, *conv.padding, *conv.dilation, conv.groups]

    def finish(statistics: Tensor) -> None:
        images, channels, *size = input.shape
        if conv is not None and weight is not None:
            channels, _, *kernel = weight.shape
            size = stem_convolution.windows(size, kernel, conv.stride, conv.padding, conv.dilation)
        updates = norms.updates([norms.place(norm, channels)])
        nodes.record(statistics, updates, images * math.prod(size))

    parameters = (weight, bias, norm.weight, norm.bias)
    output: Tensor = _run(input, norm, parameters, finish, numbers, stored)
    return output


def pooled(size: Sequence[int]) -> list[int]:
    """The size behind the pooling."""
    return [(length + 1) // 2 for length in size]


class _Call:
    """The arguments behind the first ones of a stem's forward and backward."""

    def __init__(
        self,
        parameters: Tensors,
        buffers: Tensors,
        conv: Sequence[int],
        stored: torch.dtype,
        eps: float,
        batch_statistics: bool,
        group: str,
    ) -> None:
        """Make a norm and a convolution of them."""
        self.weight, self.bias, gamma, beta = parameters
        mean, var = buffers
        self.norm = NormSpec(gamma, beta, mean, var, eps, batch_statistics, None, group)
        self.stored = stored
        self.conv: ConvGeometry | None = None
        if conv:
            dims = len(conv) // 3
            stride, padding, dilation = (conv[at * dims :][:dims] for at in range(3))
            self.conv = ConvGeometry(tuple(stride), tuple(padding), tuple(dilation), conv[-1])

    def features(self, input: Tensor) -> Tensor:
        """What the norm reads."""
        if self.conv is None or self.weight is None:
            return input
        return stem_convolution.forward(input, self.conv, self.weight, self.bias, self.stored)

    def check(self, features: Tensor) -> None:
        """Refuse what the norm cannot take."""
        check_input(features)
        images, channels, *size = features.shape
        check_norm(self.norm, "norm", channels, features, (images, *size))


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stem = _Call(*args)
    features, conv = input, stem.conv
    if conv is not None and stem.weight is not None:
        weight = stem.weight.to(input.dtype)
        features = stem_convolution.convolution(input, weight, None, conv).to(stem.stored)
    stem.check(features)
    images, channels, *size = features.shape
    output = empty_channels_last((images, channels, *pooled(size)), features)
    argmax = features.new_empty(images, *pooled(size), channels, dtype=torch.uint8)
    count = norms.statistics_size(stem.norm, channels)
    return output, argmax, features.new_empty(count, dtype=statistics_dtype(features.dtype))


@nodes.node(f"(Tensor input, {_STEM}) -> (Tensor, Tensor, Tensor)", _forward_fake)
def stem_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the position of each maximum, the batch's mean and variance.

    Behind these two the number of values of a synchronised norm.
    """
    stem = _Call(*args)
    norm, features = stem.norm, stem.features(input)
    stem.check(features)
    rows = as_rows(features)
    images, *size, channels = rows.shape
    statistics = norms.statistics_of(norm, rows)
    scale, shift, _, _ = norms.of_statistics(norm, statistics, channels)
    out = empty_channels_last((images, channels, *pooled(size)), features)
    out_rows = rows_of(out)
    argmax = torch.empty(out_rows.shape, dtype=torch.uint8, device=features.device)
    operators.norm_relu_maxpool_forward(rows, scale, shift, out_rows, argmax)
    return out, argmax, statistics


def in_place(device: torch.device, *, synchronised: bool) -> bool:
    """Whether the gradient of features that were made again takes their place.

    CUDA's kernels read them once more when it is half done, as what synchronised norms do to it.
    """
    return device.type != "cuda" and not synchronised


@nodes.node(
    f"(Tensor grad_output, Tensor input, Tensor argmax, Tensor statistics, {_STEM}, "
    "bool[] needs) -> Tensor[]",
    nodes.one_norm_gradients_fake,
)
def stem_backward(
    grad_output: Tensor, input: Tensor, argmax: Tensor, statistics: Tensor, *args: Any
) -> list[Tensor]:
    """The gradients of the input and the parameters that `needs` asks for."""
    *args, needs = args  # type: ignore[assignment]
    stem = _Call(*args)
    features, norm = stem.features(input), stem.norm
    channels = features.shape[1]
    forward = norms.of_statistics(norm, statistics, channels)
    grad_gamma, grad_beta = torch.empty_like(forward.scale), torch.empty_like(forward.scale)
    rows = as_rows(features)
    if stem.conv is not None and in_place(rows.device, synchronised=bool(norm.group)):
        grad_features = images_of(rows)
    else:
        grad_features = empty_channels_last(features.shape, features)
    grad_rows = rows_of(grad_features)
    operators.norm_relu_maxpool_backward(
        as_rows(grad_output),
        argmax.contiguous(),
        rows,
        *forward,
        norm.batch_statistics and not norm.group,
        grad_rows,
        grad_gamma,
        grad_beta,
    )
    if norm.group and any(needs[:3]):
        norms.correct_(norm, forward, statistics, rows, grad_rows, grad_gamma, grad_beta)
    del features, rows  # the largest tensors there are
    before: list[Tensor | None] = [grad_features, None, None]
    if stem.conv is not None and stem.weight is not None and any(needs[:3]):
        before = stem_convolution.backward(
            grad_features, input, stem.conv, stem.weight, stem.bias, list(needs[:3])
        )
    return nodes.wanted([*before, grad_gamma, grad_beta], [input, *args[0]], needs)


_run = nodes.one_norm("the fused stem", stem_forward, stem_backward)
