"""A dense block with the transition or the final norm behind it, as one autograd node."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_fast.specs import (
    CHECKPOINT_MODES,
    AvgPoolTail,
    Checkpoint,
    LayerSpec,
    NormSpec,
    Tail,
    TransitionTail,
)
from densenet_fast.stem import stem_norm_relu_maxpool

__all__ = [
    "CHECKPOINT_MODES",
    "AvgPoolTail",
    "Checkpoint",
    "LayerSpec",
    "NormSpec",
    "Tail",
    "TransitionTail",
    "dense_block",
    "stem_norm_relu_maxpool",
]


def dense_block(
    input: Tensor,
    layers: Sequence[LayerSpec],
    *,
    tail: Tail | None = None,
    checkpoint: Checkpoint = "bottleneck",
) -> Tensor:
    """Run `layers` on `input` [N, C0, H, W] and, fused behind them, `tail`.

    Returns the concatenated features [N, C, H, W] without a tail, [N, Cout, H // 2, W // 2] behind
    a `TransitionTail` (both channels last in memory), [N, C] behind an `AvgPoolTail`.
    """
    raise NotImplementedError
