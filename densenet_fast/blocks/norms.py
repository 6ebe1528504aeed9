"""Batch normalisations around the operators: coefficients, running statistics, gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import synchronized
from densenet_fast.blocks.specs import NormSpec
from densenet_fast.operators.reference_block import Coefficients
from densenet_fast.operators.rows import statistics_dtype


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


def behind_bias(norm: NormSpec, bias: Tensor | None) -> NormSpec:
    """The norm of z + bias, of a convolution's `bias` [C] or None, as a norm of z.

    The batch's mean has the bias in it, which so cancels: its gradient is zeros. A frozen mean has
    not: there the bias shifts the norm's output.
    """
    if bias is None:
        return norm
    dtype = statistics_dtype(bias.dtype)
    shift = bias.to(dtype)
    if norm.batch_statistics:
        shift = 0 * shift
    else:
        assert norm.running_var is not None
        shift = shift * (norm.running_var.to(dtype) + norm.eps).rsqrt()
        if norm.weight is not None:
            shift = shift * norm.weight.to(dtype)
    if norm.bias is not None:
        shift = shift + norm.bias.to(dtype)
    return norm._replace(bias=shift, offset=bias)


# A norm that is the only one in its node: its statistics are mean, variance and, if it is
# synchronised, the number of values that they are of, in one vector.


def statistics_size(norm: NormSpec, channels: int) -> int:
    """Elements of that vector."""
    return 2 * channels + bool(norm.group)


def statistics_of(norm: NormSpec, rows: Tensor) -> Tensor:
    """The statistics of `rows` [N, *size, C]; of a frozen norm nobody reads them."""
    channels = rows.shape[-1]
    statistics = torch.empty(
        statistics_size(norm, channels), dtype=statistics_dtype(rows.dtype), device=rows.device
    )
    mean, var, total = _parts(statistics, channels)
    if norm.batch_statistics:
        operators.channel_statistics(rows, mean, var)
    if norm.group:
        synchronized.combine(norm.group, rows[..., 0].numel(), mean, var, total)
    return statistics


def of_statistics(norm: NormSpec, statistics: Tensor, channels: int) -> Coefficients:
    """The norm by these statistics, or its own where it is frozen."""
    mean, var, _ = _parts(statistics, channels)
    if norm.running_mean is not None and norm.running_var is not None:
        mean, var = norm.running_mean, norm.running_var
    return coefficients(norm.weight, norm.bias, norm.eps, mean, var, statistics)


def correct_(
    norm: NormSpec,
    forward: Coefficients,
    statistics: Tensor,
    rows: Tensor,
    grad_rows: Tensor,
    grad_gamma: Tensor,
    grad_beta: Tensor,
) -> None:
    """Correct scale * grad_norm for the batch's statistics, with the sums of all ranks."""
    sums = torch.stack((grad_beta, forward.rstd * grad_gamma)).mul_(forward.scale)
    if norm.group:
        total = _parts(statistics, rows.shape[-1])[2]
        sums = synchronized.mean_over_ranks(norm.group, sums, total).mul_(rows[..., 0].numel())
    operators.finish_gradient(rows, grad_rows, forward.mean, sums[0], sums[1], grad_rows)


def _parts(statistics: Tensor, channels: int) -> Sequence[Tensor]:
    return statistics.split((channels, channels, len(statistics) - 2 * channels))


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


def place(norm: NormSpec, channels: int) -> Place:
    """That of a norm that is the only one in its node."""
    return Place(norm, 0, channels, 2 * channels if norm.group else -1, channels)


class Updates(NamedTuple):
    """What `operators.update_running_statistics_` takes, and what running means get behind it."""

    running: list[Tensor]
    counters: list[Tensor]
    places: list[int]
    momenta: list[float]
    offsets: list[tuple[Tensor, Tensor, float]]  # a running mean, an offset and its weight


def updates(places: Iterable[Place]) -> Updates:
    """What a step changes of these norms. One that was used twice is there twice."""
    found = Updates([], [], [], [], [])
    for norm, *place in places:
        if norm.counter is not None:
            found.counters.append(norm.counter)
        momentum, mean, var = norm.momentum, norm.running_mean, norm.running_var
        if norm.batch_statistics and momentum is not None and mean is not None and var is not None:
            found.running.extend((mean, var))
            found.places.extend(place)
            found.momenta.append(momentum)
            for at, (other, offset, weight) in enumerate(found.offsets):
                if other is mean:  # which forgets them, too
                    found.offsets[at] = other, offset, weight * (1 - momentum)
            if norm.offset is not None:
                found.offsets.append((mean, norm.offset, momentum))
    return found
