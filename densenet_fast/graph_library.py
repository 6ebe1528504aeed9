"""Defining the fused nodes as operators that a graph may hold: torch.compile sees them as one.

A node is an operator for the forward, one for the backward, and `count_step` behind it for the
running statistics, since an operator with a derivative may not write to its arguments. What the
forward returns besides its output is what the checkpoint mode keeps. In eager mode none of this
runs: `densenet_fast.dense_block` and `densenet_fast.stem` call the same functions directly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from densenet_fast import autocast
from densenet_fast.first_order import refusal
from densenet_fast.graph_specs import spread

NAMESPACE = "densenet_fast_nodes"


def define(
    name: str, schema: str, run: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator of every device, which runs outside autograd and autocast."""

    def kernel(*args: Any) -> Any:
        with torch.no_grad(), autocast.disabled(args[0].device.type):
            return run(*args)

    qualified = f"{NAMESPACE}::{name}"
    torch.library.define(qualified, schema)
    torch.library.impl(qualified, "CompositeExplicitAutograd", kernel)
    torch.library.register_fake(qualified, fake)
    return getattr(getattr(torch.ops, NAMESPACE), name).default


def differentiable(
    name: str, what: str, gradients: Callable[..., Any], save: Callable[..., Any]
) -> None:
    """Give an operator its derivative, and the operator that computes it an error instead."""

    def refuse(*_: Any) -> None:
        raise refusal(what)

    torch.library.register_autograd(f"{NAMESPACE}::{name}", gradients, setup_context=save)
    torch.library.register_autograd(f"{NAMESPACE}::{name}_backward", refuse)


def no_gradients(inputs: Sequence[Any]) -> list[Any]:
    """None for every input, in the structure that torch.library expects of a backward.

    It takes lists of tensors and empty lists for lists, lists of numbers for single values.
    """
    return [
        [None] * len(value)
        if isinstance(value, (list, tuple)) and all(isinstance(part, Tensor) for part in value)
        else None
        for value in inputs
    ]


def handed_back(
    nothing: Sequence[Any], gradients: Sequence[Tensor], input: bool, parameters: Sequence[bool]
) -> tuple[Any, ...]:
    """What autograd expects of a node: the gradients in the places of those that need one."""
    rest = iter(gradients)
    first = next(rest) if input else None
    return (first, [next(rest) if need else None for need in parameters], *nothing[2:])


def wanted(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, in the types of what they belong to."""
    found: list[Tensor] = []
    for gradient, tensor, need in zip(gradients, tensors, needs, strict=True):
        if need:
            assert gradient is not None
            assert tensor is not None
            found.append(gradient.to(tensor.dtype))
    return found


def wanted_like(
    parameters: Sequence[Tensor], present: Sequence[bool], needs: Sequence[bool]
) -> list[Tensor]:
    """Room for the gradients of the parameters in those slots that need one."""
    slots = spread(parameters, present[: len(needs)])
    return [
        torch.empty_like(parameter, memory_format=torch.contiguous_format)
        for parameter, need in zip(slots, needs, strict=True)
        if need
    ]


def recorded(input: Tensor) -> bool:
    """Whether a graph is being made, or shapes alone are wanted: a node must be one operator."""
    return torch.compiler.is_compiling() or type(input) is FakeTensor


def planned_shape(shape: Sequence[int]) -> Sequence[int]:
    """The shape to plan memory for: in a graph for any size, the size that it was traced with.

    Reading it otherwise would bind the graph to that size.
    """
    if not torch.compiler.is_compiling():
        return shape
    from torch.fx.experimental import symbolic_shapes  # which imports sympy

    hint = getattr(symbolic_shapes, "optimization_hint", None)  # torch 2.14 and newer
    return shape if hint is None else [hint(size) for size in shape]
