"""Under `torch.autocast` a fused block computes in the type its convolutions would have had."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor

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

    layers = [
        replace(layer, conv1_weight=cast(layer.conv1_weight), conv2_weight=cast(layer.conv2_weight))
        for layer in layers
    ]
    if isinstance(tail, TransitionTail):
        tail = replace(tail, conv_weight=cast(tail.conv_weight))
    return cast(input), layers, tail
