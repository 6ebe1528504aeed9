"""What every operator expects of its arguments, said in sentences when it is not so.

The checks run before each of some ten operator calls per layer: comparisons only, and no text is
put together before something is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_fast.operators.rows import statistics_dtype

Shape = tuple[int, ...]
NARROW = (torch.float16, torch.bfloat16)


def image(op: str, name: str, tensor: Tensor) -> Shape:
    """The shape [N, H, W, C] of a tensor whose pixels are rows of one pitch."""
    if tensor.dim() != 4:
        raise ValueError(
            f"{op}: `{name}` should have four dimensions [N, H, W, C], got shape "
            f"{tuple(tensor.shape)}"
        )
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: `{name}` should have a floating-point type, got {tensor.dtype}")
    _check_layout(op, name, tensor)
    return tensor.shape


def _check_layout(op: str, name: str, tensor: Tensor) -> None:
    images, height, width, channels = tensor.shape
    image_stride, row_stride, pitch, channel_stride = tensor.stride()
    if not images * height * width * channels:
        raise ValueError(
            f"{op}: `{name}` should have at least one element, got shape {tuple(tensor.shape)}"
        )
    if (
        channel_stride != 1
        or pitch < channels
        or row_stride != width * pitch
        or image_stride != height * row_stride
    ):
        raise ValueError(
            f"{op}: `{name}` should have its pixels as rows of channels one pitch apart, strides "
            f"(H*W*pitch, W*pitch, pitch, 1) with pitch >= {channels}, got strides "
            f"{tensor.stride()} for shape {tuple(tensor.shape)}"
        )


def same_image(op: str, name: str, tensor: Tensor, shape: Shape, like: Tensor) -> None:
    """Another [N, H, W, C] tensor of this shape, with the type and device of `like`."""
    if tensor.shape != shape or tensor.dtype != like.dtype or tensor.device != like.device:
        _mismatch(op, name, tensor, shape, like.dtype, like.device)
    _check_layout(op, name, tensor)


def dense(
    op: str, name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype, like: Tensor
) -> None:
    """A contiguous tensor: a result that is not a slice of anything."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != like.device:
        _mismatch(op, name, tensor, shape, dtype, like.device)
    if not tensor.is_contiguous():
        raise ValueError(
            f"{op}: `{name}` should be contiguous, got strides {tensor.stride()} for shape "
            f"{tuple(tensor.shape)}"
        )


def weight(op: str, tensor: Tensor, shape: Shape, like: Tensor) -> None:
    """A convolution's weight, in any memory format; float32 goes with narrower features, too."""
    mixed = tensor.dtype == torch.float32 and like.dtype in NARROW
    if (
        tensor.shape != shape
        or (tensor.dtype != like.dtype and not mixed)
        or tensor.device != like.device
    ):
        dtype = tensor.dtype if mixed else like.dtype
        _mismatch(op, "weight", tensor, shape, dtype, like.device)


def vectors(
    op: str, names: Sequence[str], tensors: Sequence[Tensor], length: int, like: Tensor
) -> None:
    """Statistics, coefficients or sums of `length` channels stored in the type of `like`."""
    shape = (length,)
    dtype = statistics_dtype(like.dtype)
    device = like.device
    for index, tensor in enumerate(tensors):
        if (
            tensor.shape != shape
            or tensor.dtype != dtype
            or tensor.device != device
            or not tensor.is_contiguous()
        ):
            dense(op, names[index], tensor, shape, dtype, like)


def optional_statistics(
    op: str, mean: Tensor | None, var: Tensor | None, length: int, like: Tensor
) -> None:
    """Statistics of an output: wanted together or not at all."""
    if mean is not None and var is not None:
        vectors(op, ("mean", "var"), (mean, var), length, like)
    elif mean is not None or var is not None:
        given, missing = ("var", "mean") if mean is None else ("mean", "var")
        raise ValueError(
            f"{op}: `mean` and `var` should both be tensors or both be None, got `{given}` "
            f"without `{missing}`"
        )


def norm_gradient(
    op: str,
    grad_gamma: Tensor | None,
    grad_beta: Tensor | None,
    data_gradient: Tensor | None,
    length: int,
    like: Tensor,
) -> None:
    """A norm's sums: wanted together or not at all, and with every gradient of the data."""
    if grad_gamma is not None and grad_beta is not None:
        vectors(op, ("grad_gamma", "grad_beta"), (grad_gamma, grad_beta), length, like)
    elif grad_gamma is not None or grad_beta is not None or data_gradient is not None:
        raise ValueError(
            f"{op}: `grad_gamma` and `grad_beta` should both be tensors, or both be None where no "
            "gradient of the data is wanted either"
        )


def affine(op: str, name: str, tensor: Tensor, like: Tensor) -> bool:
    """Whether kernels can read a parameter or buffer of a norm: its type may differ from theirs."""
    if tensor.shape != like.shape or tensor.device != like.device:
        dense(op, name, tensor, like.shape, tensor.dtype, like)
    if not tensor.is_floating_point():
        raise TypeError(f"{op}: `{name}` should have a floating-point type, got {tensor.dtype}")
    return tensor.dtype == like.dtype and tensor.is_contiguous()


def _mismatch(
    op: str, name: str, tensor: Tensor, shape: Shape, dtype: torch.dtype, device: torch.device
) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{op}: `{name}` should have shape {tuple(shape)}, got {tuple(tensor.shape)}"
        )
    if tensor.dtype != dtype:
        raise TypeError(f"{op}: `{name}` should have type {dtype}, got {tensor.dtype}")
    raise ValueError(f"{op}: `{name}` should be on {device}, got a tensor on {tensor.device}")
