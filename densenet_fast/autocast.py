"""Under `torch.autocast` a fused block computes in the type its convolutions would have had."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from densenet_fast.backend import select
from densenet_fast.specs import LayerSpec, Tail, TransitionTail

CAST_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # float64 is left alone


def enabled(kind: str) -> bool:
    """Whether autocast is on for this type of device; some know nothing of it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def disabled(kind: str) -> AbstractContextManager[None]:
    """No autocast inside a `with` block: the operators have made their own choice of types."""
    return torch.autocast(kind, enabled=False) if enabled(kind) else nullcontext()


def computed_type(dtype: torch.dtype, kind: str) -> torch.dtype:
    """The type that convolutions of `dtype` are computed in on this type of device."""
    return torch.get_autocast_dtype(kind) if enabled(kind) and dtype in CAST_TYPES else dtype


def cast(tensor: Tensor) -> Tensor:
    """The tensor in the type that convolutions are computed in."""
    return tensor.to(computed_type(tensor.dtype, tensor.device.type))


def lowered(
    input: Tensor, layers: Sequence[LayerSpec], tail: Tail | None
) -> tuple[Tensor, Sequence[LayerSpec], Tail | None]:
    """Input and convolutions in autocast's type; norms stay, their parameters may be wider."""
    if not enabled(input.device.type):
        return input, layers, tail
    input = cast(input)
    # The kernels round float32 weights in passing and return float32 gradients: no copies.
    as_they_are = select(input) != "reference"

    def weight(tensor: Tensor) -> Tensor:
        return tensor if as_they_are and tensor.dtype == torch.float32 else cast(tensor)

    layers = [
        replace(
            layer, conv1_weight=weight(layer.conv1_weight), conv2_weight=weight(layer.conv2_weight)
        )
        for layer in layers
    ]
    if isinstance(tail, TransitionTail):
        tail = replace(tail, conv_weight=weight(tail.conv_weight))
    return input, layers, tail
