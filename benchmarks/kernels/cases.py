"""Every kernel with the operands it has in a network, and the same work by PyTorch's operators."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.shapes import Shape
from densenet_fast import operators
from densenet_fast.operators.rows import empty_channels_last, row_pitch

EPS = 1e-5


@dataclass(frozen=True)
class Case:
    """One kernel on one shape."""

    flops: int  # of its products; 0 where it has none
    moved: int  # bytes
    ours: Callable[[], object]
    torch: Callable[[], Sequence[Tensor]]
    # What `ours` writes, in the order of what `torch` returns; None: no counterpart.
    results: tuple[Tensor | None, ...]


@dataclass(frozen=True)
class Norm:
    """A norm with the batch statistics of its input."""

    gamma: Tensor
    beta: Tensor
    mean: Tensor
    rstd: Tensor

    @property
    def forward(self) -> tuple[Tensor, Tensor]:
        """The scale and shift that it amounts to."""
        scale = self.gamma * self.rstd
        return scale, self.beta - self.mean * scale

    @property
    def all(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What backward kernels read."""
        return (*self.forward, self.mean, self.rstd)


class Operands:
    """Random operands from one seed."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        """Features and weights are of `dtype`, vectors of float32."""
        self.generator = torch.Generator(device).manual_seed(seed)
        self.device, self.dtype = device, dtype

    def randn(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def features(self, shape: Shape, channels: int, start: int = 0) -> Tensor:
        """Rows [N, *size, C] in a block's buffer, where other channels lie between them."""
        like = self.empty(0)
        size = (shape.images, shape.buffer, *(shape.size,) * shape.dims)
        pitch = row_pitch(shape.buffer, like.itemsize, cuda=like.is_cuda)
        buffer = empty_channels_last(size, like, pitch)
        rows = buffer.movedim(1, -1)[..., start : start + channels]
        return rows.copy_(self.rows(shape, channels))

    def rows(self, shape: Shape, channels: int, size: int | None = None) -> Tensor:
        """Dense rows [N, *size, C]."""
        size = size or shape.size
        return self.randn(shape.images, *(size,) * shape.dims, channels).to(self.dtype)

    def norm(self, rows: Tensor) -> Norm:
        """A norm of these rows."""
        var, mean = torch.var_mean(rows.float(), tuple(range(rows.dim() - 1)), correction=0)
        channels = rows.shape[-1]
        gamma, beta = 1 + 0.2 * self.randn(channels), 0.1 * self.randn(channels)
        return Norm(gamma, beta, mean, (var + EPS).rsqrt())

    def weight(self, *shape: int) -> Tensor:
        """A convolution's weight."""
        return (0.05 * self.randn(*shape)).to(self.dtype)

    def kernels(self, shape: Shape) -> Tensor:
        """Weight of a 3-wide convolution."""
        return self.weight(shape.outputs, shape.channels, *(3,) * shape.dims)

    def empty(self, *shape: int) -> Tensor:
        """Room for a result."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)

    def vectors(self, channels: int) -> tuple[Tensor, Tensor]:
        """Room for two results of each channel."""
        first, second = torch.empty(2, channels, device=self.device)
        return first, second


def make(
    kernel: str,
    shape: Shape,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> Case:
    """The kernel of that name with new operands."""
    return _MAKERS[kernel](Operands(seed, device, dtype), shape)


def _moved(*operands: Tensor | None) -> int:
    """Bytes of all operands, each of which is read or written once."""
    return sum(t.numel() * t.element_size() for t in operands if t is not None)


# ---- The usual network's operators


def _images(rows: Tensor) -> Tensor:
    """Dense channels_last images [N, C, *size] of rows."""
    return rows.contiguous().movedim(-1, 1)


_CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)
_AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
_MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)


def _by_dimensions(functions: Sequence[Callable[..., Tensor]], x: Tensor) -> Callable[..., Tensor]:
    return functions[x.dim() - 3]


def _norm_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    normalised = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    return F.relu(normalised, inplace=True)


def _conv1x1(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    kernel = weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
    return _by_dimensions(_CONVOLUTIONS, x)(_norm_relu(x, gamma, beta), kernel)


def _conv3x3(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    return _by_dimensions(_CONVOLUTIONS, x)(_norm_relu(x, gamma, beta), weight, padding=1)


def _transition(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    return _by_dimensions(_AVERAGES, x)(_conv1x1(x, gamma, beta, weight), 2)


def _max_pool(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return _by_dimensions(_MAXIMA, x)(_norm_relu(x, gamma, beta), 3, 2, padding=1)


def _usual_forward(
    function: Callable[..., Tensor], rows: Tensor, norm: Norm, *weight: Tensor
) -> Callable[[], Sequence[Tensor]]:
    x = _images(rows)

    def call() -> Sequence[Tensor]:
        with torch.no_grad():
            return (function(x, norm.gamma, norm.beta, *weight).movedim(1, -1),)

    return call


def _usual_backward(
    function: Callable[..., Tensor], rows: Tensor, norm: Norm, grad_rows: Tensor, *weight: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """Gradients of the input, the norm's parameters and the weight, over a graph that is kept."""

    @functools.cache
    def graph() -> tuple[Tensor, Sequence[Tensor], Tensor]:
        parameters = (_images(rows), norm.gamma, norm.beta, *weight)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in parameters]
        return function(*leaves), leaves, _images(grad_rows)

    def call() -> Sequence[Tensor]:
        output, leaves, gradient = graph()
        return torch.autograd.grad(output, leaves, gradient, retain_graph=True)

    return call


# ---- Kernels with products


def _conv1x1_forward(make: Operands, shape: Shape) -> Case:
    features = make.features(shape, shape.channels)
    norm, weight = make.norm(features), make.weight(shape.outputs, shape.channels)
    bottleneck = make.empty(*features.shape[:-1], shape.outputs)
    mean, var = make.vectors(shape.outputs)
    arguments = (features, *norm.forward, weight, bottleneck, mean, var)
    return Case(
        2 * shape.rows * weight.numel(),
        _moved(*arguments),
        lambda: operators.conv1x1_forward(*arguments),
        _usual_forward(_conv1x1, features, norm, weight),
        (bottleneck,),
    )


def _conv1x1_backward(make: Operands, shape: Shape) -> Case:
    features = make.features(shape, shape.channels)
    norm, weight = make.norm(features), make.weight(shape.outputs, shape.channels)
    grad_norm, bottleneck = (make.rows(shape, shape.outputs) for _ in range(2))
    coefficients = make.randn(3, shape.outputs)
    p, q, s = coefficients
    grad_bottleneck = (p * grad_norm + q * bottleneck + s).to(make.dtype)
    grad_features = make.features(shape, shape.channels)
    grad_gamma, grad_beta = make.vectors(shape.channels)
    grad_weight = torch.empty_like(weight)
    arguments = (
        *(grad_norm, bottleneck, coefficients, features, *norm.all, weight),
        *(grad_features, grad_gamma, grad_beta, grad_weight),
    )
    return Case(
        4 * shape.rows * weight.numel(),
        _moved(*arguments, grad_features),  # it is added to
        lambda: operators.conv1x1_backward(*arguments),
        _usual_backward(_conv1x1, features, norm, grad_bottleneck, weight),
        (None, grad_gamma, grad_beta, grad_weight),
    )


def _conv3x3_forward(make: Operands, shape: Shape) -> Case:
    bottleneck = make.rows(shape, shape.channels)
    norm, weight = (
        make.norm(bottleneck),
        make.weight(shape.outputs, shape.channels, *(3,) * shape.dims),
    )
    growth = make.features(shape, shape.outputs, shape.buffer - shape.outputs)
    mean, var = make.vectors(shape.outputs)
    arguments = (bottleneck, *norm.forward, weight, growth, mean, var)
    return Case(
        2 * shape.rows * weight.numel(),
        _moved(*arguments),
        lambda: operators.conv3x3_forward(*arguments),
        _usual_forward(_conv3x3, bottleneck, norm, weight),
        (growth,),
    )


def _conv3x3_backward(make: Operands, shape: Shape) -> Case:
    bottleneck = make.rows(shape, shape.channels)
    norm, weight = (
        make.norm(bottleneck),
        make.weight(shape.outputs, shape.channels, *(3,) * shape.dims),
    )
    grad_growth = make.rows(shape, shape.outputs)
    grad_norm = torch.empty_like(bottleneck)
    grad_gamma, grad_beta = make.vectors(shape.channels)
    grad_weight = torch.empty_like(weight)
    arguments = (
        *(grad_growth, bottleneck, *norm.all, weight),
        *(grad_norm, grad_gamma, grad_beta, grad_weight),
    )
    return Case(
        4 * shape.rows * weight.numel(),
        _moved(*arguments),
        lambda: operators.conv3x3_backward(*arguments),
        _usual_backward(_conv3x3, bottleneck, norm, grad_growth, weight),
        (None, grad_gamma, grad_beta, grad_weight),
    )


def _transition_forward(make: Operands, shape: Shape) -> Case:
    features = make.features(shape, shape.channels)
    norm, weight = make.norm(features), make.weight(shape.outputs, shape.channels)
    half = shape.size // 2
    out = make.empty(shape.images, *(half,) * shape.dims, shape.outputs)
    arguments = (features, *norm.forward, weight, out)
    return Case(
        2 * shape.images * half**shape.dims * weight.numel(),
        _moved(*arguments),
        lambda: operators.transition_forward(*arguments, None, None),
        _usual_forward(_transition, features, norm, weight),
        (out,),
    )


def _transition_backward(make: Operands, shape: Shape) -> Case:
    features = make.features(shape, shape.channels)
    norm, weight = make.norm(features), make.weight(shape.outputs, shape.channels)
    half = shape.size // 2
    grad_out = make.rows(shape, shape.outputs, half)
    grad_features = make.features(shape, shape.channels)
    grad_gamma, grad_beta = make.vectors(shape.channels)
    grad_weight = torch.empty_like(weight)
    arguments = (
        *(grad_out, features, *norm.all, weight),
        *(grad_features, grad_gamma, grad_beta, grad_weight),
    )
    return Case(
        4 * shape.images * half**shape.dims * weight.numel(),
        _moved(*arguments),
        lambda: operators.transition_backward(*arguments),
        _usual_backward(_transition, features, norm, grad_out, weight),
        (None, grad_gamma, grad_beta, grad_weight),
    )


# ---- Kernels without


def _channel_statistics(make: Operands, shape: Shape) -> Case:
    features = make.features(shape, shape.channels)
    mean, var = make.vectors(shape.channels)
    images = _images(features.contiguous())  # what a norm of the usual network reads is dense
    return Case(
        0,
        _moved(features, mean, var),
        lambda: operators.channel_statistics(features, mean, var),
        lambda: torch.batch_norm_update_stats(images, None, None, 0.0),
        (mean, var),
    )


def _finish_gradient(make: Operands, shape: Shape) -> Case:
    features, grad_features = (make.features(shape, shape.channels) for _ in range(2))
    mean, sum_grad, sum_grad_x = make.randn(3, shape.channels)
    out = make.empty(*features.shape)
    arguments = (features, grad_features, mean, sum_grad, sum_grad_x, out)
    slope = sum_grad_x / shape.rows
    offset = sum_grad / shape.rows - mean * slope
    return Case(
        0,
        _moved(*arguments),
        lambda: operators.finish_gradient(*arguments),
        lambda: (torch.sub(grad_features, torch.addcmul(offset, features, slope)),),
        (out,),
    )


def _pooled(make: Operands, shape: Shape) -> tuple[Tensor, Norm, Tensor, Tensor]:
    input = make.rows(shape, shape.channels)
    half = (shape.size + 1) // 2
    out = make.empty(shape.images, *(half,) * shape.dims, shape.channels)
    return input, make.norm(input), out, torch.empty_like(out, dtype=torch.uint8)


def _maxpool_forward(make: Operands, shape: Shape) -> Case:
    input, norm, out, argmax = _pooled(make, shape)
    arguments = (input, *norm.forward, out, argmax)
    return Case(
        0,
        _moved(*arguments),
        lambda: operators.norm_relu_maxpool_forward(*arguments),
        _usual_forward(_max_pool, input, norm),
        (out,),
    )


def _maxpool_backward(make: Operands, shape: Shape) -> Case:
    input, norm, out, argmax = _pooled(make, shape)
    operators.norm_relu_maxpool_forward(input, *norm.forward, out, argmax)
    grad_out, grad_input = make.rows(shape, shape.channels, out.shape[1]), torch.empty_like(input)
    grad_gamma, grad_beta = make.vectors(shape.channels)
    read, written = (grad_out, argmax, input, *norm.all), (grad_input, grad_gamma, grad_beta)
    return Case(
        0,
        _moved(*read, *written),
        lambda: operators.norm_relu_maxpool_backward(*read, True, *written),
        _usual_backward(_max_pool, input, norm, grad_out),
        (grad_input.movedim(-1, 1), grad_gamma, grad_beta),
    )


_MAKERS: dict[str, Callable[[Operands, Shape], Case]] = {
    "conv1x1_forward": _conv1x1_forward,
    "conv1x1_backward": _conv1x1_backward,
    "conv3x3_forward": _conv3x3_forward,
    "conv3x3_backward": _conv3x3_backward,
    "transition_forward": _transition_forward,
    "transition_backward": _transition_backward,
    "channel_statistics": _channel_statistics,
    "finish_gradient": _finish_gradient,
    "norm_relu_maxpool_forward": _maxpool_forward,
    "norm_relu_maxpool_backward": _maxpool_backward,
}
