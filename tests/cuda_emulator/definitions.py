"""What each kernel is held against: the operators in plain PyTorch, and steps of a block's."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from densenet_fast import reference, reference_block


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
    def defer_correction(
        scale: Tensor,
        rstd: Tensor,
        grad_gamma: Tensor,
        grad_beta: Tensor,
        sum_grad: Tensor,
        sum_grad_x: Tensor,
    ) -> None:
        """What a norm leaves to the correction of its input's gradient."""
        sum_grad += scale * grad_beta
        sum_grad_x += scale * rstd * grad_gamma


DEFINITIONS = Definitions()
