"""The stem's convolution, which PyTorch computes: in float32 where it is slow in bfloat16.

On processors without AVX-512 or Arm's bfloat16 instructions PyTorch's bfloat16 convolutions take
ten times as long as in float32, or more. The values are those of bfloat16 all the same: inputs and
weights are rounded to it in front, outputs and gradients behind.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_fast import autocast
from densenet_fast.backend import select
from densenet_fast.specs import ConvGeometry


@cache
def _bfloat16_is_fast() -> bool:
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is None or bool(supported())


def _fast_type(tensor: Tensor) -> torch.dtype:
    """The type in which to compute convolutions of this tensor."""
    slow = tensor.dtype == torch.bfloat16 and select(tensor) == "cpu" and not _bfloat16_is_fast()
    return torch.float32 if slow else tensor.dtype


def _channels_last(weight: Tensor) -> Tensor:
    # A weight with channels innermost makes the convolution write its output so.
    return weight.contiguous(memory_format=torch.channels_last)


def module_forward(module: nn.Conv2d, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What the module makes of its input with these parameters, channels innermost."""
    narrow = autocast.cast(input)
    dtype = _fast_type(narrow)
    if dtype == narrow.dtype:
        return module._conv_forward(input, _channels_last(weight), bias)
    weight = autocast.cast(weight).to(dtype)
    bias = None if bias is None else autocast.cast(bias).to(dtype)
    with autocast.disabled(input.device.type):
        output = module._conv_forward(narrow.to(dtype), _channels_last(weight), bias)
    return output.to(narrow.dtype)


def forward(input: Tensor, conv: ConvGeometry, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d of tensors of one type, channels innermost."""
    dtype = _fast_type(input)
    output = F.conv2d(
        input.to(dtype),
        _channels_last(weight.to(dtype)),
        None if bias is None else bias.to(dtype),
        conv.stride,
        conv.padding,
        conv.dilation,
        conv.groups,
    )
    return output.to(input.dtype)


def backward(
    grad_output: Tensor,
    input: Tensor,
    conv: ConvGeometry,
    weight: Tensor,
    bias: Tensor | None,
    wanted: list[bool],
) -> list[Tensor | None]:
    """The wanted gradients of input, weight and bias."""
    dtype = _fast_type(input)
    gradients = torch.ops.aten.convolution_backward(
        grad_output.to(dtype),
        input.to(dtype),
        weight.to(dtype),
        None if bias is None else bias.shape,
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        (0, 0),
        conv.groups,
        wanted,
    )
    return [None if gradient is None else gradient.to(input.dtype) for gradient in gradients]
