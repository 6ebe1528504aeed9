"""Tensors whose pixels are rows of channels: types, allocation and conversion."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_fast.operators import extension
from densenet_fast.operators.torch_internals import suggest_memory_format

_LARGE = 4 << 20  # bytes from which huge pages are worth a call
_CACHE_PAGE = 4096  # rows a multiple of this many bytes apart all fall into the same cache sets
_PADDING = 16
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
_TO_ROWS = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
_TO_IMAGES = {3: (0, 2, 1), 4: (0, 3, 1, 2), 5: (0, 4, 1, 2, 3)}
_CUDA_ACCESS = 16  # bytes that a thread moves at once, if rows begin at their multiples


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of statistics, coefficients and sums over features stored as `dtype`."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def row_pitch(channels: int, itemsize: int, *, cuda: bool) -> int:
    """Elements of `itemsize` bytes between the rows of a buffer that nobody outside sees."""
    pitch = channels
    if cuda:
        pitch += -channels % (_CUDA_ACCESS // itemsize)
    return pitch + _PADDING * (pitch * itemsize % _CACHE_PAGE == 0)


def rows_of(images: Tensor) -> Tensor:
    """A tensor [N, C, *size] as [N, *size, C]: a view."""
    return images.permute(*_TO_ROWS[images.dim()])


def images_of(rows: Tensor) -> Tensor:
    """Rows [N, *size, C] as [N, C, *size]: a view."""
    return rows.permute(*_TO_IMAGES[rows.dim()])


def _row_strides(size: Sequence[int], pitch: int) -> list[int]:
    """Strides of the batch and of every dimension of images of this size, rows `pitch` apart."""
    strides = [pitch]
    for length in reversed(size):
        strides.append(strides[-1] * length)
    return strides[::-1]


def empty_channels_last(shape: Sequence[int], like: Tensor, pitch: int | None = None) -> Tensor:
    """An uninitialised [N, C, *size] tensor of rows `pitch` apart, C by default.

    Its own storage and no view, so that autograd's version counter guards it as an output too.
    """
    images, channels, *size = shape
    image_stride, *strides = _row_strides(size, pitch or channels)
    strides = [image_stride, 1, *strides]
    tensor = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    return _huge_pages(tensor, images * image_stride)


def empty_rows(shape: Sequence[int], like: Tensor) -> Tensor:
    """An uninitialised contiguous [N, *size, C] tensor."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    return _huge_pages(tensor, tensor.numel())


def _huge_pages(tensor: Tensor, elements: int) -> Tensor:
    """The new tensor, behind large pages if it is large: page faults are a part of every step."""
    size = elements * tensor.itemsize
    if size >= _LARGE and extension.C is not None and type(tensor) is Tensor and tensor.is_cpu:
        extension.C.advise_huge_pages(tensor.data_ptr(), size)
    return tensor


def channels_last_format(dim: int) -> torch.memory_format:
    """PyTorch's format with channels innermost for tensors of `dim` dimensions, if it has one."""
    return _CHANNELS_LAST.get(dim, torch.contiguous_format)


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch's operators take a tensor [N, C, *size] for one with channels innermost."""
    return tensor.dim() in _CHANNELS_LAST and (
        suggest_memory_format(tensor) == _CHANNELS_LAST[tensor.dim()]
    )


def as_rows(tensor: Tensor) -> Tensor:
    """[N, C, *size] of any layout as [N, *size, C], rows a pitch apart: a copy only if it must."""
    return pitched(rows_of(tensor))


def pitched(rows: Tensor) -> Tensor:
    """[N, *size, C] of any layout with rows a pitch apart: a copy only if it must."""
    _, *size, channels = rows.shape
    *strides, channel_stride = rows.stride()
    pitch = strides[-1]
    if channel_stride == 1 and pitch >= channels and strides == _row_strides(size, pitch):
        return rows
    # Dimensions of size 1 may carry any stride, even in a contiguous tensor: name them all.
    return rows.contiguous().as_strided(rows.shape, (*_row_strides(size, channels), 1))


def gradient_format(weight: Tensor) -> torch.memory_format:
    """The layout of a weight's gradient: the weight's own, which autograd takes without a copy."""
    layout = channels_last_format(weight.dim())
    if weight.is_contiguous() or not weight.is_contiguous(memory_format=layout):
        return torch.contiguous_format
    return layout


def empty_gradient(weight: Tensor) -> Tensor:
    """Room for a weight's gradient."""
    return torch.empty_like(weight, memory_format=gradient_format(weight))


class Scratch:
    """One buffer for tensors [N, *size, C] of the same pixels that are never alive together."""

    def __init__(self, pixels: Sequence[int], channels: int, like: Tensor) -> None:
        """Reserve room for `channels`, the most that will be asked for."""
        self._pixels = pixels
        self._rows = math.prod(pixels)
        buffer = torch.empty(self._rows * channels, dtype=like.dtype, device=like.device)
        self._buffer = _huge_pages(buffer, self._rows * channels)
        self._views: dict[int, Tensor] = {}  # most layers of a block ask for the same

    def take(self, channels: int) -> Tensor:
        """The buffer as contiguous [N, *size, channels]: what was taken before is overwritten."""
        view = self._views.get(channels)
        if view is None:
            part = self._buffer[: self._rows * channels]
            view = self._views[channels] = part.view(*self._pixels, channels)
        return view
