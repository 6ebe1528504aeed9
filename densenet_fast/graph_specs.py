"""Specs as the arguments of an operator, and back: torch.compile's graphs hold no dataclasses.

Every parameter and buffer has a slot; the tensors of the slots that are filled come as a list, as
autograd knows no lists with gaps. Running statistics are updated by an operator of its own
(`densenet_fast.graph_statistics.count_step`), so specs that come back have no momentum.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor

from densenet_fast.specs import (
    AvgPoolTail,
    LayerSpec,
    NormSpec,
    Tail,
    TransitionTail,
    layer_buffers,
    layer_parameters,
    tail_buffers,
    tail_parameters,
    with_layer_tensors,
    with_tail_tensors,
)

Slots = Sequence[Tensor | None]


def filled(slots: Slots) -> tuple[list[Tensor], list[bool]]:
    """The tensors there are, and which slots they fill."""
    return [tensor for tensor in slots if tensor is not None], [
        tensor is not None for tensor in slots
    ]


def spread(values: Sequence[Any], present: Sequence[bool]) -> list[Any]:
    """The values in their slots; None in the others."""
    rest = iter(values)
    return [next(rest) if there else None for there in present]


def _empty_norm(eps: float, batch_statistics: bool) -> NormSpec:
    return NormSpec(None, None, None, None, eps, batch_statistics, momentum=None)


def norm_arguments(norms: Sequence[NormSpec]) -> tuple[list[float], list[bool]]:
    """What a norm is besides its tensors."""
    return [norm.eps for norm in norms], [norm.batch_statistics for norm in norms]


@dataclass(frozen=True)
class BlockArguments:
    """A block's layers and tail as an operator takes them."""

    parameters: list[Tensor]
    buffers: list[Tensor]
    present: list[bool]  # slots of the parameters, then of the buffers
    eps: list[float]
    batch_statistics: list[bool]
    dropout: list[float]
    tail: str  # "none", "transition" or "average"


def block_norms(layers: Sequence[LayerSpec], tail: Tail | None) -> list[NormSpec]:
    """Norm1 and norm2 of every layer, and the tail's."""
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
    return norms if tail is None else [*norms, tail.norm]


def block_arguments(layers: Sequence[LayerSpec], tail: Tail | None) -> BlockArguments:
    """The arguments that `block_specs` makes the same block of."""
    slots = [tensor for layer in layers for tensor in layer_parameters(layer)]
    parameters, wanted = filled([*slots, *tail_parameters(tail)])
    slots = [tensor for layer in layers for tensor in layer_buffers(layer)]
    buffers, given = filled([*slots, *tail_buffers(tail)])
    eps, batch_statistics = norm_arguments(block_norms(layers, tail))
    kind = "none"
    if isinstance(tail, TransitionTail):
        kind = "transition"
    elif isinstance(tail, AvgPoolTail):
        kind = "average"
    dropout = [layer.dropout for layer in layers]
    return BlockArguments(parameters, buffers, wanted + given, eps, batch_statistics, dropout, kind)


def block_specs(arguments: BlockArguments) -> tuple[list[LayerSpec], Tail | None]:
    """The block that `block_arguments` was given, without momenta."""
    norms = iter(map(_empty_norm, arguments.eps, arguments.batch_statistics))
    count = len(arguments.dropout)
    tensors = iter(spread([*arguments.parameters, *arguments.buffers], arguments.present))
    nothing = cast(Tensor, None)
    layers = [
        LayerSpec(next(norms), nothing, next(norms), nothing, dropout)
        for dropout in arguments.dropout
    ]
    tail: Tail | None = None
    if arguments.tail == "transition":
        tail = TransitionTail(next(norms), nothing)
    elif arguments.tail == "average":
        tail = AvgPoolTail(next(norms))
    parameters = [_take(tensors, 6) for _ in range(count)]
    behind = _take(tensors, {"none": 0, "transition": 3, "average": 2}[arguments.tail])
    layers = [
        with_layer_tensors(layer, slots, _take(tensors, 4))
        for layer, slots in zip(layers, parameters, strict=True)
    ]
    return layers, with_tail_tensors(tail, behind, list(tensors))


def _take(values: Iterator[Any], count: int) -> list[Any]:
    return [next(values) for _ in range(count)]
