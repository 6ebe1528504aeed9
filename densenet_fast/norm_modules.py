"""Norm modules as the specs of one step, and the counting of that step."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densenet_fast import synchronized
from densenet_fast.eligibility import Norm, parameter, setting
from densenet_fast.specs import NormSpec


class StepCounts:
    """The norms' `num_batches_tracked`: counted around the step, as a context.

    A step that is refused leaves every counter as it was. One that is cut short does not: where
    torch.utils.checkpoint has recomputed all it needs, it stops a forward by an exception of its
    own, and the running statistics have been updated by then.
    """

    def __init__(self) -> None:
        self.counters: list[Tensor] = []

    def add(self, counter: Tensor) -> None:
        """Count this step too. A norm used twice counts twice."""
        self.counters.append(counter)

    def including_this_step(self, counter: Tensor) -> int:
        """Steps so far, with those still to be counted."""
        return int(counter) + sum(pending is counter for pending in self.counters)

    def __enter__(self) -> None:
        self._count(1)

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, (TypeError, ValueError, RuntimeError)):
            self._count(-1)

    def _count(self, steps: int) -> None:
        once = {id(counter): counter for counter in self.counters}
        if len(once) == len(self.counters) > 0:
            torch._foreach_add_(self.counters, steps)
            return
        for counter in self.counters:
            counter.add_(steps)


def norm_spec(norm: Norm, counts: StepCounts) -> NormSpec:
    """What `norm` would do if it were called now, as in its class's `forward`."""
    # Every norm in every step: nn.Module.__getattr__ would be most of the work.
    state = norm.__dict__
    buffers = state["_buffers"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    momentum = None
    if state["training"] and setting(state, "track_running_stats"):
        momentum = state["momentum"]
        counter = buffers["num_batches_tracked"]
        if counter is not None:
            counts.add(counter)
            if momentum is None:
                momentum = 1.0 / counts.including_this_step(counter)
        # Neither a momentum nor a counter: BatchNorm leaves the running statistics alone then.
        if mean is None:
            momentum = None
    return NormSpec(
        weight=parameter(state, "weight"),
        bias=parameter(state, "bias"),
        running_mean=mean,
        running_var=var,
        eps=state["eps"],
        batch_statistics=state["training"] or mean is None,
        momentum=momentum,
        group=None if type(norm) is nn.BatchNorm2d else synchronized.group_of(norm),
    )
