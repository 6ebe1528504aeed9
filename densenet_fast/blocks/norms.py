"""Batch normalisations around the operators: coefficients, running statistics, gradients."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks.specs import NormSpec
from densenet_fast.operators.reference_block import Coefficients


def plain(vector: Tensor, dtype: torch.dtype) -> Tensor:
    """A vector as operators read it: itself, if it is so already."""
    return vector.to(dtype).contiguous()


def coefficients(
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    mean: Tensor,
    var: Tensor,
    like: Tensor,
) -> Coefficients:
    """Coefficients from mean and biased variance, in the type of `like`."""
    mean, var = plain(mean, like.dtype), plain(var, like.dtype)
    weight = None if weight is None else plain(weight, like.dtype)
    bias = None if bias is None else plain(bias, like.dtype)
    scale, shift, rstd = like.new_empty(3, len(mean)).unbind()
    operators.norm_coefficients(mean, var, weight, bias, eps, scale, shift, rstd)
    return Coefficients(scale, shift, mean, rstd)


class Place(NamedTuple):
    """A norm, and where the statistics of what it has normalised in this step are in a vector.

    `total` is the number of values that those of a synchronised norm were taken from; -1 where it
    is not synchronised.
    """

    norm: NormSpec
    mean: int
    var: int
    total: int
    channels: int


# Running statistics, counters, places and momenta, as `operators.update_running_statistics_` takes
# them.
Updates = tuple[list[Tensor], list[Tensor], list[int], list[float]]


def updates(places: Iterable[Place]) -> Updates:
    """What a step changes of these norms. One that was used twice is there twice."""
    running: list[Tensor] = []
    counters: list[Tensor] = []
    flat: list[int] = []
    momenta: list[float] = []
    for norm, *place in places:
        if norm.counter is not None:
            counters.append(norm.counter)
        momentum, mean, var = norm.momentum, norm.running_mean, norm.running_var
        if norm.batch_statistics and momentum is not None and mean is not None and var is not None:
            running += (mean, var)
            flat += place
            momenta.append(momentum)
    return running, counters, flat, momenta
