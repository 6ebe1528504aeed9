"""Every operator in plain PyTorch: the definition, and the backend of last resort.

Same signatures as the compiled operators: NHWC tensors `[N, H, W, C]`, possibly channel slices of
wider buffers, results written into tensors the caller owns. Any device and floating-point type.
Statistics and sums are float32 (float64 for float64 storage); with float16 or bfloat16 storage they
are taken of the rounded values, which the backward will read again. Weights may be float32 then.

Below, act(x) = relu(scale * x + shift) and xhat = (x - mean) * rstd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from densenet_fast.operators.philox import philox
from densenet_fast.operators.rows import statistics_dtype

PIXELS = (0, 1, 2)  # the dimensions of an NHWC tensor that statistics reduce


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(statistics_dtype(tensor.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """[N, H, W, C] as the matrix [N*H*W, C], rows a pitch apart."""
    return tensor.view(-1, tensor.shape[3])


def _nchw(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 3, 1, 2)


def _nhwc(tensor: Tensor) -> Tensor:
    return tensor.permute(0, 2, 3, 1)


def _normalised(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _wide(features), scale)


def _activation(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return _normalised(features, scale, shift).relu_()


def _masked(grad: Tensor, features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """The gradient of the normalised values: as in PyTorch's ReLU, it passes where one is NaN."""
    grad = _wide(grad)
    return torch.where(_normalised(features, scale, shift) <= 0, grad.new_zeros(()), grad)


def _norm_sums(
    grad_norm: Tensor,
    features: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
) -> None:
    """grad_beta = sum(grad_norm), grad_gamma = sum(grad_norm * xhat)."""
    grad_beta.copy_(grad_norm.sum(PIXELS))
    grad_gamma.copy_((_wide(features) - mean).mul_(grad_norm).sum(PIXELS) * rstd)


# Normalisation vectors


def channel_statistics(features: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel, in two passes."""
    values = _wide(features)
    mean.copy_(values.mean(PIXELS))
    var.copy_((values - mean).square_().mean(PIXELS))


def _optional_statistics(features: Tensor, mean: Tensor | None, var: Tensor | None) -> None:
    if mean is not None and var is not None:
        channel_statistics(features, mean, var)


def norm_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
) -> None:
    """`rstd` = 1 / sqrt(var + eps), scale = weight * rstd, shift = bias - mean * scale."""
    rstd.copy_((var + eps).sqrt_().reciprocal_())
    scale.copy_(rstd if weight is None else rstd * weight)
    shift.copy_(-mean * scale if bias is None else bias - mean * scale)


# 1x1 convolution


def conv1x1_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bottleneck: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`bottleneck` = act(features) @ weight.T, and its statistics."""
    activation = _activation(features, scale, shift).to(features.dtype)
    torch.mm(_rows(activation), weight.to(features.dtype).t(), out=_rows(bottleneck))
    _optional_statistics(bottleneck, mean, var)


def conv1x1_backward(
    grad_norm: Tensor,
    bottleneck: Tensor,
    coefficients: Tensor,
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    grad_features: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """From the gradient of norm2's output to those of conv1's weight, norm1 and the features.

    grad_bottleneck = p * grad_norm + q * bottleneck + s
    grad_weight = grad_bottleneck.T @ act(features)
    grad_norm1 = (grad_bottleneck @ weight) where act(features) > 0
    grad_features += scale * grad_norm1

    `grad_gamma` and `grad_beta` may be absent together, if `grad_features` is.
    """
    p, q, s = coefficients.unbind()
    grad_bottleneck = torch.addcmul(s, _wide(bottleneck), q).addcmul_(_wide(grad_norm), p)
    grad_rows = _rows(grad_bottleneck.to(features.dtype))
    if grad_weight is not None:
        activation = _activation(features, scale, shift).to(features.dtype)
        grad_weight.copy_(grad_rows.t() @ _rows(activation))
        del activation
    if grad_gamma is None or grad_beta is None:
        return
    grad = (grad_rows @ weight.to(features.dtype)).view(features.shape)
    grad_norm1 = _masked(grad, features, scale, shift)
    _norm_sums(grad_norm1, features, mean, rstd, grad_gamma, grad_beta)
    if grad_features is not None:
        grad_features.add_(grad_norm1.mul_(scale))


# 3x3 convolution


def conv3x3_forward(
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    growth: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`growth` = conv3x3(act(bottleneck), weight), zero padding after act, and its statistics."""
    activation = _activation(bottleneck, scale, shift).to(bottleneck.dtype)
    growth.copy_(_nhwc(F.conv2d(_nchw(activation), weight.to(activation.dtype), padding=1)))
    _optional_statistics(growth, mean, var)


def conv3x3_backward(
    grad_growth: Tensor,
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    grad_norm: Tensor | None,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    grad_weight: Tensor | None,
) -> None:
    """Gradients of the weight, of norm2's output and of norm2.

    grad_weight = correlation of act(bottleneck), padded with zeros, and grad_growth
    grad_norm = transposed conv3x3(grad_growth, weight) where act(bottleneck) > 0

    `grad_gamma` and `grad_beta` may be absent together, if `grad_norm` is.
    """
    if grad_weight is not None:
        activation = _nchw(_activation(bottleneck, scale, shift).to(bottleneck.dtype))
        size = tuple(grad_weight.shape)
        grad_weight.copy_(conv2d_weight(activation, size, _nchw(grad_growth), padding=1))
        del activation
    if grad_gamma is None or grad_beta is None:
        return
    grad = _nhwc(F.conv_transpose2d(_nchw(grad_growth), weight.to(grad_growth.dtype), padding=1))
    grad = _masked(grad, bottleneck, scale, shift)
    if grad_norm is not None:
        grad = _wide(grad_norm.copy_(grad))
    _norm_sums(grad, bottleneck, mean, rstd, grad_gamma, grad_beta)


# Dropout


def dropout_(growth: Tensor, seed: int, p: float) -> None:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Element i, in logical order, is kept where word i of the seed's stream >= floor(p * 2**32).
    """
    if p >= 1:
        growth.zero_()
        return
    keep = philox(growth.numel(), seed, growth.device) >= int(p * 2**32)
    growth.mul_(keep.view(growth.shape).to(statistics_dtype(growth.dtype)).mul_(1 / (1 - p)))


def finish_gradient(
    features: Tensor,
    grad_features: Tensor,
    mean: Tensor,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
    out: Tensor,
) -> None:
    """The deferred correction of every BatchNorm that read these channels, once for all of them.

    out = grad_features - sum_grad / M - (features - mean) * sum_grad_x / M
    """
    rows = features[..., 0].numel()
    correction = (_wide(features) - mean).mul_(sum_grad_x / rows).add_(sum_grad / rows)
    out.copy_(_wide(grad_features) - correction)


# What may follow a block: transition, or the final norm and average


def _pooled_activation(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    activation = _nchw(_activation(features, scale, shift))
    return _nhwc(F.avg_pool2d(activation, 2)).contiguous().to(features.dtype)


def transition_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`out` = avgpool2x2(act(features)) @ weight.T, and its statistics.

    Pooling commutes with the 1x1 convolution, so it comes first: a quarter of the rows remain.
    """
    pooled = _pooled_activation(features, scale, shift)
    torch.mm(_rows(pooled), weight.to(features.dtype).t(), out=_rows(out))
    _optional_statistics(out, mean, var)


def transition_backward(
    grad_out: Tensor,
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    grad_features: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    grad_weight: Tensor | None,
) -> None:
    """`grad_features` = scale * grad_norm at all pixels, 0 at those that pooling cut off."""
    rows, height, width = grad_out.shape[:3]
    if grad_weight is not None:
        pooled = _pooled_activation(features, scale, shift)
        grad_weight.copy_(_rows(grad_out).t() @ _rows(pooled))
        del pooled
    grad_pooled = _wide(_rows(grad_out) @ weight.to(features.dtype))
    grad_pooled = grad_pooled.view(rows, height, width, -1) / 4
    grad_norm = grad_pooled.new_zeros(features.shape)
    covered = grad_norm[:, : 2 * height, : 2 * width].unflatten(1, (height, 2))
    covered.unflatten(3, (width, 2)).copy_(grad_pooled[:, :, None, :, None])
    grad_norm = _masked(grad_norm, features, scale, shift)
    _norm_sums(grad_norm, features, mean, rstd, grad_gamma, grad_beta)
    grad_features.copy_(grad_norm.mul_(scale))


def norm_relu_avgpool_forward(features: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """`out` [N, C] = the average of act(features) over the pixels of each image."""
    out.copy_(_activation(features, scale, shift).mean((1, 2)))


def norm_relu_avgpool_backward(
    grad_out: Tensor,
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    grad_features: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
) -> None:
    """`grad_features` = scale * grad_norm."""
    pixels = features.shape[1] * features.shape[2]
    grad_activation = (_wide(grad_out) / pixels)[:, None, None]
    grad_norm = _masked(grad_activation, features, scale, shift)
    _norm_sums(grad_norm, features, mean, rstd, grad_gamma, grad_beta)
    grad_features.copy_(grad_norm.mul_(scale))


# Stem


def norm_relu_maxpool_forward(
    input: Tensor, scale: Tensor, shift: Tensor, out: Tensor, argmax: Tensor
) -> None:
    """Max-pool of act(input), kernel 3, stride 2, padding 1; argmax = 3 * window row + column."""
    activation = _nchw(_activation(input, scale, shift).to(input.dtype))
    pooled, index = F.max_pool2d(activation, 3, 2, padding=1, return_indices=True)
    out.copy_(_nhwc(pooled))
    height, width = index.shape[2:]
    row, column = index // input.shape[2], index % input.shape[2]
    row -= 2 * torch.arange(height, device=index.device)[:, None] - 1
    column -= 2 * torch.arange(width, device=index.device) - 1
    argmax.copy_(_nhwc(3 * row + column))


def norm_relu_maxpool_backward(
    grad_out: Tensor,
    argmax: Tensor,
    input: Tensor,
    scale: Tensor,
    shift: Tensor,
    mean: Tensor,
    rstd: Tensor,
    batch_statistics: bool,
    grad_input: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
) -> None:
    """All of the norm's backward, with batch statistics or without.

    grad_input = scale * (grad_norm - [batch_statistics] * (grad_beta + xhat * grad_gamma) / M)
    """
    images, height, width, channels = input.shape
    out_height, out_width = grad_out.shape[1:3]
    grad = _wide(grad_out)
    padded = grad.new_zeros(images, height + 2, width + 2, channels)
    for position in range(9):  # one scatter for each window position: deterministic everywhere
        row, column = divmod(position, 3)
        target = padded[:, row : row + 2 * out_height : 2, column : column + 2 * out_width : 2]
        target += torch.where(argmax == position, grad, grad.new_zeros(()))
    grad_norm = _masked(padded[:, 1:-1, 1:-1], input, scale, shift)
    _norm_sums(grad_norm, input, mean, rstd, grad_gamma, grad_beta)
    if batch_statistics:
        rows = input[..., 0].numel()
        grad_norm -= (_wide(input) - mean).mul_(rstd * grad_gamma / rows).add_(grad_beta / rows)
    grad_input.copy_(grad_norm.mul_(scale))
