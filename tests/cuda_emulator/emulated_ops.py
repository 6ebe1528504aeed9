"""The operators of densenet_fast run by the CUDA launchers and kernels, on CPU tensors.

`EmulatedOps(library)` has one method for every operator, with the operator's own signature, so that
it can stand in for the compiled operators anywhere, whole networks included.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import Structure, addressof, byref, c_bool, c_char_p, c_double, c_int, c_int64, c_uint64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}


class ImageArgument(Structure):
    """`densenet_fast::ImageArgument`."""

    _fields_ = [
        ("data", pointer),
        *((name, c_int64) for name in ("n", "d", "h", "w", "c", "pitch")),
        ("dims", c_int),
    ]


class NormArgument(Structure):
    """`densenet_fast::NormArgument`."""

    _fields_ = [
        *((name, pointer) for name in ("scale", "shift", "mean", "rstd")),
        ("linear", c_bool),
    ]


class Pair(Structure):
    """`StatisticsResult` (mean, var) or `NormGradientResult` (gamma, beta), and what follows."""

    _fields_ = [("first", pointer), ("second", pointer), ("next", pointer)]


class NormCoefficients(Structure):
    """`densenet_fast::NormCoefficients`."""

    _fields_ = [
        ("channels", c_int64),
        *((name, pointer) for name in ("mean", "var", "weight", "bias")),
        ("eps", c_double),
        *((name, pointer) for name in ("scale", "shift", "rstd")),
    ]


class NormBackward(Structure):
    """`densenet_fast::NormBackward`."""

    _fields_ = [
        ("channels", c_int64),
        ("norm", NormArgument),
        ("count", c_int64),
        *((name, pointer) for name in ("map", "sum_grad", "sum_grad_x")),
    ]


class WeightArgument(Structure):
    """`densenet_fast::WeightArgument`."""

    _fields_ = [
        ("data", pointer),
        ("is_float32", c_bool),
        *((n, c_int64) for n in ("out", "in_", "stride_out", "stride_in")),
        *((n, c_int64) for n in ("stride_d", "stride_h", "stride_w")),
        ("dims", c_int),
        ("packed", pointer * 2),
    ]


class RunningUpdate(Structure):
    """`densenet_fast::RunningUpdate`."""

    _fields_ = [
        ("channels", c_int64),
        *((name, pointer) for name in ("mean", "var", "total")),
        ("count", c_int64),
        ("momentum", c_double),
        *((name, pointer) for name in ("running_mean", "running_var")),
    ]


class WeightGradient(Structure):
    """`densenet_fast::WeightGradient`."""

    _fields_ = [("data", pointer), ("is_float32", c_bool), ("channels_last", c_bool)]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _image(tensor: Tensor | None) -> ImageArgument:
    if tensor is None:
        return ImageArgument()
    n, *size, c = tensor.shape
    strides = [s for s, many in zip(tensor.stride(), tensor.shape[:-1], strict=False) if many > 1]
    ones = [1] * (3 - len(size))
    pitch = strides[-1] if strides else c
    return ImageArgument(tensor.data_ptr(), n, *ones, *size, c, pitch, len(size))


def _norm(*vectors: Tensor, linear: bool = False) -> NormArgument:
    return NormArgument(*(v.data_ptr() for v in vectors), linear)


def _pair(first: Tensor | None, second: Tensor | None) -> Pair:
    return Pair(_address(first), _address(second))


def _coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *made: Tensor
) -> NormCoefficients:
    given = [_address(t) for t in (mean, var, weight, bias)]
    return NormCoefficients(mean.numel(), *given, eps, *(t.data_ptr() for t in made))


def _weight(tensor: Tensor) -> WeightArgument:
    own, spatial = tensor.stride()[:2], tensor.stride()[2:]
    strides = [*own, *[0] * (3 - len(spatial)), *spatial]
    is_float32 = tensor.dtype == torch.float32
    dims = len(spatial) or 2
    return WeightArgument(tensor.data_ptr(), is_float32, *tensor.shape[:2], *strides, dims)


def _weight_gradient(tensor: Tensor | None) -> WeightGradient:
    if tensor is None:
        return WeightGradient()
    return WeightGradient(
        tensor.data_ptr(), tensor.dtype == torch.float32, not tensor.is_contiguous()
    )


class EmulatedOps:
    """All operators, run under the emulator."""

    def __init__(self, library: ctypes.CDLL, *, allow_tf32: bool = False) -> None:
        """Call into `library`, built from csrc/cuda and kernels_api.cpp."""
        self.library = library
        self.allow_tf32 = allow_tf32

    def _call(self, op: str, like: Tensor, *arguments: object) -> None:
        function = getattr(self.library, f"df_{op}")
        function.restype = c_char_p
        passed = [byref(a) if isinstance(a, Structure) else a for a in arguments]
        error = function(c_int(DTYPES[like.dtype]), c_int(self.allow_tf32), *passed)
        if error is not None:
            raise RuntimeError(error.decode())

    def channel_statistics(self, features: Tensor, mean: Tensor, var: Tensor) -> None:
        self._call("channel_statistics", features, _image(features), _pair(mean, var))

    def norm_coefficients(
        self,
        mean: Tensor,
        var: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        scale: Tensor,
        shift: Tensor,
        rstd: Tensor,
    ) -> None:
        norm = _coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
        self._call("norm_coefficients", mean, norm, c_int64(1))

    def statistics_and_norm(
        self, features: Tensor, mean: Tensor, var: Tensor, *others: Any
    ) -> None:
        norm = _coefficients(mean, var, *others)
        found = _pair(*(t[-features.shape[-1] :] for t in (mean, var)))
        found.next = addressof(norm)
        self._call("channel_statistics", features, _image(features), found)

    def update_running_statistics_(
        self,
        statistics: Tensor,
        running: Sequence[Tensor],
        counters: Sequence[Tensor],
        places: Sequence[int],
        momenta: Sequence[float],
        count: int,
    ) -> None:
        updates = (RunningUpdate * len(momenta))()
        for index, momentum in enumerate(momenta):
            mean, var, total, channels = places[4 * index : 4 * index + 4]
            at = [None if p < 0 else statistics[p:].data_ptr() for p in (mean, var, total)]
            buffers = [t.data_ptr() for t in running[2 * index : 2 * index + 2]]
            updates[index] = RunningUpdate(channels, *at, count, momentum, *buffers)
        ones = (pointer * len(counters))(*(counter.data_ptr() for counter in counters))
        sizes = c_int64(len(updates)), c_int64(len(ones))
        name = "update_running_statistics_"
        self._call(name, statistics, updates, sizes[0], ones, sizes[1])

    def norm_grad_coefficients(
        self,
        scale: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_gamma: Tensor | None,
        grad_beta: Tensor | None,
        count: int,
        coefficients: Tensor,
    ) -> None:
        norm = NormArgument(scale.data_ptr(), None, mean.data_ptr(), rstd.data_ptr())
        values = 0 if grad_gamma is None else count
        next = NormBackward(scale.numel(), norm, values, coefficients.data_ptr())
        self._call("norm_grad_coefficients", scale, next, _pair(grad_gamma, grad_beta))

    def _forward(
        self,
        op: str,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        weight: Tensor,
        out: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        linear: bool = False,
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None, linear)
        statistics = _pair(mean, var)
        self._call(op, features, _image(features), act, _weight(weight), _image(out), statistics)

    def conv1x1_forward(self, *arguments: Tensor) -> None:
        self._forward("conv1x1_forward", *arguments)

    def conv3x3_forward(self, *arguments: Tensor) -> None:
        self._forward("conv3x3_forward", *arguments)

    def transition_forward(self, *arguments: Any) -> None:
        self._forward("transition_forward", *arguments)

    def conv1x1_backward(
        self,
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
        self._call(
            "conv1x1_backward",
            features,
            _image(grad_norm),
            _image(bottleneck),
            pointer(coefficients.data_ptr()),
            _image(features),
            _norm(scale, shift, mean, rstd),
            _weight(weight),
            _image(grad_features),
            _pair(grad_gamma, grad_beta),
            _weight_gradient(grad_weight),
        )

    def _backward(
        self,
        op: str,
        grad: Tensor,
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
        flag: bool = False,
    ) -> None:
        accumulates = op == "conv3x3_backward"
        self._call(
            op,
            features,
            _image(grad),
            _image(features),
            _norm(scale, shift, mean, rstd, linear=flag and not accumulates),
            _weight(weight),
            _image(grad_features),
            _pair(grad_gamma, grad_beta),
            _weight_gradient(grad_weight),
            *([c_int(flag)] if accumulates else []),
        )

    def conv3x3_backward(self, *arguments: Any) -> None:
        self._backward("conv3x3_backward", *arguments)

    def transition_backward(self, *arguments: Any) -> None:
        self._backward("transition_backward", *arguments)

    def dropout_(self, growth: Tensor, seed: int, p: float, channels: bool = False) -> None:
        seed %= 1 << 64
        probability = c_double(p)
        self._call("dropout_", growth, _image(growth), c_uint64(seed), probability, c_int(channels))

    def finish_gradient(
        self,
        features: Tensor,
        grad_features: Tensor,
        mean: Tensor,
        sum_grad: Tensor,
        sum_grad_x: Tensor,
        out: Tensor,
    ) -> None:
        vectors = [pointer(v.data_ptr()) for v in (mean, sum_grad, sum_grad_x)]
        images = _image(features), _image(grad_features)
        self._call("finish_gradient", features, *images, *vectors, _image(out))

    def norm_relu_avgpool_forward(
        self, features: Tensor, scale: Tensor, shift: Tensor, out: Tensor
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None)
        result = pointer(out.data_ptr())
        self._call("norm_relu_avgpool_forward", features, _image(features), act, result)

    def norm_relu_avgpool_backward(
        self,
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
        self._call(
            "norm_relu_avgpool_backward",
            features,
            pointer(grad_out.data_ptr()),
            _image(features),
            _norm(scale, shift, mean, rstd),
            _image(grad_features),
            _pair(grad_gamma, grad_beta),
        )

    def sums_and_backward(
        self,
        grad_out: Tensor,
        features: Tensor,
        scale: Tensor,
        shift: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_features: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
        count: int,
        *results: Tensor,
    ) -> None:
        norm, sums = _norm(scale, shift, mean, rstd), _pair(grad_gamma, grad_beta)
        next = NormBackward(len(scale), norm, count, *(t.data_ptr() for t in results))
        sums.next = addressof(next)
        self._call(
            "norm_relu_avgpool_backward",
            features,
            pointer(grad_out.data_ptr()),
            _image(features),
            norm,
            _image(grad_features),
            sums,
        )

    def norm_relu_maxpool_forward(
        self, input: Tensor, scale: Tensor, shift: Tensor, out: Tensor, argmax: Tensor
    ) -> None:
        act = NormArgument(scale.data_ptr(), shift.data_ptr(), None, None)
        codes = pointer(argmax.data_ptr())
        self._call("norm_relu_maxpool_forward", input, _image(input), act, _image(out), codes)

    def norm_relu_maxpool_backward(
        self,
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
        self._call(
            "norm_relu_maxpool_backward",
            input,
            _image(grad_out),
            pointer(argmax.data_ptr()),
            _image(input),
            _norm(scale, shift, mean, rstd),
            c_int(batch_statistics),
            _image(grad_input),
            _pair(grad_gamma, grad_beta),
        )
