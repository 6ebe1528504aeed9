"""One batch normalisation around the operators: coefficients, running statistics, its gradient."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_fast import ops, synchronized
from densenet_fast.specs import NormSpec

_CORRECTED = 2**62  # a count of values for which count / (count - 1) is 1


class Coefficients(NamedTuple):
    """A norm as the operators read it: scale * x + shift; mean and rstd are for its backward."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor


def coefficients(norm: NormSpec, mean: Tensor, var: Tensor) -> Coefficients:
    """Coefficients from the batch's statistics `mean` and `var`, or a frozen norm's own."""
    if not norm.batch_statistics:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean = norm.running_mean.to(mean.dtype).contiguous()
        var = norm.running_var.to(var.dtype).contiguous()
    scale, shift, rstd = torch.empty(3, len(mean), dtype=mean.dtype, device=mean.device).unbind()
    ops.norm_coefficients(mean, var, norm.weight, norm.bias, norm.eps, scale, shift, rstd)
    return Coefficients(scale, shift, mean, rstd)


class Seen(NamedTuple):
    """A norm, and the mean and biased variance of what it has normalised in this step.

    `total` [1] are the values that those of a synchronised norm were taken from.
    """

    norm: NormSpec
    mean: Tensor
    var: Tensor
    total: Tensor | None


class Update(NamedTuple):
    """The share of one step in a norm's running statistics."""

    mean: Tensor
    var: Tensor
    values: int
    momentum: float
    running_mean: Tensor
    running_var: Tensor


def running(norm: NormSpec) -> tuple[float, Tensor, Tensor] | None:
    """The momentum, running mean and variance of an update by this step; None: there is none."""
    momentum, mean, var = norm.momentum, norm.running_mean, norm.running_var
    if not norm.batch_statistics or momentum is None or mean is None or var is None:
        return None
    return momentum, mean, var


def updates(seen: Iterable[Seen], count: int) -> tuple[list[Update], list[Tensor]]:
    """What a step over `count` values a channel in this process changes: statistics and counters.

    A norm that was used twice is there twice.
    """
    found: list[Update] = []
    counters: list[Tensor] = []
    for norm, mean, var, total in seen:
        if norm.counter is not None:
            counters.append(norm.counter)
        updated = running(norm)
        if updated is None:
            continue
        values = count
        if total is not None:
            var, values = synchronized.unbiased(var, total), _CORRECTED
        found.append(Update(mean, var, values, *updated))
    return found, counters


def record(found: Sequence[Update], counters: Sequence[Tensor]) -> None:
    """Update the running statistics and add one to the counters: everything, or nothing.

    New values are made beside the old ones, and nothing can fail or interrupt Python while they
    replace them.
    """
    written = {id(buffer): buffer for update in found for buffer in update[-2:]}
    counted = {id(counter): counter for counter in counters}
    old, new = [], []
    if written:
        # As PyTorch's norms: a norm that was called before, and keeps its buffers for its backward,
        # does not take them for altered.
        old.append([buffer.data for buffer in written.values()])
        new.append(torch._foreach_mul(old[-1], 1))
        fresh = dict(zip(written, new[-1], strict=True))
        for mean, var, values, momentum, *buffers in found:
            ops.update_running_statistics(
                mean, var, values, momentum, *(fresh[id(buffer)] for buffer in buffers)
            )
    if counted:
        times = Counter(map(id, counters))  # in the same order
        old.append(list(counted.values()))
        new.append(torch._foreach_add(old[-1], list(times.values())))
    deque(map(torch._foreach_copy_, old, new), maxlen=0)  # a loop without Python's own code


def gradient_coefficients(
    norm: NormSpec,
    forward: Coefficients,
    grad_gamma: Tensor,
    grad_beta: Tensor,
    count: int,
    total: Tensor | None,
) -> Tensor:
    """Rows p, q, s of grad_x = p * grad_norm + q * x + s; counts as in the running statistics."""
    scale, _, mean, rstd = forward
    rows = torch.empty(3, len(scale), dtype=scale.dtype, device=scale.device)
    if norm.batch_statistics:
        if norm.group is not None and total is not None:
            sums = torch.stack((grad_gamma, grad_beta))
            grad_gamma, grad_beta = synchronized.mean_over_ranks(norm.group, sums, total)
            count = 1
        ops.norm_grad_coefficients(scale, mean, rstd, grad_gamma, grad_beta, count, rows)
    else:
        rows[0].copy_(scale)
        rows[1:].zero_()
    return rows


def parameter_gradient(parameter: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The gradient in the parameter's own type; None where there is no parameter or no gradient."""
    if parameter is None or gradient is None:
        return None
    return gradient if gradient.dtype == parameter.dtype else gradient.to(parameter.dtype)
