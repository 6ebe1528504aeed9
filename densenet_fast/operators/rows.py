"""Tensors whose pixels are rows of channels: types, allocation and conversion."""

from __future__ import annotations

import torch
from torch import Tensor

from densenet_fast.operators import extension
from densenet_fast.operators.torch_internals import suggest_memory_format

_LARGE = 4 << 20  # bytes from which huge pages are worth a call
_CACHE_PAGE = 4096  # rows a multiple of this many bytes apart all fall into the same cache sets
_PADDING = 16
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


def empty_channels_last(
    shape: tuple[int, int, int, int], like: Tensor, pitch: int | None = None
) -> Tensor:
    """An uninitialised [N, C, H, W] tensor of rows `pitch` apart, C by default.

    Its own storage and no view, so that autograd's version counter guards it as an output too.
    """
    _, channels, height, width = shape
    pitch = pitch or channels
    strides = (height * width * pitch, 1, width * pitch, pitch)
    tensor = torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)
    return _huge_pages(tensor, strides[0] * shape[0])


def empty_rows(shape: tuple[int, int, int, int], like: Tensor) -> Tensor:
    """An uninitialised contiguous [N, H, W, C] tensor."""
    tensor = torch.empty(shape, dtype=like.dtype, device=like.device)
    return _huge_pages(tensor, tensor.numel())


def _huge_pages(tensor: Tensor, elements: int) -> Tensor:
    """The new tensor, behind large pages if it is large: page faults are a part of every step."""
    size = elements * tensor.itemsize
    if size >= _LARGE and extension.C is not None and type(tensor) is Tensor and tensor.is_cpu:
        extension.C.advise_huge_pages(tensor.data_ptr(), size)
    return tensor


def is_channels_last(tensor: Tensor) -> bool:
    """Whether PyTorch's operators take a tensor [N, C, H, W] for one with channels innermost."""
    return tensor.dim() == 4 and suggest_memory_format(tensor) == torch.channels_last


def as_rows(tensor: Tensor) -> Tensor:
    """[N, C, H, W] of any layout as [N, H, W, C], rows one pitch apart: a copy only if it must."""
    rows = tensor.permute(0, 2, 3, 1)
    _, height, width, channels = rows.shape
    image_stride, row_stride, pitch, channel_stride = rows.stride()
    if (
        channel_stride == 1
        and pitch >= channels
        and row_stride == width * pitch
        and image_stride == height * row_stride
    ):
        return rows
    # Dimensions of size 1 may carry any stride, even in a contiguous tensor: name them all.
    strides = (height * width * channels, width * channels, channels, 1)
    return rows.contiguous().as_strided(rows.shape, strides)


class Scratch:
    """One buffer for tensors [N, H, W, C] of the same pixels that are never alive together."""

    def __init__(self, pixels: tuple[int, int, int], channels: int, like: Tensor) -> None:
        """Reserve room for `channels`, the most that will be asked for."""
        self._pixels = pixels
        self._rows = pixels[0] * pixels[1] * pixels[2]
        buffer = torch.empty(self._rows * channels, dtype=like.dtype, device=like.device)
        self._buffer = _huge_pages(buffer, self._rows * channels)
        self._views: dict[int, Tensor] = {}  # most layers of a block ask for the same

    def take(self, channels: int) -> Tensor:
        """The buffer as contiguous [N, H, W, channels]: what was taken before is overwritten."""
        view = self._views.get(channels)
        if view is None:
            part = self._buffer[: self._rows * channels]
            view = self._views[channels] = part.view(*self._pixels, channels)
        return view
