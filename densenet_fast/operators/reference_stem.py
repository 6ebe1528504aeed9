"""What the operators of the stem's convolution mean, by PyTorch's."""

from __future__ import annotations

import torch
from torch import Tensor

from densenet_fast.operators.rows import images_of, rows_of

KERNEL, STRIDE, PADDING = 7, 2, 3  # in every dimension


def stem_convolution_forward(images: Tensor, weight: Tensor, out: Tensor) -> None:
    """`out = conv(images, weight)`: [N, *size, Cin] and [C, Cin, 7, ...] to [N, *(size / 2), C]."""
    weight = weight.to(images.dtype)
    out.copy_(rows_of(torch.convolution(images_of(images), weight, None, *_geometry(weight))))


def stem_convolution_backward(
    grad_out: Tensor, images: Tensor, weight: Tensor, grad_weight: Tensor
) -> None:
    """Write the gradient of `weight`, whose type it has."""
    stride, padding, dilation, transposed, output_padding, groups = _geometry(weight)
    _, found, _ = torch.ops.aten.convolution_backward(
        images_of(grad_out),
        images_of(images),
        weight.to(images.dtype),
        None,
        stride,
        padding,
        dilation,
        transposed,
        output_padding,
        groups,
        [False, True, False],
    )
    grad_weight.copy_(found)


def _geometry(
    weight: Tensor,
) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    dims = weight.dim() - 2
    return [STRIDE] * dims, [PADDING] * dims, [1] * dims, False, [0] * dims, 1
