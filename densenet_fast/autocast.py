"""Under `torch.autocast` a fused block computes in the type its convolutions would have had."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from densenet_fast.backend import select
from densenet_fast.specs import LayerSpec, Tail, TransitionTail

_CAST_TYPES = (torch.float32, torch.float16, torch.bfloat16)


def enabled(kind: str) -> bool:
    """Whether autocast is on for this type of device; some know nothing of it."""
    return torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)


def disabled(kind: str) -> AbstractContextManager[None]:
    """No autocast inside a `with` block: the operators have made their own choice of types."""
    return torch.autocast(kind, enabled=False) if enabled(kind) else nullcontext()


def lowered(
    input: Tensor, layers: Sequence[LayerSpec], tail: Tail | None
) -> tuple[Tensor, Sequence[LayerSpec], Tail | None]:
    """Input and convolutions in autocast's type; norms stay, their parameters may be wider."""
    kind = input.device.type
    if not enabled(kind):
        return input, layers, tail
    dtype = torch.get_autocast_dtype(kind)

    def cast(tensor: Tensor) -> Tensor:
        # Autocast leaves float64 alone, and so do we.
        return tensor.to(dtype) if tensor.dtype in _CAST_TYPES else tensor

    input = cast(input)
    # The CUDA kernels round float32 weights in passing and return float32 gradients: no copies.
    as_they_are = select(input) == "cuda"

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
