"""The stem's convolution: of volumes by a kernel on the CPU, else PyTorch's.

PyTorch's is computed in float32 where it is slow in bfloat16.

On processors without bfloat16 instructions PyTorch's bfloat16 convolutions take several times as
long as in float32 (with AVX-512 alone five times). The values are those of bfloat16 all the same:
inputs and weights are rounded to it in front, outputs and gradients behind.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from densenet_fast import operators
from densenet_fast.blocks import autocast, nodes
from densenet_fast.blocks.specs import ConvGeometry
from densenet_fast.operators import reference_stem, torch_internals
from densenet_fast.operators.backends import backend_for, get_backend
from densenet_fast.operators.rows import (
    as_rows,
    empty_channels_last,
    empty_gradient,
    gradient_format,
    images_of,
    rows_of,
)

Size = Sequence[int]
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d

_WIDE_PARTS = 8
_KERNELS_CHANNELS = 4
_X86_INSTRUCTIONS = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")


def _bfloat16_instructions() -> bool:
    if platform.machine().lower() in ("x86_64", "amd64"):
        tests = (getattr(torch.cpu, name, None) for name in _X86_INSTRUCTIONS)
        return any(test is not None and bool(test()) for test in tests)
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


_INSTRUCTIONS = _bfloat16_instructions()  # a constant, which torch.compile can read


def _bfloat16_is_fast() -> bool:
    return _INSTRUCTIONS


def fast_type(dtype: torch.dtype, device: torch.device, dims: int) -> torch.dtype:
    """The type in which to compute convolutions of images of `dtype` and so many dimensions."""
    if dtype != torch.bfloat16 or device.type != "cpu":
        return dtype
    if dims == 3:
        return torch.float32  # PyTorch's weight gradient is wrong for volumes of few slices
    if _bfloat16_is_fast():
        return dtype
    # Not `select`, which remembers its answers: a graph would be bound to what it remembers.
    kernels = get_backend() != "reference" and backend_for(device, dtype).backend == "cpu"
    return torch.float32 if kernels else dtype


def windows(size: Size, kernel: Size, stride: Size, padding: Size, dilation: Size) -> list[int]:
    """How many windows of a convolution or pooling fit into images of `size`."""
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    ]


def columns(conv: Conv, images: int, output: Size, dtype: torch.dtype, device: torch.device) -> int:
    """Bytes that PyTorch needs besides, to compute the convolution in this type: im2col's matrix.

    Only what oneDNN does not compute needs one, and `output` is the size of the images behind it.
    Of volumes the output, or its gradient, is there in a second layout.
    """
    if device.type != "cpu" or dtype != torch.float64:
        return 0
    columns = conv.in_channels * math.prod(conv.kernel_size)
    if len(output) == 3:
        columns += conv.out_channels
    return images * columns * math.prod(output) * dtype.itemsize


def workspace(conv: Conv, slices: int, itemsize: int) -> int:
    """Bytes that the kernel's gradient needs besides: weights of 13 points in up to eight parts."""
    lines = conv.weight[0].numel() // reference_stem.KERNEL
    return 13 * lines * conv.out_channels * min(8, slices) * max(4, itemsize)


def _fast_type(tensor: Tensor) -> torch.dtype:
    return fast_type(tensor.dtype, tensor.device, tensor.dim() - 2)


def channels_innermost(weight: Tensor) -> Tensor:
    """The weight in a layout that makes the convolution write its output in the same."""
    if weight.dim() == 4:
        return weight.contiguous(memory_format=torch.channels_last)
    return images_of(as_rows(weight))  # also of sequences, and with the strides of one channel


def convolution(input: Tensor, weight: Tensor, bias: Tensor | None, conv: ConvGeometry) -> Tensor:
    """Of an input of any dimensions, all in one type."""
    stride, padding, dilation, groups = conv
    none = [0] * len(stride)
    return torch.convolution(input, weight, bias, stride, padding, dilation, False, none, groups)


def _parts(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """The images in one part, or in several where they are computed in a wider type.

    What is wider than what is stored then needs little room.
    """
    if dtype == tensor.dtype:
        return (tensor,)
    return tensor.split(wide_images(len(tensor)))


def wide_images(images: int) -> int:
    """Images of a batch that are computed together in a wider type than they are stored in."""
    return -(-images // _WIDE_PARTS)


def has_kernel(
    shape: Size,
    conv: Conv | ConvGeometry,
    weight: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
) -> bool:
    """Whether an operator computes this convolution of [N, C, *size]: of volumes, on the CPU.

    Of few channels. Of images PyTorch's is as fast.
    """
    dims = 3
    return (
        weight.dim() == len(shape) == 2 + dims
        and device.type == "cpu"
        and bias is None
        and weight.shape[1] == shape[1] <= _KERNELS_CHANNELS
        and tuple(weight.shape[2:]) == (reference_stem.KERNEL,) * dims
        and tuple(conv.stride) == (reference_stem.STRIDE,) * dims
        and tuple(conv.padding) == (reference_stem.PADDING,) * dims
        and tuple(conv.dilation) == (1,) * dims
        and conv.groups == 1
        and backend_for(device, dtype).backend == "cpu"
    )


def forward(
    input: Tensor,
    conv: ConvGeometry,
    weight: Tensor,
    bias: Tensor | None,
    stored: torch.dtype,
) -> Tensor:
    """The convolution in type `stored`, of tensors rounded to it, with channels innermost."""
    input, weight = input.to(stored), weight.to(stored)
    if has_kernel(input.shape, conv, weight, bias, stored, input.device):
        size = windows(input.shape[2:], weight.shape[2:], conv.stride, conv.padding, conv.dilation)
        output = empty_channels_last((len(input), len(weight), *size), input)
        operators.stem_convolution_forward(as_rows(input), weight, rows_of(output))
        return output
    dtype = _fast_type(input)
    weight = channels_innermost(weight.to(dtype))
    bias = None if bias is None else bias.to(stored).to(dtype)

    def convolved(part: Tensor) -> Tensor:
        return convolution(part.to(dtype), weight, bias, conv)

    parts = _parts(input, dtype)
    if len(parts) == 1:
        return convolved(input).to(stored)
    first = convolved(parts[0]).to(stored)
    output = empty_channels_last((len(input), *first.shape[1:]), first)
    at = 0
    for part in parts:
        output[at : at + len(part)] = first if at == 0 else convolved(part)
        at += len(part)
    return output


def backward(
    grad_output: Tensor,
    input: Tensor,
    conv: ConvGeometry,
    weight: Tensor,
    bias: Tensor | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """The wanted gradients of input, weight and bias of `forward`, whose type `grad_output` has.

    Channels innermost, or in the layout of the weight, whichever the convolution has chosen.
    """
    stored, dtype = grad_output.dtype, _fast_type(grad_output)
    if not wanted[0] and has_kernel(input.shape, conv, weight, bias, stored, input.device):
        rounded = weight.to(stored)
        gradient = torch.empty_like(rounded, memory_format=gradient_format(rounded))
        rows = as_rows(input.to(stored))
        operators.stem_convolution_backward(as_rows(grad_output), rows, rounded, gradient)
        return [None, gradient.to(weight.dtype), None]
    wide_weight = weight.to(stored).to(dtype)
    if weight.dim() != 4:  # or the gradients would be copied into the weight's layout
        wide_weight = channels_innermost(wide_weight)
    images: list[Tensor] = []
    sums: list[Tensor | None] = [None, None]
    parts = _parts(grad_output, dtype)
    for grad, part in zip(parts, input.split(len(parts[0])), strict=True):
        found = torch.ops.aten.convolution_backward(
            grad.to(dtype),
            part.to(stored).to(dtype),
            wide_weight,
            None if bias is None else bias.shape,
            conv.stride,
            conv.padding,
            conv.dilation,
            False,
            [0] * len(conv.stride),
            conv.groups,
            wanted,
        )
        if wanted[0]:
            images.append(found[0].to(stored).to(input.dtype))
        for at, gradient in enumerate(found[1:]):
            total = sums[at]
            sums[at] = gradient if total is None else total.add_(gradient)
    grad_input = None
    if images:
        grad_input = images_of(as_rows(images[0] if len(images) == 1 else torch.cat(images)))

    def stored_as(operand: Tensor | None, gradient: Tensor | None) -> Tensor | None:
        if operand is None or gradient is None:
            return None
        gradient = gradient.to(stored).to(operand.dtype)
        return gradient.contiguous(memory_format=gradient_format(operand))

    return [grad_input, *map(stored_as, (weight, bias), sums)]


_VOLUMES = ConvGeometry(
    (reference_stem.STRIDE,) * 3, (reference_stem.PADDING,) * 3, (1,) * 3, groups=1
)


def _forward_fake(input: Tensor, weight: Tensor) -> Tensor:
    found = convolution(input, weight, None, _VOLUMES)
    return empty_channels_last(found.shape, found)


@nodes.node("(Tensor input, Tensor weight) -> Tensor", _forward_fake)
def stem_convolution_forward(input: Tensor, weight: Tensor) -> Tensor:
    """What has a kernel, by itself."""
    return forward(input, _VOLUMES, weight, None, input.dtype)


def _backward_fake(
    grad_output: Tensor, input: Tensor, weight: Tensor, needs: list[bool]
) -> list[Tensor]:
    likes = [empty_channels_last(input.shape, input), empty_gradient(weight)]
    return [like for like, need in zip(likes, needs, strict=True) if need]


@nodes.node(
    "(Tensor grad_output, Tensor input, Tensor weight, bool[] needs) -> Tensor[]",
    _backward_fake,
)
def stem_convolution_backward(
    grad_output: Tensor, input: Tensor, weight: Tensor, needs: list[bool]
) -> list[Tensor]:
    """The gradients of input and weight that `needs` asks for."""
    *found, _ = backward(grad_output, input, _VOLUMES, weight, None, [*needs, False])
    return nodes.wanted(found, [input, weight], needs)


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(input, weight)
        return cast(Tensor, stem_convolution_forward(input, weight))

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Any:
        saved = ctx.saved_tensors
        needs = list(ctx.needs_input_grad)
        found = nodes.spread(stem_convolution_backward(grad_output, *saved, needs), needs)
        behind = [grad_output, *saved]
        return tuple(nodes.first_order_only("the stem's convolution", found, behind))


def _kernel(input: Tensor, weight: Tensor) -> Tensor:
    if torch.is_grad_enabled() and (input.requires_grad or weight.requires_grad):
        return cast(Tensor, _Kernel.apply(input, weight))
    return cast(Tensor, stem_convolution_forward(input, weight))


def module_forward(module: Conv, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the module makes of its input with these parameters, channels innermost."""
    stored = autocast.computed_type(input.dtype, input.device.type)
    if module.padding_mode == "zeros" and has_kernel(
        input.shape, module, weight, bias, stored, input.device
    ):
        weight = autocast.cast(weight).to(stored)
        with autocast.disabled(input.device.type):
            return _kernel(input.to(stored), weight)
    dtype = fast_type(stored, input.device, input.dim() - 2)
    if dtype == stored:
        return torch_internals.conv_forward(module, input, channels_innermost(weight), bias)
    weight = autocast.cast(weight).to(dtype)
    bias = None if bias is None else autocast.cast(bias).to(dtype)
    with autocast.disabled(input.device.type):
        images = input.to(stored).to(dtype)
        output = torch_internals.conv_forward(module, images, channels_innermost(weight), bias)
    return output.to(stored)
