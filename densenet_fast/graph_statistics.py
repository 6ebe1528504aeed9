"""The running statistics and counters of a fused node, as one operator of a graph."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_fast.graph_library import define
from densenet_fast.norms import Update, record, running
from densenet_fast.specs import NormSpec

Part = tuple[NormSpec, int, int, int]  # where its mean and its variance begin, and how many


def _count_step(
    statistics: Tensor,
    buffers: list[Tensor],
    counters: list[Tensor],
    parts: list[int],
    momenta: list[float],
    count: int,
) -> None:
    vector = statistics.view(-1)
    updates = []
    for index, momentum in enumerate(momenta):
        mean, var, length = parts[3 * index : 3 * index + 3]
        updates.append(
            Update(
                vector[mean : mean + length],
                vector[var : var + length],
                count,
                momentum,
                *buffers[2 * index : 2 * index + 2],
            )
        )
    record(updates, counters)


def _count_step_fake(*_: object) -> None:
    """Only writes into its arguments."""


_operator = define(
    "count_step",
    "(Tensor statistics, Tensor(a!)[] running, Tensor(b!)[] counters, int[] parts, "
    "float[] momenta, SymInt count) -> ()",
    _count_step,
    _count_step_fake,
)


def count_step(statistics: Tensor, parts: Sequence[Part], count: int) -> None:
    """What a step over `count` values per channel changes: the norms' own, and their counters."""
    counters = [norm.counter for norm, *_ in parts if norm.counter is not None]
    buffers: list[Tensor] = []
    flat: list[int] = []
    momenta: list[float] = []
    for norm, mean, var, length in parts:
        updated = running(norm)
        if updated is not None:
            momenta.append(updated[0])
            buffers += updated[1:]
            flat += [mean, var, length]
    if buffers or counters:
        _operator(statistics, buffers, counters, flat, momenta, count)
