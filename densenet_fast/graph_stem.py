"""The stem, with or without its convolution, as operators of a graph."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_fast import autocast, norms, stem_convolution
from densenet_fast.block_checks import check_input, check_norm
from densenet_fast.graph_library import (
    define,
    differentiable,
    handed_back,
    no_gradients,
    wanted,
    wanted_like,
)
from densenet_fast.graph_specs import filled, spread
from densenet_fast.graph_statistics import count_step
from densenet_fast.layout import empty_channels_last, statistics_dtype
from densenet_fast.specs import ConvGeometry, NormSpec, norm_buffers
from densenet_fast.stem import norm_gradients, pooled

_STEM = (
    "Tensor[] parameters, Tensor[] buffers, bool[] present, int[] conv, ScalarType stored, "
    "float eps, bool batch_statistics"
)


class _Stem:
    """The arguments behind the first ones of a stem's two operators."""

    def __init__(
        self,
        parameters: list[Tensor],
        buffers: list[Tensor],
        present: list[bool],
        conv: list[int],
        stored: torch.dtype,
        eps: float,
        batch_statistics: bool,
    ) -> None:
        """Make specs of them."""
        slots = spread([*parameters, *buffers], present)
        self.weight, self.bias, gamma, beta, mean, var = slots
        self.norm = NormSpec(gamma, beta, mean, var, eps, batch_statistics, momentum=None)
        self.stored = stored
        self.conv: ConvGeometry | None = None
        if conv:
            pairs = [(conv[at], conv[at + 1]) for at in (0, 2, 4)]
            self.conv = ConvGeometry(pairs[0], pairs[1], pairs[2], conv[6])

    def features(self, input: Tensor) -> Tensor:
        """What the norm reads."""
        if self.conv is None:
            return input
        assert self.weight is not None
        return stem_convolution.forward(input, self.conv, self.weight, self.bias, self.stored)


def _forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stem = _Stem(*args)
    features = stem.features(input)
    check_input(features)
    images, channels, height, width = features.shape
    check_norm(stem.norm, "norm", channels, features, (images, height, width))
    return pooled(features, stem.norm)[:3]


def _forward_fake(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    stem = _Stem(*args)
    features, conv = input, stem.conv
    if conv is not None:
        weight = cast(Tensor, stem.weight).to(input.dtype)
        features = F.conv2d(
            input, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups
        ).to(stem.stored)
    images, channels, height, width = features.shape
    check_norm(stem.norm, "norm", channels, features, (images, height, width))
    height, width = (height + 1) // 2, (width + 1) // 2
    output = empty_channels_last((images, channels, height, width), features)
    argmax = features.new_empty(images, height, width, channels, dtype=torch.uint8)
    statistics = features.new_empty(2, channels, dtype=statistics_dtype(features.dtype))
    return output, argmax, statistics


def _backward(
    grad_output: Tensor, input: Tensor, argmax: Tensor, statistics: Tensor, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    stem = _Stem(*args)
    norm = stem.norm
    grad_features, grad_gamma, grad_beta = norm_gradients(
        grad_output,
        stem.features(input),
        argmax,
        norm,
        norms.coefficients(norm, *statistics.unbind()),
    )
    before: list[Tensor | None] = [grad_features, None, None]
    if stem.conv is not None and any(needs[:3]):
        weight = cast(Tensor, stem.weight)
        before = stem_convolution.backward(
            grad_features, input, stem.conv, weight, stem.bias, list(needs[:3])
        )
        # In the layouts that the graph was promised, whichever the convolution has chosen.
        before = [
            None if gradient is None else gradient.contiguous(memory_format=layout)
            for gradient, layout in zip(before, _LAYOUTS, strict=True)
        ]
    tensors = [input, stem.weight, stem.bias, norm.weight, norm.bias]
    return wanted([*before, grad_gamma, grad_beta], tensors, needs)


_LAYOUTS = (torch.channels_last, torch.contiguous_format, torch.contiguous_format)


def _backward_fake(
    grad_output: Tensor, input: Tensor, argmax: Tensor, statistics: Tensor, *args: Any
) -> list[Tensor]:
    *args, needs = args  # type: ignore[assignment]
    found = []
    if needs[0]:
        images, channels, height, width = input.shape
        found.append(empty_channels_last((images, channels, height, width), input))
    return found + wanted_like(args[0], args[2], needs[1:])


_forward_operator = define(
    "stem", f"(Tensor input, {_STEM}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake
)
_backward_operator = define(
    "stem_backward",
    f"(Tensor grad_output, Tensor input, Tensor argmax, Tensor statistics, {_STEM}, "
    "bool[] needs) -> Tensor[]",
    _backward,
    _backward_fake,
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    input, parameters, buffers, *spec = inputs
    _, argmax, statistics = output
    ctx.mark_non_differentiable(argmax, statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(input, argmax, statistics, *parameters, *buffers)
    ctx.count = len(parameters)
    ctx.spec = spec
    ctx.nothing = no_gradients(inputs)


def _gradients(ctx: Any, grad_output: Tensor | None, *_: Any) -> tuple[Any, ...]:
    if grad_output is None:
        return tuple(ctx.nothing)
    input, argmax, statistics, *tensors = ctx.saved_tensors
    input_needed, parameters_needed = ctx.needs_input_grad[:2]
    needs = [bool(need) for need in spread(parameters_needed, ctx.spec[0][:4])]
    gradients = _backward_operator(
        grad_output,
        input,
        argmax,
        statistics,
        tensors[: ctx.count],
        tensors[ctx.count :],
        *ctx.spec,
        [input_needed, *needs],
    )
    return handed_back(ctx.nothing, gradients, input_needed, parameters_needed)


differentiable("stem", "the fused stem", _gradients, _save)


def stem(
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    conv: ConvGeometry | None,
    norm: NormSpec,
) -> Tensor:
    """Norm, ReLU and pooling as a part of a graph, with the counting of their step.

    With `conv` also the convolution before them, which the backward makes again.
    """
    stored = input.dtype
    numbers: list[int] = []
    if conv is not None:
        stored = autocast.computed_type(input.dtype, input.device.type)
        numbers = [*conv.stride, *conv.padding, *conv.dilation, conv.groups]
    parameters, wanted_slots = filled([weight, bias, norm.weight, norm.bias])
    buffers, given = filled(norm_buffers(norm))
    output, _, statistics = _forward_operator(
        input,
        parameters,
        buffers,
        wanted_slots + given,
        numbers,
        stored,
        norm.eps,
        norm.batch_statistics,
    )
    images, channels, height, width = input.shape
    if conv is not None:
        channels, _, *kernel = cast(Tensor, weight).shape
        height, width = stem_convolution.windows(
            (height, width), (kernel[0], kernel[1]), conv.stride, conv.padding, conv.dilation
        )
    count = images * height * width
    count_step(statistics, [(norm, 0, channels, channels)], count)
    return output
