"""The launchers' argument structures, made of tensors."""

from __future__ import annotations

from ctypes import Structure, c_bool, c_double, c_int, c_int64
from ctypes import c_void_p as pointer

import torch
from torch import Tensor


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


def address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def image_of(tensor: Tensor | None) -> ImageArgument:
    if tensor is None:
        return ImageArgument()
    n, *size, c = tensor.shape
    strides = [s for s, many in zip(tensor.stride(), tensor.shape[:-1], strict=False) if many > 1]
    ones = [1] * (3 - len(size))
    pitch = strides[-1] if strides else c
    return ImageArgument(tensor.data_ptr(), n, *ones, *size, c, pitch, len(size))


def norm_of(*vectors: Tensor, linear: bool = False) -> NormArgument:
    return NormArgument(*(v.data_ptr() for v in vectors), linear)


def pair(first: Tensor | None, second: Tensor | None) -> Pair:
    return Pair(address(first), address(second))


def coefficients(
    mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *made: Tensor
) -> NormCoefficients:
    given = [address(t) for t in (mean, var, weight, bias)]
    return NormCoefficients(mean.numel(), *given, eps, *(t.data_ptr() for t in made))


def weight_of(tensor: Tensor) -> WeightArgument:
    own, spatial = tensor.stride()[:2], tensor.stride()[2:]
    strides = [*own, *[0] * (3 - len(spatial)), *spatial]
    is_float32 = tensor.dtype == torch.float32
    dims = len(spatial) or 2
    return WeightArgument(tensor.data_ptr(), is_float32, *tensor.shape[:2], *strides, dims)


def weight_gradient(tensor: Tensor | None) -> WeightGradient:
    if tensor is None:
        return WeightGradient()
    return WeightGradient(
        tensor.data_ptr(), tensor.dtype == torch.float32, not tensor.is_contiguous()
    )
