"""The stem's norm, ReLU and 3x3 max-pool of stride 2 as one autograd node."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from densenet_fast import norms, ops
from densenet_fast.block_checks import check_input, check_norm
from densenet_fast.first_order import first_order_only
from densenet_fast.layout import as_rows, empty_channels_last
from densenet_fast.norms import parameter_gradient
from densenet_fast.reference import statistics_dtype
from densenet_fast.specs import NormSpec, norm_buffers, with_norm_tensors


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
        return _forward(input, norm)[0]


def _forward(input: Tensor, norm: NormSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the position of each maximum, and the batch's mean and variance."""
    rows = as_rows(input)
    images, height, width, channels = rows.shape
    statistics = torch.empty(2, channels, dtype=statistics_dtype(input.dtype), device=input.device)
    mean, var = statistics.unbind()
    if norm.batch_statistics:
        ops.channel_statistics(rows, mean, var)
    norms.update_running_statistics(norm, mean, var, images * height * width)
    scale, shift, _, _ = norms.coefficients(norm, mean, var)
    out = empty_channels_last((images, channels, (height + 1) // 2, (width + 1) // 2), input)
    out_rows = out.permute(0, 2, 3, 1)
    argmax = torch.empty(out_rows.shape, dtype=torch.uint8, device=input.device)
    ops.norm_relu_maxpool_forward(rows, scale, shift, out_rows, argmax)
    return out, argmax, statistics


class _Stem(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, input: Tensor, norm: NormSpec, weight: Tensor | None, bias: Tensor | None
    ) -> Tensor:
        output, argmax, statistics = _forward(input, norm)
        ctx.save_for_backward(input, argmax, statistics, weight, bias, *norm_buffers(norm))
        ctx.norm = with_norm_tensors(norm, (None, None), (None, None))
        return output

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        with torch.no_grad():
            gradients = _backward(ctx, grad_outputs[0])
        behind = [*grad_outputs, *ctx.saved_tensors]
        input, weight, bias = first_order_only("the fused stem", gradients, behind)
        return input, None, weight, bias


def _backward(ctx: Any, grad_output: Tensor) -> list[Tensor | None]:
    input, argmax, statistics, weight, bias, *buffers = ctx.saved_tensors
    norm = with_norm_tensors(ctx.norm, (weight, bias), buffers)
    mean, var = statistics.unbind()
    grad_input = empty_channels_last(tuple(input.shape), input)
    grad_gamma, grad_beta = mean.new_empty(len(mean)), mean.new_empty(len(mean))
    ops.norm_relu_maxpool_backward(
        as_rows(grad_output),
        argmax.contiguous(),
        as_rows(input),
        *norms.coefficients(norm, mean, var),
        norm.batch_statistics,
        grad_input.permute(0, 2, 3, 1),
        grad_gamma,
        grad_beta,
    )
    return [
        grad_input if ctx.needs_input_grad[0] else None,
        parameter_gradient(weight, grad_gamma),
        parameter_gradient(bias, grad_beta),
    ]
