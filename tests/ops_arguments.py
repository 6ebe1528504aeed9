"""Right arguments for every operator, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from devices import device
from op_cases import Case
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators import reference, reference_block

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
    "update_running_statistics_": lambda make: {
        "statistics": make.vector(2 * C + 2 * B + 1).abs() + 2,
        "running": [make.vector(size).abs() for size in (C, C, B, B, B, B)],
        "counters": [torch.tensor(n, device=device()) for n in (3, 5)],
        # The last norm is synchronised: its number of values is the vector's last.
        "places": [0, C, -1, C, 2 * C, 2 * C + B, -1, B, 2 * C, 2 * C + B, 2 * (C + B), B],
        "momenta": [0.1, 0.3, 0.5],
        "count": 60,
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
        "linear": True,
    },
    "transition_backward": lambda make: {
        "grad_out": make.rows(SMALL, B),
        "features": make.rows(PIXELS, C),
        **make.vectors(C, *_NORM),
        "weight": make.weight(B, C),
        "grad_features": make.rows(PIXELS, C),
        **make.vectors(C, *_SUMS),
        "grad_weight": make.weight(B, C),
        "linear": True,
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
    "dense_block_forward_": lambda make: block(make, backward=False),
    "dense_block_backward_": lambda make: block(make, backward=True),
}
# Block operators: only the fused nodes call these, so that Python does not check them again.
BLOCKS = ("dense_block_forward_", "dense_block_backward_")
SCRATCH = ("vectors", "grad_growth", "grad_norm")


def block(make: _Maker, *, backward: bool) -> dict[str, Any]:
    """Two layers of a block on C channels: one norm is frozen, one has no weight or bias."""
    layers, rows, channels = 2, PIXELS[0] * PIXELS[1] * PIXELS[2], C + 2 * K
    none = make.vector(0)

    def vectors(*sizes: int) -> list[Tensor]:
        return [make.vector(size).abs() + 0.5 for size in sizes]

    starts = [C + K * layer for layer in range(layers)]
    parameters: list[Tensor] = []
    for start in starts:
        parameters += [*vectors(start, start), make.weight(B, start, 1, 1)]
        parameters += [*vectors(B, B), make.weight(K, B, 3, 3)]
    parameters[3:5] = none, none
    shared = {
        "parameters": parameters,
        "frozen": [none] * 6 + vectors(B, B),
    }
    described = {
        "numbers": [1e-5, 1e-3, 0.0, 0.0, 1e-5, 1e-3, 0.5, 0.0],
        "seeds": [1, 2],
        "reduced": 2,
    }
    statistics = make.vector(2 * channels + 4 * B).abs() + 0.1
    bottlenecks = [make.rows(PIXELS, B) for _ in range(layers)]
    scratch = {"vectors": make.vector(3 * (sum(starts) + (layers + 1) * B))}
    features = make.rows(PIXELS, channels)
    if not backward:
        return {
            "features": features,
            "statistics": statistics,
            "bottlenecks": bottlenecks,
            **scratch,
            **shared,
            **described,
            "recompute": False,
            "first": 0,
            "last": 2 * layers,
        }
    gradients = [
        torch.zeros_like(t) if t.dim() == 4 else make.vector(size)
        for t, size in zip(
            parameters, [n for start in starts for n in (start, start, 0, B, B, 0)], strict=True
        )
    ]
    return {
        "features": features,
        "grad_features": make.rows(PIXELS, channels),
        "statistics": statistics,
        "sums": make.vector(2 * channels),
        "bottlenecks": bottlenecks,
        "grad_growth": make.weight(rows * K),
        "grad_norm": make.weight(rows * B),
        **scratch,
        **shared,
        "gradients": gradients,
        **described,
        "held": 1,
        "lowest": -1,
        "first": 0,
        "last": 2 * layers,
    }


def definition(op: str) -> Callable[..., None]:
    """The operator in plain PyTorch."""
    return getattr(reference, op, None) or getattr(reference_block, op)


def loop_in_python(patch: pytest.MonkeyPatch) -> None:
    """Have blocks run by the definition's loop over the operators that `ops` has by then."""
    for name in BLOCKS:
        patch.setattr(operators, name, partial(getattr(reference_block, name), operators=operators))


def tensors(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """All tensors among arguments by name, those in lists too, without scratch."""
    for name, value in given.items():
        if name in SCRATCH:
            continue
        if isinstance(value, list):
            yield from ((f"{name}[{i}]", v) for i, v in enumerate(value) if isinstance(v, Tensor))
        elif isinstance(value, Tensor):
            yield name, value


def wide(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments with float32 weights and gradients of weights."""

    def change(name: str, value: Any) -> Any:
        if name in ("parameters", "gradients"):
            return [one.float() if one.dim() == 4 else one for one in value]
        return value.float() if name in ("weight", "grad_weight") else value

    return {name: change(name, value) for name, value in given.items()}


def arguments(
    op: str, dtype: torch.dtype = torch.float32, *, dense: bool = False
) -> dict[str, Any]:
    """A full set of arguments of `op`, slices of wider buffers unless `dense`."""
    return ARGUMENTS[op](_Maker(dtype, dense=dense))
