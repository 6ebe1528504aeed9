"""Under `torch.autocast` a fused block computes in the type its convolutions would have had."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

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
