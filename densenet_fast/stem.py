"""The stem: norm, ReLU and 3x3 max-pool of stride 2 as one node, and with the convolution.

The convolution's output is the largest tensor of the network, and making it again costs little
(about a hundredth of a DenseNet-121 step): where blocks recompute, so does the stem.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_fast import autocast, norms, ops, stem_convolution, synchronized
from densenet_fast.block_checks import check_input, check_norm
from densenet_fast.first_order import first_order_only
from densenet_fast.layout import as_rows, empty_channels_last, statistics_dtype
from densenet_fast.norms import Coefficients, parameter_gradient
from densenet_fast.specs import ConvGeometry, NormSpec, norm_buffers, with_norm_tensors


def stem_norm_relu_maxpool(input: Tensor, norm: NormSpec) -> Tensor:
    """max_pool2d(relu(norm(input)), kernel 3, stride 2, padding 1) of `[N, C, H, W]`.

    Keeps `input` and one byte per output element for the backward.
    """
    check_input(input)
    images, channels, height, width = input.shape
    check_norm(norm, "norm", channels, input, (images, height, width))
    if torch.is_grad_enabled() and (
        input.requires_grad
        or any(tensor is not None and tensor.requires_grad for tensor in (norm.weight, norm.bias))
    ):
        output: Tensor = _Stem.apply(input, norm, norm.weight, norm.bias)
        return output
    with torch.no_grad():
        return pooled(input, norm)[0]


def pooled(input: Tensor, norm: NormSpec) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The output, the position of each maximum, the batch's mean and variance.

    And the number [1] of values of a synchronised norm.
    """
    rows = as_rows(input)
    images, height, width, channels = rows.shape
    statistics = torch.empty(2, channels, dtype=statistics_dtype(input.dtype), device=input.device)
    mean, var = statistics.unbind()
    if norm.batch_statistics:
        ops.channel_statistics(rows, mean, var)
    total = None
    if norm.group is not None:
        total = mean.new_empty(1)
        synchronized.combine(norm.group, images * height * width, mean, var, total)
    scale, shift, _, _ = norms.coefficients(norm, mean, var)
    out = empty_channels_last((images, channels, (height + 1) // 2, (width + 1) // 2), input)
    out_rows = out.permute(0, 2, 3, 1)
    argmax = torch.empty(out_rows.shape, dtype=torch.uint8, device=input.device)
    ops.norm_relu_maxpool_forward(rows, scale, shift, out_rows, argmax)
    seen = norms.Seen(norm, mean, var, total)
    norms.record(*norms.updates([seen], images * height * width))
    return out, argmax, statistics, total


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, norm: NormSpec, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        output, *kept = pooled(input, norm)
        ctx.save_for_backward(input, *kept, weight, bias, *norm_buffers(norm))
        ctx.norm = with_norm_tensors(norm, (None, None), (None, None))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        with torch.no_grad():
            saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses a second reading
            gradients = _backward(ctx, saved, grad_outputs[0])
        behind = [*grad_outputs, *saved]
        input, weight, bias = first_order_only("the fused stem", gradients, behind)
        return input, None, weight, bias


def _backward(ctx: Any, saved: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    input, argmax, statistics, total, weight, bias, *buffers = saved
    norm = with_norm_tensors(ctx.norm, (weight, bias), buffers)
    forward = norms.coefficients(norm, *statistics.unbind())
    needed = ctx.needs_input_grad[0]
    grad_input, grad_gamma, grad_beta = norm_gradients(
        grad_output, input, argmax, norm, forward, total, needed
    )
    return [
        grad_input if needed else None,
        parameter_gradient(weight, grad_gamma),
        parameter_gradient(bias, grad_beta),
    ]


def norm_gradients(
    grad_output: Tensor,
    input: Tensor,
    argmax: Tensor,
    norm: NormSpec,
    forward: Coefficients,
    total: Tensor | None = None,
    input_needed: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the norm's input, and of its weight and bias."""
    images, channels, height, width = input.shape
    grad_input = empty_channels_last((images, channels, height, width), input)
    grad_gamma, grad_beta = torch.empty_like(forward.scale), torch.empty_like(forward.scale)
    features, grad_features = as_rows(input), grad_input.permute(0, 2, 3, 1)
    ops.norm_relu_maxpool_backward(
        as_rows(grad_output),
        argmax.contiguous(),
        features,
        *forward,
        norm.batch_statistics and norm.group is None,
        grad_features,
        grad_gamma,
        grad_beta,
    )
    if norm.group is not None and total is not None and input_needed:
        # The correction for the batch's statistics, with the sums of all ranks.
        sums = torch.stack((grad_beta, forward.rstd * grad_gamma)).mul_(forward.scale)
        sums = synchronized.mean_over_ranks(norm.group, sums, total).mul_(images * height * width)
        ops.finish_gradient(features, grad_features, forward.mean, sums[0], sums[1], grad_features)
    return grad_input, grad_gamma, grad_beta


def conv_stem(
    input: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry, norm: NormSpec
) -> Tensor:
    """`stem_norm_relu_maxpool` of the convolution of `[N, Cin, H, W]`, in autocast's type if on.

    Keeps `input` as it came and one byte per output element; the backward makes the convolution
    again.
    """
    tensors = (weight, bias, norm.weight, norm.bias)
    stored = autocast.computed_type(input.dtype, input.device.type)
    with autocast.disabled(input.device.type):
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (input, *tensors)
        ):
            output: Tensor = _ConvStem.apply(input, stored, conv, norm, *tensors)
            return output
        with torch.no_grad():
            features = stem_convolution.forward(input, conv, weight, bias, stored)
            return stem_norm_relu_maxpool(features, norm)


class _ConvStem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        stored: torch.dtype,
        conv: ConvGeometry,
        norm: NormSpec,
        *parameters: Tensor | None,
    ) -> Tensor:
        weight, bias = parameters[:2]
        assert weight is not None
        features = stem_convolution.forward(input, conv, weight, bias, stored)
        check_input(features)
        images, channels, height, width = features.shape
        check_norm(norm, "norm", channels, features, (images, height, width))
        output, *kept = pooled(features, norm)
        ctx.save_for_backward(input, *kept, *parameters, *norm_buffers(norm))
        ctx.norm = with_norm_tensors(norm, (None, None), (None, None))
        ctx.conv = conv
        ctx.stored = stored
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        with torch.no_grad(), autocast.disabled(grad_outputs[0].device.type):
            saved = ctx.saved_tensors  # once, as above
            gradients = _conv_stem_backward(ctx, saved, grad_outputs[0])
        behind = [*grad_outputs, *saved]
        input, *parameters = first_order_only("the fused stem", gradients, behind)
        return input, None, None, None, *parameters


def _conv_stem_backward(ctx: Any, saved: Sequence[Any], grad_output: Tensor) -> list[Tensor | None]:
    input, argmax, statistics, total, weight, bias, gamma, beta, *buffers = saved
    conv: ConvGeometry = ctx.conv
    norm = with_norm_tensors(ctx.norm, (gamma, beta), buffers)
    wanted = [ctx.needs_input_grad[i] for i in (0, 4, 5)]
    grad_features, grad_gamma, grad_beta = norm_gradients(
        grad_output,
        stem_convolution.forward(input, conv, weight, bias, ctx.stored),
        argmax,
        norm,
        norms.coefficients(norm, *statistics.unbind()),
        total,
        any(wanted),
    )
    gradients: list[Tensor | None] = [None, None, None]
    if any(wanted):
        gradients = stem_convolution.backward(grad_features, input, conv, weight, bias, wanted)
    return [
        *gradients,
        parameter_gradient(gamma, grad_gamma),
        parameter_gradient(beta, grad_beta),
    ]
