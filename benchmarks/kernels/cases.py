"""Every kernel with the operands it has in a network, and the same work by PyTorch's operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.shapes import Shape
from densenet_fast import operators
from densenet_fast.operators.rows import empty_channels_last, row_pitch

EPS = 1e-5
Product = Callable[..., Tensor]  # norm, ReLU and convolution by PyTorch's operators


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


def _of_dimensions(name: str, x: Tensor) -> Product:
    """PyTorch's function of that name for images of as many dimensions."""
    function: Product = getattr(F, f"{name}{x.dim() - 2}d")
    return function


def _norm_relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    normalised = F.batch_norm(x, None, None, gamma, beta, training=True, eps=EPS)
    return F.relu(normalised, inplace=True)


def _conv1x1(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    kernel = weight.reshape(*weight.shape, *(1,) * (x.dim() - 2))
    return _of_dimensions("conv", x)(_norm_relu(x, gamma, beta), kernel)


def _conv3x3(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    return _of_dimensions("conv", x)(_norm_relu(x, gamma, beta), weight, padding=1)


def _transition(x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor) -> Tensor:
    return _of_dimensions("avg_pool", x)(_conv1x1(x, gamma, beta, weight), 2)


def _max_pool(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    return _of_dimensions("max_pool", x)(_norm_relu(x, gamma, beta), 3, 2, padding=1)


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

    @cache
    def graph() -> tuple[Tensor, Sequence[Tensor], Tensor]:
        parameters = (_images(rows), norm.gamma, norm.beta, *weight)
        leaves = [tensor.detach().clone().requires_grad_() for tensor in parameters]
        return function(*leaves), leaves, _images(grad_rows)

    def call() -> Sequence[Tensor]:
        output, leaves, gradient = graph()
        return torch.autograd.grad(output, leaves, gradient, retain_graph=True)

    return call


# ---- Kernels with products


def _input(make: Operands, shape: Shape, function: Product) -> tuple[Tensor, Norm, Tensor, int]:
    """What a convolution reads, a norm of it, its weight, and the size of its result."""
    if function is _conv3x3:  # the bottleneck, or the features where there is none
        x, weight = make.rows(shape, shape.channels), make.kernels(shape)
    else:
        x = make.features(shape, shape.channels)
        weight = make.weight(shape.outputs, shape.channels)
    return x, make.norm(x), weight, shape.size // 2 if function is _transition else shape.size


def _forward(function: Product, make: Operands, shape: Shape) -> Case:
    x, norm, weight, size = _input(make, shape, function)
    if function is _conv3x3:
        out = make.features(shape, shape.outputs, shape.buffer - shape.outputs)
    else:
        out = make.empty(shape.images, *(size,) * shape.dims, shape.outputs)
    wanted = (None, None) if function is _transition else make.vectors(shape.outputs)
    arguments = (x, *norm.forward, weight, out, *wanted)
    operator = getattr(operators, f"{function.__name__[1:]}_forward")
    return Case(
        2 * shape.images * size**shape.dims * weight.numel(),
        _moved(*arguments),
        lambda: operator(*arguments),
        _usual_forward(function, x, norm, weight),
        (out,),
    )


def _backward(function: Product, make: Operands, shape: Shape) -> Case:
    x, norm, weight, size = _input(make, shape, function)
    gradient = make.rows(shape, shape.outputs, size)
    given: tuple[Tensor, ...] = (gradient,)
    if function is _conv1x1:  # through the norm behind it
        bottleneck, coefficients = make.rows(shape, shape.outputs), make.randn(3, shape.outputs)
        given = (gradient, bottleneck, coefficients)
        p, q, s = coefficients
        gradient = (p * gradient + q * bottleneck + s).to(make.dtype)
    dense = function is _conv3x3
    grad_x = torch.empty_like(x) if dense else make.features(shape, shape.channels)
    results = (*make.vectors(shape.channels), torch.empty_like(weight))
    arguments = (*given, x, *norm.all, weight, grad_x, *results)
    operator = getattr(operators, f"{function.__name__[1:]}_backward")
    return Case(
        4 * shape.images * size**shape.dims * weight.numel(),
        _moved(*arguments, grad_x if function is _conv1x1 else None),  # it is added to
        lambda: operator(*arguments),
        _usual_backward(function, x, norm, gradient, weight),
        (None, *results),
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
    "conv1x1_forward": partial(_forward, _conv1x1),
    "conv1x1_backward": partial(_backward, _conv1x1),
    "conv3x3_forward": partial(_forward, _conv3x3),
    "conv3x3_backward": partial(_backward, _conv3x3),
    "transition_forward": partial(_forward, _transition),
    "transition_backward": partial(_backward, _transition),
    "channel_statistics": _channel_statistics,
    "finish_gradient": _finish_gradient,
    "norm_relu_maxpool_forward": _maxpool_forward,
    "norm_relu_maxpool_backward": _maxpool_backward,
}
