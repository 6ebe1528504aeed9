"""The running statistics and counters of a fused node, as one operator of a graph."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from densenet_fast import norms, ops
from densenet_fast.graph_library import define


def _count_step(
    statistics: Tensor,
    running: list[Tensor],
    counters: list[Tensor],
    places: list[int],
    momenta: list[float],
    count: int,
) -> None:
    ops.update_running_statistics_(statistics.view(-1), running, counters, places, momenta, count)


def _count_step_fake(*_: object) -> None:
    """Only writes into its arguments."""


_operator = define(
    "count_step",
    "(Tensor statistics, Tensor(a!)[] running, Tensor(b!)[] counters, int[] places, "
    "float[] momenta, SymInt count) -> ()",
    _count_step,
    _count_step_fake,
)


def count_step(statistics: Tensor, places: Iterable[norms.Place], count: int) -> None:
    """What a step over `count` values per channel changes: the norms' own, and their counters."""
    norms.record(statistics, places, count, update=_operator)
