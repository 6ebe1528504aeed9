"""Right arguments for every operator, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from devices import device
from op_cases import Case

PIXELS = (2, 6, 5)
SMALL = (2, 3, 2)  # behind the transition
STEM = (2, 3, 3)  # behind the stem's pooling
C, B, K = 9, 8, 4  # channels of features, bottleneck and growth


class _Maker(Case):
    def vectors(self, channels: int, *names: str) -> dict[str, Any]:
        return {name: self.vector(channels).abs() for name in names}


_NORM = ("scale", "shift", "mean", "rstd")
_SUMS = ("grad_gamma", "grad_beta")

ARGUMENTS: dict[str, Callable[[_Maker], dict[str, Any]]] = {
    "channel_statistics": lambda make: {
        "features": make.rows(PIXELS, C),
        **make.vectors(C, "mean", "var"),
    },
    "norm_coefficients": lambda make: {
        **make.vectors(C, "mean", "var", "weight", "bias"),
        "eps": 1e-5,
        **make.vectors(C, "scale", "shift", "rstd"),
    },
    "update_running_statistics": lambda make: {
        **make.vectors(C, "mean", "var"),
        "count": 60,
        "momentum": 0.1,
        **make.vectors(C, "running_mean", "running_var"),
    },
    "norm_grad_coefficients": lambda make: {
        **make.vectors(B, "scale", "mean", "rstd", *_SUMS),
        "count": 60,
        "coefficients": torch.stack([make.vector(B) for _ in range(3)]),
    },
    "conv1x1_forward": lambda make: {
        "features": make.rows(PIXELS, C),
        **make.vectors(C, "scale", "shift"),
        "weight": make.weight(B, C),
        "bottleneck": make.rows(PIXELS, B),
        **make.vectors(B, "mean", "var"),
    },
    "conv1x1_backward": lambda make: {
        "grad_norm": make.rows(PIXELS, B),
        "bottleneck": make.rows(PIXELS, B),
        "coefficients": torch.stack([make.vector(B) for _ in range(3)]),
        "features": make.rows(PIXELS, C),
        **make.vectors(C, *_NORM),
        "weight": make.weight(B, C),
        "grad_features": make.rows(PIXELS, C),
        **make.vectors(C, *_SUMS),
        "grad_weight": make.weight(B, C),
    },
    "conv3x3_forward": lambda make: {
        "bottleneck": make.rows(PIXELS, B),
        **make.vectors(B, "scale", "shift"),
        "weight": make.weight(K, B, 3, 3),
        "growth": make.rows(PIXELS, K),
        **make.vectors(K, "mean", "var"),
    },
    "conv3x3_backward": lambda make: {
        "grad_growth": make.rows(PIXELS, K),
        "bottleneck": make.rows(PIXELS, B),
        **make.vectors(B, *_NORM),
        "weight": make.weight(K, B, 3, 3),
        "grad_norm": make.rows(PIXELS, B),
        **make.vectors(B, *_SUMS),
        "grad_weight": make.weight(K, B, 3, 3),
    },
    "dropout_": lambda make: {"growth": make.rows(PIXELS, K), "seed": 3, "p": 0.5},
    "finish_gradient": lambda make: {
        "features": make.rows(PIXELS, K),
        "grad_features": make.rows(PIXELS, K),
        **make.vectors(K, "mean", "sum_grad", "sum_grad_x"),
        "out": make.rows(PIXELS, K),
    },
    "transition_forward": lambda make: {
        "features": make.rows(PIXELS, C),
        **make.vectors(C, "scale", "shift"),
        "weight": make.weight(B, C),
        "out": make.rows(SMALL, B),
        **make.vectors(B, "mean", "var"),
    },
    "transition_backward": lambda make: {
        "grad_out": make.rows(SMALL, B),
        "features": make.rows(PIXELS, C),
        **make.vectors(C, *_NORM),
        "weight": make.weight(B, C),
        "grad_features": make.rows(PIXELS, C),
        **make.vectors(C, *_SUMS),
        "grad_weight": make.weight(B, C),
    },
    "norm_relu_avgpool_forward": lambda make: {
        "features": make.rows(PIXELS, C),
        **make.vectors(C, "scale", "shift"),
        "out": make.weight(PIXELS[0], C),
    },
    "norm_relu_avgpool_backward": lambda make: {
        "grad_out": make.weight(PIXELS[0], C),
        "features": make.rows(PIXELS, C),
        **make.vectors(C, *_NORM),
        "grad_features": make.rows(PIXELS, C),
        **make.vectors(C, *_SUMS),
    },
    "norm_relu_maxpool_forward": lambda make: {
        "input": make.rows(PIXELS, C),
        **make.vectors(C, "scale", "shift"),
        "out": make.rows(STEM, C),
        "argmax": torch.zeros(*STEM, C, dtype=torch.uint8, device=device()),
    },
    "norm_relu_maxpool_backward": lambda make: {
        "grad_out": make.rows(STEM, C),
        "argmax": torch.full((*STEM, C), 4, dtype=torch.uint8, device=device()),
        "input": make.rows(PIXELS, C),
        **make.vectors(C, *_NORM),
        "batch_statistics": True,
        "grad_input": make.rows(PIXELS, C),
        **make.vectors(C, *_SUMS),
    },
}


def arguments(
    op: str, dtype: torch.dtype = torch.float32, *, dense: bool = False
) -> dict[str, Any]:
    """A full set of arguments of `op`, slices of wider buffers unless `dense`."""
    return ARGUMENTS[op](_Maker(dtype, dense=dense))
