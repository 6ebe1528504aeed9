"""Every operator in plain PyTorch: the definition, and the backend of last resort.

Same signatures as the compiled operators: rows `[N, *size, C]` of one to three sizes, possibly
channel slices of wider buffers, results written into tensors the caller owns. Any device and
floating-point type. Statistics and sums are float32 (float64 for float64 storage); with float16 or
bfloat16 storage they are of the rounded values, read again later. Weights may be float32 then.

Below, act(x) = relu(scale * x + shift), or scale * x + shift where a transition is `linear`, and
xhat = (x - mean) * rstd.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from densenet_fast.operators.philox import philox
from densenet_fast.operators.rows import images_of, rows_of, statistics_dtype

ByDimensions = dict[int, Callable[..., Any]]  # by the number of a tensor's
_AVERAGE: ByDimensions = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAXIMUM: ByDimensions = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}
_OF_WEIGHT: ByDimensions = {3: conv1d_weight, 4: conv2d_weight, 5: conv3d_weight}


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(statistics_dtype(tensor.dtype))


def _rows(tensor: Tensor) -> Tensor:
    """[N, *size, C] as the matrix of all pixels' channels, rows a pitch apart."""
    return tensor.view(-1, tensor.shape[-1])


def _pixels(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of [N, *size, C] that statistics reduce."""
    return tuple(range(tensor.dim() - 1))


def _normalised(features: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return torch.addcmul(shift, _wide(features), scale)


def _activation(features: Tensor, scale: Tensor, shift: Tensor, *, linear: bool = False) -> Tensor:
    normalised = _normalised(features, scale, shift)
    return normalised if linear else normalised.relu_()


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
    pixels = _pixels(features)
    grad_beta.copy_(grad_norm.sum(pixels))
    grad_gamma.copy_((_wide(features) - mean).mul_(grad_norm).sum(pixels) * rstd)


def channel_statistics(features: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel, in two passes."""
    values, pixels = _wide(features), _pixels(features)
    mean.copy_(values.mean(pixels))
    var.copy_((values - mean).square_().mean(pixels))


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
    activation = _rows(_activation(features, scale, shift).to(features.dtype))
    torch.mm(activation, weight.to(features.dtype).t(), out=_rows(bottleneck))
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


# Convolution with three taps in each dimension


def _geometry(images: Tensor, *, transposed: bool = False) -> tuple[Any, ...]:
    """Of a convolution that keeps the images' size, as PyTorch's operators take it."""
    one, zero = [1] * (images.dim() - 2), [0] * (images.dim() - 2)
    return one, one, one, transposed, zero, 1


def conv3x3_forward(
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    growth: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`growth` = conv3(act(bottleneck), weight), zero padding after act, and its statistics."""
    images = images_of(_activation(bottleneck, scale, shift).to(bottleneck.dtype))
    weight = weight.to(images.dtype)
    growth.copy_(rows_of(torch.convolution(images, weight, None, *_geometry(images))))
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
    accumulate: bool = False,
) -> None:
    """Gradients of the weight, of norm2's output and of norm2.

    grad_weight = correlation of act(bottleneck), padded with zeros, and grad_growth
    grad_norm = transposed conv3(grad_growth, weight) where act(bottleneck) > 0

    `grad_gamma` and `grad_beta` may be absent together, if `grad_norm` is. With `accumulate` these
    are features, of a layer without a bottleneck: grad_features += scale * grad_norm.
    """
    images = images_of(grad_growth)
    if grad_weight is not None:
        activation = images_of(_activation(bottleneck, scale, shift).to(bottleneck.dtype))
        grad, size = images, tuple(grad_weight.shape)
        if images.dim() == 5:  # PyTorch's own is wrong in bfloat16 for volumes of few slices
            activation, grad = _wide(activation), _wide(grad)
        grad_weight.copy_(_OF_WEIGHT[images.dim()](activation, size, grad, padding=1))
        del activation, grad
    if grad_gamma is None or grad_beta is None:
        return
    weight, geometry = weight.to(images.dtype), _geometry(images, transposed=True)
    grad = rows_of(torch.convolution(images, weight, None, *geometry))
    grad = _masked(grad, bottleneck, scale, shift)
    if grad_norm is not None and not accumulate:
        grad = _wide(grad_norm.copy_(grad))
    _norm_sums(grad, bottleneck, mean, rstd, grad_gamma, grad_beta)
    if grad_norm is not None and accumulate:
        grad_norm.add_(grad.mul_(scale))


def dropout_(growth: Tensor, seed: int, p: float, channels: bool = False) -> None:
    """Zero each element with probability p and scale the others by 1 / (1 - p).

    Element i, in logical order, is kept where word i of the seed's stream >= floor(p * 2**32).
    With `channels` whole channels of an image are zeroed: channel c of image n is kept by word
    n * C + c.
    """
    if p >= 1:
        growth.zero_()
        return
    images, *size, width = growth.shape
    shape = (images, *(1 if channels else length for length in size), width)
    keep = philox(math.prod(shape), seed, growth.device) >= int(p * 2**32)
    growth.mul_(keep.view(shape).to(statistics_dtype(growth.dtype)).mul_(1 / (1 - p)))


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


# What may follow a block: transition, or the final norm and average; and the stem's pooling


def _pooled_activation(features: Tensor, scale: Tensor, shift: Tensor, *, linear: bool) -> Tensor:
    activation = images_of(_activation(features, scale, shift, linear=linear))
    pooled = _AVERAGE[activation.dim()](activation, 2)
    return rows_of(pooled).contiguous().to(features.dtype)


def transition_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    linear: bool = False,
) -> None:
    """`out` = avgpool2(act(features)) @ weight.T, and its statistics.

    Pooling commutes with the 1x1 convolution, so it comes first: of images a quarter remains.
    """
    pooled = _pooled_activation(features, scale, shift, linear=linear)
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
    linear: bool = False,
) -> None:
    """`grad_features` = scale * grad_norm at all pixels, 0 at those that pooling cut off."""
    if grad_weight is not None:
        pooled = _pooled_activation(features, scale, shift, linear=linear)
        grad_weight.copy_(_rows(grad_out).t() @ _rows(pooled))
        del pooled
    grad_pooled = _wide(_rows(grad_out) @ weight.to(features.dtype))
    spread = grad_pooled.view(*grad_out.shape[:-1], -1) / 2 ** (grad_out.dim() - 2)
    grad_norm = grad_pooled.new_zeros(features.shape)
    covered = grad_norm
    for axis in reversed(range(1, grad_out.dim() - 1)):
        windows = grad_out.shape[axis]
        covered = covered.narrow(axis, 0, 2 * windows).unflatten(axis, (windows, 2))
        spread = spread.unsqueeze(axis + 1)
    covered.copy_(spread)
    grad_norm = grad_norm if linear else _masked(grad_norm, features, scale, shift)
    _norm_sums(grad_norm, features, mean, rstd, grad_gamma, grad_beta)
    grad_features.copy_(grad_norm.mul_(scale))


def norm_relu_avgpool_forward(features: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """`out` [N, C] = the average of act(features) over the pixels of each image."""
    out.copy_(_activation(features, scale, shift).mean(_pixels(features)[1:]))


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
    size = features.shape[1:-1]
    grad_activation = (_wide(grad_out) / size.numel()).view(-1, *[1] * len(size), grad_out.shape[1])
    grad_norm = _masked(grad_activation, features, scale, shift)
    _norm_sums(grad_norm, features, mean, rstd, grad_gamma, grad_beta)
    grad_features.copy_(grad_norm.mul_(scale))


def norm_relu_maxpool_forward(
    input: Tensor, scale: Tensor, shift: Tensor, out: Tensor, argmax: Tensor
) -> None:
    """Max-pool of act(input), kernel 3, stride 2, padding 1.

    `argmax` is a maximum's place in its window, a number to base 3 with one digit per dimension,
    the first dimension's in front: 3 * row + column in two dimensions.
    """
    activation = images_of(_activation(input, scale, shift).to(input.dtype))
    pooled, index = _MAXIMUM[activation.dim()](activation, 3, 2, padding=1, return_indices=True)
    out.copy_(rows_of(pooled))
    places = torch.zeros_like(index)
    for digit, axis in enumerate(reversed(range(2, index.dim()))):
        length = activation.shape[axis]
        starts = 2 * torch.arange(index.shape[axis], device=index.device) - 1
        places += 3**digit * (index % length - starts.view(-1, *[1] * digit))
        index = index // length
    argmax.copy_(rows_of(places))


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
    images, *size, channels = input.shape
    grad, windows = _wide(grad_out), grad_out.shape[1:-1]
    padded = grad.new_zeros(images, *(length + 2 for length in size), channels)
    # One scatter for each place in a window: deterministic everywhere.
    for place, starts in enumerate(product(range(3), repeat=len(size))):
        edges = zip(starts, windows, strict=True)
        reached = (slice(None), *(slice(at, at + 2 * count, 2) for at, count in edges))
        target = padded[reached]
        target += torch.where(argmax == place, grad, grad.new_zeros(()))
    inside = (slice(None), *[slice(1, -1)] * len(size))
    grad_norm = _masked(padded[inside], input, scale, shift)
    _norm_sums(grad_norm, input, mean, rstd, grad_gamma, grad_beta)
    if batch_statistics:
        rows = input[..., 0].numel()
        grad_norm -= (_wide(input) - mean).mul_(rstd * grad_gamma / rows).add_(grad_beta / rows)
    grad_input.copy_(grad_norm.mul_(scale))
