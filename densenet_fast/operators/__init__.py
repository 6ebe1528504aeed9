"""The operators as the rest of the package calls them: typed, checked, on the right backend.

The definitions are in `densenet_fast.operators.reference` and `reference_block`. All operators
write into tensors of their caller and check every argument before they write anything. They are not
differentiable by themselves.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from densenet_fast.operators import argument_checks, extension, reference, reference_block
from densenet_fast.operators.backends import select
from densenet_fast.operators.cuda_device import allow_tf32, run_on_cuda

Arguments = ParamSpec("Arguments")


def _fake(*arguments: Any) -> None:
    """Operators only write into their arguments: there are no outputs to describe."""


class _Compiled:
    """An operator of this name on the backend of its first argument; `twin` is its reference."""

    def __init__(self, name: str, twin: Callable[..., None]) -> None:
        """Find the compiled operator, if there is one."""
        self._twin = twin
        self._multiplies = name.startswith(("conv", "transition", "dense_block"))
        if extension.LOADED:
            self._kernel = getattr(torch.ops.densenet_fast, name).default
            torch.library.register_fake(f"densenet_fast::{name}", _fake)

    def __call__(self, first: Tensor, /, *args: Any, supported: bool = True, **kwargs: Any) -> None:
        """Run it; in plain PyTorch where its types are not `supported` by kernels."""
        backend = select(first)
        if backend == "reference" or not supported:
            self._twin(first, *args, **kwargs)
        elif backend == "cuda":
            if self._multiplies and first.dtype == torch.float32:
                kwargs["allow_tf32"] = allow_tf32()
            run_on_cuda(self._kernel, (first, *args), kwargs)
        else:
            self._kernel(first, *args, **kwargs)


def _operator(check: Callable[Arguments, bool | None]) -> Callable[Arguments, None]:
    """The operator of this name, behind its check of the arguments.

    A check that returns False has found types that only the reference twin handles.
    """
    run = _Compiled(check.__name__, getattr(reference, check.__name__))
    names = tuple(inspect.signature(check).parameters)

    @wraps(check)
    def operator(*args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        supported = check(*args, **kwargs)
        given: Any = (*args, *(kwargs[name] for name in names[len(args) :]))
        run(*given, supported=supported is not False)

    return operator


# A whole block, and the running statistics of all its norms. Only the fused nodes call these, with
# tensors of their own making: what users have passed has been checked when a node began.
dense_block_forward_ = _Compiled("dense_block_forward_", reference_block.dense_block_forward_)
dense_block_backward_ = _Compiled("dense_block_backward_", reference_block.dense_block_backward_)
_update_running_statistics_ = _Compiled(
    "update_running_statistics_", reference_block.update_running_statistics_
)


def update_running_statistics_(
    statistics: Tensor,
    running: Sequence[Tensor],
    counters: Sequence[Tensor],
    places: Sequence[int],
    momenta: Sequence[float],
    count: int,
) -> None:
    """Move the running statistics of norms towards those of a step, and count it."""
    dtype = statistics.dtype
    plain = all(buffer.dtype == dtype and buffer.is_contiguous() for buffer in running)
    _update_running_statistics_(
        statistics, running, counters, places, momenta, count, supported=plain
    )


_MEAN_VAR = ("mean", "var")
_SCALE_SHIFT = ("scale", "shift")
_NORM = ("scale", "shift", "mean", "rstd")
_NORM_GRAD = ("scale", "shift", "mean", "rstd", "grad_gamma", "grad_beta")


# Normalisation vectors


@_operator
def channel_statistics(features: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of each channel over all pixels."""
    op = "channel_statistics"
    channels = argument_checks.image(op, "features", features)[3]
    argument_checks.vectors(op, _MEAN_VAR, (mean, var), channels, features)


@_operator
def norm_coefficients(
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    shift: Tensor,
    rstd: Tensor,
) -> bool:
    """The norm as scale * x + shift, and its rstd = 1 / sqrt(var + eps)."""
    op = "norm_coefficients"
    names = ("mean", "var", "scale", "shift", "rstd")
    argument_checks.vectors(op, names, (mean, var, scale, shift, rstd), mean.numel(), mean)
    plain = weight is None or argument_checks.affine(op, "weight", weight, mean)
    return (bias is None or argument_checks.affine(op, "bias", bias, mean)) and plain


# Convolutions


@_operator
def conv1x1_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    bottleneck: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`bottleneck` = relu(scale * features + shift) @ weight.T, and its statistics."""
    op = "conv1x1_forward"
    images, height, width, channels = argument_checks.image(op, "features", features)
    argument_checks.vectors(op, _SCALE_SHIFT, (scale, shift), channels, features)
    outputs = weight.shape[0]
    argument_checks.weight(op, weight, (outputs, channels), features)
    argument_checks.same_image(
        op, "bottleneck", bottleneck, (images, height, width, outputs), features
    )
    argument_checks.optional_statistics(op, mean, var, outputs, features)


@_operator
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
    """Through norm2's affine map, conv1 and norm1: `grad_features` accumulates, the rest is set."""
    op = "conv1x1_backward"
    shape = argument_checks.image(op, "features", features)
    channels, outputs = shape[3], weight.shape[0]
    argument_checks.weight(op, weight, (outputs, channels), features)
    narrow = (*shape[:3], outputs)
    argument_checks.same_image(op, "grad_norm", grad_norm, narrow, features)
    argument_checks.same_image(op, "bottleneck", bottleneck, narrow, features)
    argument_checks.vectors(op, _NORM, (scale, shift, mean, rstd), channels, features)
    argument_checks.norm_gradient(op, grad_gamma, grad_beta, grad_features, channels, features)
    argument_checks.dense(op, "coefficients", coefficients, (3, outputs), scale.dtype, features)
    if grad_features is not None:
        argument_checks.same_image(op, "grad_features", grad_features, shape, features)
    if grad_weight is not None:
        argument_checks.dense(
            op, "grad_weight", grad_weight, (outputs, channels), weight.dtype, features
        )


@_operator
def conv3x3_forward(
    bottleneck: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    growth: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`growth` = conv3x3(relu(scale * bottleneck + shift), weight), and its statistics."""
    op = "conv3x3_forward"
    shape = argument_checks.image(op, "bottleneck", bottleneck)
    channels, outputs = shape[3], weight.shape[0]
    argument_checks.vectors(op, _SCALE_SHIFT, (scale, shift), channels, bottleneck)
    argument_checks.weight(op, weight, (outputs, channels, 3, 3), bottleneck)
    argument_checks.same_image(op, "growth", growth, (*shape[:3], outputs), bottleneck)
    argument_checks.optional_statistics(op, mean, var, outputs, bottleneck)


@_operator
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
    """Gradients of the weight, and through the ReLU of norm2's output and norm2."""
    op = "conv3x3_backward"
    shape = argument_checks.image(op, "bottleneck", bottleneck)
    channels, outputs = shape[3], weight.shape[0]
    kernel = (outputs, channels, 3, 3)
    argument_checks.weight(op, weight, kernel, bottleneck)
    argument_checks.same_image(op, "grad_growth", grad_growth, (*shape[:3], outputs), bottleneck)
    argument_checks.vectors(op, _NORM, (scale, shift, mean, rstd), channels, bottleneck)
    argument_checks.norm_gradient(op, grad_gamma, grad_beta, grad_norm, channels, bottleneck)
    if grad_norm is not None:
        argument_checks.same_image(op, "grad_norm", grad_norm, shape, bottleneck)
    if grad_weight is not None:
        argument_checks.dense(op, "grad_weight", grad_weight, kernel, weight.dtype, bottleneck)


@_operator
def dropout_(growth: Tensor, seed: int, p: float) -> None:
    """Zero each element with probability p, scale the others; the seed alone decides which."""
    op = "dropout_"
    argument_checks.image(op, "growth", growth)
    if not 0 <= p <= 1:
        raise ValueError(f"{op}: `p` should be a probability between 0 and 1, got {p}")


@_operator
def finish_gradient(
    features: Tensor,
    grad_features: Tensor,
    mean: Tensor,
    sum_grad: Tensor,
    sum_grad_x: Tensor,
    out: Tensor,
) -> None:
    """The deferred BatchNorm correction: the complete gradient of some channels."""
    op = "finish_gradient"
    shape = argument_checks.image(op, "features", features)
    names = ("mean", "sum_grad", "sum_grad_x")
    argument_checks.vectors(op, names, (mean, sum_grad, sum_grad_x), shape[3], features)
    argument_checks.same_image(op, "grad_features", grad_features, shape, features)
    argument_checks.same_image(op, "out", out, shape, features)


# What may follow a block


@_operator
def transition_forward(
    features: Tensor,
    scale: Tensor,
    shift: Tensor,
    weight: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
) -> None:
    """`out` = avgpool2x2(relu(scale * features + shift)) @ weight.T, and its statistics."""
    op = "transition_forward"
    images, height, width, channels = argument_checks.image(op, "features", features)
    outputs = weight.shape[0]
    argument_checks.vectors(op, _SCALE_SHIFT, (scale, shift), channels, features)
    argument_checks.weight(op, weight, (outputs, channels), features)
    argument_checks.same_image(op, "out", out, (images, height // 2, width // 2, outputs), features)
    argument_checks.optional_statistics(op, mean, var, outputs, features)


@_operator
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
    """Backward of `transition_forward`: `grad_features` is written at all pixels."""
    op = "transition_backward"
    shape = argument_checks.image(op, "features", features)
    images, height, width, channels = shape
    outputs = weight.shape[0]
    argument_checks.weight(op, weight, (outputs, channels), features)
    pooled = (images, height // 2, width // 2, outputs)
    argument_checks.same_image(op, "grad_out", grad_out, pooled, features)
    argument_checks.same_image(op, "grad_features", grad_features, shape, features)
    vectors = (scale, shift, mean, rstd, grad_gamma, grad_beta)
    argument_checks.vectors(op, _NORM_GRAD, vectors, channels, features)
    if grad_weight is not None:
        argument_checks.dense(
            op, "grad_weight", grad_weight, (outputs, channels), weight.dtype, features
        )


@_operator
def norm_relu_avgpool_forward(features: Tensor, scale: Tensor, shift: Tensor, out: Tensor) -> None:
    """`out` [N, C] = the average of relu(scale * features + shift) over each image."""
    op = "norm_relu_avgpool_forward"
    images, _, _, channels = argument_checks.image(op, "features", features)
    argument_checks.vectors(op, _SCALE_SHIFT, (scale, shift), channels, features)
    argument_checks.dense(op, "out", out, (images, channels), features.dtype, features)


@_operator
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
    """Backward of `norm_relu_avgpool_forward`: `grad_features` is written."""
    op = "norm_relu_avgpool_backward"
    shape = argument_checks.image(op, "features", features)
    argument_checks.dense(op, "grad_out", grad_out, (shape[0], shape[3]), features.dtype, features)
    argument_checks.same_image(op, "grad_features", grad_features, shape, features)
    vectors = (scale, shift, mean, rstd, grad_gamma, grad_beta)
    argument_checks.vectors(op, _NORM_GRAD, vectors, shape[3], features)


# Stem


def _pooled_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    images, height, width, channels = shape
    return images, (height + 1) // 2, (width + 1) // 2, channels


@_operator
def norm_relu_maxpool_forward(
    input: Tensor, scale: Tensor, shift: Tensor, out: Tensor, argmax: Tensor
) -> None:
    """Max-pool (kernel 3, stride 2, padding 1) of relu(scale * input + shift), and where it was."""
    op = "norm_relu_maxpool_forward"
    shape = argument_checks.image(op, "input", input)
    argument_checks.vectors(op, _SCALE_SHIFT, (scale, shift), shape[3], input)
    pooled = _pooled_shape(shape)
    argument_checks.same_image(op, "out", out, pooled, input)
    argument_checks.dense(op, "argmax", argmax, pooled, torch.uint8, input)


@_operator
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
    """Backward of max-pool, ReLU and norm, complete: `grad_input` needs no correction."""
    op = "norm_relu_maxpool_backward"
    shape = argument_checks.image(op, "input", input)
    pooled = _pooled_shape(shape)
    argument_checks.same_image(op, "grad_out", grad_out, pooled, input)
    argument_checks.dense(op, "argmax", argmax, pooled, torch.uint8, input)
    argument_checks.same_image(op, "grad_input", grad_input, shape, input)
    vectors = (scale, shift, mean, rstd, grad_gamma, grad_beta)
    argument_checks.vectors(op, _NORM_GRAD, vectors, shape[3], input)
