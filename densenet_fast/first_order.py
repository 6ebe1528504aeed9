"""Gradients that cannot be differentiated again, and say so."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FirstOrderOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, what: str, *gradients: Tensor) -> tuple[Tensor, ...]:
        ctx.what = what
        return tuple(gradient.view_as(gradient) for gradient in gradients)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        raise RuntimeError(
            f"{ctx.what} cannot be differentiated twice: its gradients are computed by fused "
            "operators that have no derivative. For second derivatives run the plain network "
            "(torchvision's layers, or any layer that fusion_report lists as not fused)"
        )


def first_order_only(what: str, gradients: list[Tensor | None]) -> list[Tensor | None]:
    """The gradients as they are, or under `create_graph=True` with an error behind them.

    They are non-linear in what the forward saved, so it matters little which inputs require
    gradients: any second derivative through them would silently miss something.
    """
    if not torch.is_grad_enabled():
        return gradients
    given = [gradient.detach().requires_grad_() for gradient in gradients if gradient is not None]
    marked = iter(_FirstOrderOnly.apply(what, *given))
    return [None if gradient is None else next(marked) for gradient in gradients]
