"""What each kernel is held against: the operators in plain PyTorch, and steps of a block's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from densenet_fast.operators import reference, reference_block


class Definitions:
    """Every operator by name, and what is one launcher of CUDA but no operator."""

    def __getattr__(self, op: str) -> Callable[..., None]:
        return getattr(reference, op, None) or getattr(reference_block, op)

    @staticmethod
    def norm_grad_coefficients(
        scale: Tensor,
        mean: Tensor,
        rstd: Tensor,
        grad_gamma: Tensor | None,
        grad_beta: Tensor | None,
        count: int,
        coefficients: Tensor,
    ) -> None:
        """A norm's backward as rows p, q, s: grad_x = p * grad_norm + q * x + s."""
        p, q, s = coefficients.unbind()
        p.copy_(scale)
        q.zero_()
        s.zero_()
        if grad_gamma is not None and grad_beta is not None:
            q.copy_(-scale * rstd * grad_gamma / count)
            s.copy_(-scale * grad_beta / count - q * mean)

    @staticmethod
    def statistics_and_norm(features: Tensor, mean: Tensor, var: Tensor, *others: Any) -> None:
        """Statistics of a norm's last channels, then the norm."""
        new = features.shape[-1]
        reference.channel_statistics(features, mean[-new:], var[-new:])
        reference.norm_coefficients(mean, var, *others)

    @staticmethod
    def sums_and_backward(*given: Any) -> None:
        """A norm's sums, its backward as a map, and what it leaves to the correction."""
        *before, count, coefficients, sum_grad, sum_grad_x = given
        reference.norm_relu_avgpool_backward(*before)
        scale, _, mean, rstd, _, *sums = before[2:]
        Definitions.norm_grad_coefficients(
            scale, mean, rstd, *(sums if count else (None, None)), count, coefficients
        )
        sum_grad += scale * sums[1]
        sum_grad_x += scale * rstd * sums[0]


DEFINITIONS = Definitions()
