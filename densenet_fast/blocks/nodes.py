"""Fused nodes: one `autograd.Function` each, for eager mode and for graphs.

Eager mode calls a node's forward and backward directly. Where torch.compile records a graph, or
shapes alone are wanted, the same two functions are operators of the graph, and the running
statistics are written by a third behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import autocast, norms
from densenet_fast.blocks.specs import NormSpec, Tensors
from densenet_fast.operators.rows import empty_channels_last, empty_gradient
from densenet_fast.operators.torch_internals import FakeTensor

NAMESPACE = "densenet_fast_nodes"


def recorded(tensor: Tensor) -> bool:
    """Whether a graph is being made, or shapes alone are wanted: a node must be one operator."""
    return torch.compiler.is_compiling() or type(tensor) is FakeTensor


def node(schema: str, fake: Callable[..., Any]) -> Callable[[Callable[..., Any]], Any]:
    """Make a function, which runs outside autograd and autocast, an operator of a graph as well."""

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def run(*args: Any) -> Any:
            with torch.no_grad(), autocast.disabled(args[0].device.type):
                return function(*args)

        name = f"{NAMESPACE}::{function.__name__}"
        torch.library.define(name, schema)
        torch.library.impl(name, "CompositeExplicitAutograd", run)
        torch.library.register_fake(name, fake)
        operator = getattr(getattr(torch.ops, NAMESPACE), function.__name__).default

        @wraps(function)
        def called(*args: Any) -> Any:
            return operator(*args) if recorded(args[0]) else run(*args)

        return called

    return decorate


def _count_step_fake(*_: object) -> None:
    """Only writes into its arguments."""


@node(
    "(Tensor statistics, Tensor(a!)[] running, Tensor(b!)[] counters, int[] places, "
    "float[] momenta, SymInt count) -> ()",
    _count_step_fake,
)
def count_step(statistics: Tensor, *args: Any) -> None:
    """`operators.update_running_statistics_`."""
    operators.update_running_statistics_(statistics, *args)


def record(statistics: Tensor, updates: norms.Updates, count: int) -> None:
    """Update running statistics and counters by what a node has found, over `count` values each.

    Everything, or nothing.
    """
    *lists, offsets = updates
    if updates.running or updates.counters:
        count_step(statistics, *lists, count)
    for mean, offset, weight in offsets:
        mean.add_(offset.detach(), alpha=weight)


Finish = Callable[[Tensor], None]


def applied(
    function: Any,
    input: Tensor,
    link: Tensor | None,
    finish: Finish,
    rest: Sequence[Any],
    parameters: Tensors,
    buffers: Tensors,
) -> Tensor:
    """The output of a node's Function, whose second output are statistics for `finish`.

    `link` is a way back to the input of a node that does not keep it. `finish` is called within
    the node, so that a checkpoint which runs the forward again does not stop between the two; in a
    graph behind it.
    """
    if not recorded(input):
        output: Tensor = function.apply(input, link, finish, *rest, *parameters, *buffers)[0]
        return output
    # Dynamo takes no tensor twice.
    seen: set[int] = set()
    distinct = []
    for tensor in parameters:
        if tensor is not None and id(tensor) in seen:
            tensor = tensor.view_as(tensor)
        elif tensor is not None:
            seen.add(id(tensor))
        distinct.append(tensor)
    output, statistics = function.apply(input, None, None, *rest, *distinct, *buffers)
    finish(statistics)
    return output


class FirstOrderOnly(torch.autograd.Function):
    """Gradients with an error behind them."""

    @staticmethod
    def forward(ctx: Any, what: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The first `count` tensors."""
        ctx.what = what
        return tuple(gradient.view_as(gradient) for gradient in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> None:
        """No derivative."""
        raise RuntimeError(
            f"{ctx.what} cannot be differentiated twice: its gradients are computed by fused "
            "operators that have no derivative. For second derivatives run a plain network, such "
            "as torchvision's"
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
    marked = iter(FirstOrderOnly.apply(what, len(given), *given, *behind))
    return [None if gradient is None else next(marked) for gradient in gradients]


def wanted(
    gradients: Sequence[Tensor | None], tensors: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor]:
    """The gradients that are needed, in the types of what they belong to."""
    return [
        gradient if gradient.dtype is tensor.dtype else gradient.to(tensor.dtype)
        for gradient, tensor, need in zip(gradients, tensors, needs, strict=True)
        if need and gradient is not None and tensor is not None
    ]


def wanted_like(parameters: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """Room for the gradients of those parameters that need one."""
    return [
        empty_gradient(parameter)
        for parameter, need in zip(parameters, needs, strict=True)
        if need and parameter is not None
    ]


def spread(gradients: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """The gradients in the places of what needs one."""
    rest = iter(gradients)
    return [next(rest) if need else None for need in needs]


def one_norm_gradients_fake(
    grad_output: Tensor, input: Tensor, places: Tensor, statistics: Tensor, *args: Any
) -> list[Tensor]:
    """Shapes of what the `gradients` of `one_norm` give."""
    parameters, *_, (input_needed, *needs) = args
    found = [empty_channels_last(input.shape, input)] if input_needed else []
    return found + wanted_like(parameters, needs)


def one_norm(what: str, output: Callable[..., Any], gradients: Callable[..., Any]) -> Any:
    """What runs a node that has one norm and four parameters, the norm's among them.

    `output` gives the output, a place for each of its elements and `norms.statistics_of` the norm,
    from the input, parameters, buffers, and the rest with the norm's settings behind it;
    `gradients` those that are needed, from the output's and all of these.
    """

    class OneNorm(torch.autograd.Function):
        @staticmethod
        def forward(
            ctx: Any,
            input: Tensor,
            _: Tensor | None,
            finish: Finish | None,
            rest: tuple[Any, ...],
            *tensors: Tensor | None,
        ) -> tuple[Tensor, Tensor]:
            found, places, statistics = output(input, tensors[:4], tensors[4:], *rest)
            if finish is not None:
                finish(statistics)
            ctx.mark_non_differentiable(statistics)
            ctx.save_for_backward(input, places, statistics, *tensors)
            ctx.rest = rest
            return found, statistics

        @staticmethod
        def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
            saved = ctx.saved_tensors  # once: torch.utils.checkpoint refuses a second reading
            kept, parameters, buffers = saved[:3], saved[3:7], saved[7:]
            needs = [ctx.needs_input_grad[index] for index in (0, 4, 5, 6, 7)]
            found = gradients(grad_outputs[0], *kept, parameters, buffers, *ctx.rest, needs)
            behind = [grad_outputs[0], *saved]
            first, *others = first_order_only(what, spread(found, needs), behind)
            return (first, None, None, None, *others, *[None] * len(buffers))

    def run(
        input: Tensor,
        norm: NormSpec,
        parameters: Tensors,
        finish: Finish,
        *rest: Any,
        buffers: Tensors = (),
    ) -> Tensor:
        frozen = (None, None) if norm.batch_statistics else (norm.running_mean, norm.running_var)
        buffers = (*frozen, *buffers)
        rest = (*rest, norm.eps, norm.batch_statistics, norm.group)
        if torch.is_grad_enabled() and any(
            tensor is not None and tensor.requires_grad for tensor in (input, *parameters)
        ):
            return applied(OneNorm, input, None, finish, (rest,), parameters, buffers)
        found: Tensor
        found, _, statistics = output(input, parameters, buffers, *rest)
        finish(statistics)
        return found

    return run


def planned_shape(shape: Sequence[int]) -> Sequence[int]:
    """The shape to plan memory for: in a graph for any size, the size that it was traced with.

    Reading it otherwise would bind the graph to that size.
    """
    if not torch.compiler.is_compiling():
        return shape
    from torch.fx.experimental import symbolic_shapes  # which imports sympy

    hint = getattr(symbolic_shapes, "optimization_hint", None)  # torch 2.14 and newer
    return shape if hint is None else [hint(size) for size in shape]
