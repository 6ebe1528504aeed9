"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise refusal(ctx.what)


def refusal(what: str) -> RuntimeError:
    """The error of second derivatives."""
    return RuntimeError(
        f"{what} cannot be differentiated twice: its gradients are computed by fused operators "
        "that have no derivative. For second derivatives run a plain network, such as torchvision's"
    )


def first_order_only(
    what: str, gradients: Sequence[Tensor | None], dependencies: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """The gradients as they are, or under `create_graph=True` with an error behind them.

    The error waits on the way from the gradients to each of `dependencies`.
    """
    if not torch.is_grad_enabled():
        return list(gradients)
    given = [gradient for gradient in gradients if gradient is not None]
    behind = [tensor for tensor in dependencies if tensor is not None and tensor.requires_grad]
    marked = iter(_FirstOrderOnly.apply(what, len(given), *given, *behind))
    return [None if gradient is None else next(marked) for gradient in gradients]
