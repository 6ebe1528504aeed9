"""One batch normalisation around the operators: coefficients, running statistics, its gradient."""

from __future__ import annotations

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


def update_running_statistics(
    norm: NormSpec, mean: Tensor, var: Tensor, count: int, total: Tensor | None
) -> None:
    """The share of this step in the running statistics, where the norm keeps them.

    `count` are the values of a channel in this process, `total` [1] those of a synchronised norm.
    """
    if not norm.batch_statistics or norm.momentum is None:
        return
    if norm.running_mean is not None and norm.running_var is not None:
        if total is not None:
            var, count = synchronized.unbiased(var, total), _CORRECTED
        ops.update_running_statistics(
            mean, var, count, norm.momentum, norm.running_mean, norm.running_var
        )


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
