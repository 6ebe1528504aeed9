"""A transition that ends in a maximum: norm, ReLU, 1x1 convolution, dropout, pooling, as one node.

The maximum does not commute with the convolution, whose output is as large as the input. Neither
that nor the normalised input outlives the forward: the backward needs the input, which is a block's
buffer in any case, and one byte per output element for the places of the maxima.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_fast import operators
from densenet_fast.blocks import autocast, nodes, norms
from densenet_fast.blocks.checks import check_max_transition
from densenet_fast.blocks.forward import halved, matrix
from densenet_fast.blocks.specs import MaxTransition, NormSpec, Tensors
from densenet_fast.operators.philox import draw_seeds
from densenet_fast.operators.rows import (
    as_rows,
    empty_channels_last,
    empty_gradient,
    empty_rows,
    rows_of,
    statistics_dtype,
)

_ARGUMENTS = (
    "Tensor?[] parameters, Tensor?[] buffers, float dropout, bool whole_channels, float eps, "
    "bool batch_statistics, str group"
)


def max_transition(input: Tensor, transition: MaxTransition) -> Tensor:
    """[N, C, *size] to [N, Cout, *size // 2], channels innermost in memory."""
    input = autocast.cast(input)
    check_max_transition(input, transition)
    norm, weight, bias, dropout, whole_channels = transition
    parameters = (norm.weight, norm.bias, weight, bias)
    seed = draw_seeds(1) if dropout > 0 else None

    def finish(statistics: Tensor) -> None:
        updates = norms.updates([norms.place(norm, input.shape[1])])
        nodes.record(statistics, updates, input.shape[0] * input.shape[2:].numel())

    rest = (dropout, whole_channels)
    output: Tensor = _run(input, norm, parameters, finish, *rest, buffers=(seed,))
    return output


class _Call(NamedTuple):
    """The arguments behind the first ones of both directions."""

    norm: NormSpec
    weight: Tensor  # [Cout, C]
    bias: Tensor | None
    seed: int
    dropout: float
    whole_channels: bool

    def drop_(self, rows: Tensor) -> None:
        if self.dropout > 0:
            operators.dropout_(rows, self.seed, self.dropout, self.whole_channels)


def _call(
    parameters: Tensors,
    buffers: Tensors,
    dropout: float,
    whole_channels: bool,
    eps: float,
    batch_statistics: bool,
    group: str,
) -> _Call:
    gamma, beta, weight, bias = parameters
    mean, var, seed = buffers
    norm = NormSpec(gamma, beta, mean, var, eps, batch_statistics, None, group)
    drawn = 0 if seed is None else int(seed)
    return _Call(norm, matrix(weight), bias, drawn, dropout, whole_channels)


def _forward_fake(
    input: Tensor, parameters: Tensors, buffers: Tensors, *args: Any
) -> tuple[Tensor, Tensor, Tensor]:
    images, channels, *size = input.shape
    outputs = matrix(parameters[2]).shape[0]
    output = empty_channels_last((images, outputs, *halved(size)), input)
    places = input.new_empty(images, *halved(size), outputs, dtype=torch.uint8)
    count = 2 * channels + bool(args[-1])
    return output, places, input.new_empty(count, dtype=statistics_dtype(input.dtype))


@nodes.node(f"(Tensor input, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)", _forward_fake)
def max_transition_forward(input: Tensor, *args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The output, the place of each maximum in its window, and `norms.statistics_of` the input."""
    call = _call(*args)
    rows = as_rows(input)
    statistics = norms.statistics_of(call.norm, rows)
    scale, shift, _, _ = norms.of_statistics(call.norm, statistics, rows.shape[-1])
    full = empty_rows((*rows.shape[:-1], len(call.weight)), rows)
    operators.conv1x1_forward(rows, scale, shift, call.weight, full, None, None)
    if call.bias is not None:
        full.add_(call.bias)
    call.drop_(full)
    return *_maxima(full), statistics


def _windows(rows: Tensor) -> Iterator[Tensor]:
    """The first values of all windows of two in each dimension, the second ones, and so on."""
    size = rows.shape[1:-1]
    for starts in product(range(2), repeat=len(size)):
        edges = zip(starts, halved(size), strict=True)
        reached = (slice(None), *(slice(at, 2 * count, 2) for at, count in edges))
        yield rows[reached]


def _maxima(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The largest value of every window, [N, C, *size // 2], and its place, [N, *size // 2, C]."""
    first, *others = _windows(rows)
    images, *size, channels = first.shape
    output = empty_channels_last((images, channels, *size), rows)
    found = rows_of(output).copy_(first)
    places = torch.zeros(found.shape, dtype=torch.uint8, device=rows.device)
    for place, values in enumerate(others, 1):
        places.masked_fill_(values > found, place)
        torch.maximum(found, values, out=found)
    return output, places


def _spread(grad_rows: Tensor, places: Tensor, like: Tensor) -> Tensor:
    """The gradient of what `_maxima` has read, of as many pixels as `like`."""
    full = empty_rows((*like.shape[:-1], grad_rows.shape[-1]), like)
    if any(length % 2 for length in like.shape[1:-1]):
        full.zero_()  # pixels that no window covers
    zero = grad_rows.new_zeros(())
    for place, values in enumerate(_windows(full)):
        torch.where(places == place, grad_rows, zero, out=values)
    return full


@nodes.node(
    f"(Tensor grad_output, Tensor input, Tensor places, Tensor statistics, {_ARGUMENTS}, "
    "bool[] needs) -> Tensor[]",
    nodes.one_norm_gradients_fake,
)
def max_transition_backward(
    grad_output: Tensor, input: Tensor, places: Tensor, statistics: Tensor, *args: Any
) -> list[Tensor]:
    """The gradients of the input and the parameters that `needs` asks for."""
    *args, needs = args  # type: ignore[assignment]
    input_needed, gamma_needed, beta_needed, weight_needed, bias_needed = needs
    call, parameters = _call(*args), args[0]
    rows = as_rows(input)
    forward = norms.of_statistics(call.norm, statistics, rows.shape[-1])
    grad = _spread(as_rows(grad_output), places, rows)
    call.drop_(grad)
    grad_bias = None
    if bias_needed:
        grad_bias = grad.sum(tuple(range(grad.dim() - 1)), dtype=statistics.dtype)
    grad_input = grad_rows = grad_gamma = grad_beta = grad_weight = None
    if input_needed:
        grad_input = empty_channels_last(input.shape, input).zero_()
        grad_rows = rows_of(grad_input)
    if input_needed or gamma_needed or beta_needed:
        grad_gamma, grad_beta = torch.empty_like(forward.scale), torch.empty_like(forward.scale)
    if weight_needed:
        grad_weight = empty_gradient(call.weight)
    # Behind the convolution there is no norm: its output has no part in the gradient.
    identity = statistics.new_zeros(3, len(call.weight))
    identity[0] = 1
    operators.conv1x1_backward(
        grad,
        grad,
        identity,
        rows,
        *forward,
        call.weight,
        grad_rows,
        grad_gamma,
        grad_beta,
        grad_weight,
    )
    if grad_rows is not None and call.norm.batch_statistics:
        assert grad_gamma is not None
        assert grad_beta is not None
        norms.correct_(call.norm, forward, statistics, rows, grad_rows, grad_gamma, grad_beta)
    if grad_weight is not None:
        grad_weight = grad_weight.view(parameters[2].shape)
    found = [grad_input, grad_gamma, grad_beta, grad_weight, grad_bias]
    return nodes.wanted(found, [input, *parameters], needs)


_run = nodes.one_norm("a fused transition", max_transition_forward, max_transition_backward)
