"""Norm modules as the specs of one step."""

from __future__ import annotations

from torch import Tensor, nn

from densenet_fast.blocks import synchronized
from densenet_fast.blocks.specs import NormSpec
from densenet_fast.modules.eligibility import Norm, parameter, setting


def norm_spec(norm: Norm, counted: list[Tensor]) -> NormSpec:
    """What `norm` would do if it were called now, as in its class's `forward`.

    `counted` are the counters that the same step will have counted in before, to which the norm's
    own is added.
    """
    # Every norm in every step: nn.Module.__getattr__ would be most of the work.
    state = norm.__dict__
    buffers = state["_buffers"]
    mean, var = buffers["running_mean"], buffers["running_var"]
    momentum = counter = None
    if state["training"] and setting(state, "track_running_stats"):
        momentum = state["momentum"]
        counter = buffers["num_batches_tracked"]
        if counter is not None:
            counted.append(counter)
            if momentum is None:
                momentum = 1.0 / (int(counter) + sum(one is counter for one in counted))
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
        group="" if type(norm) is nn.BatchNorm2d else synchronized.group_of(norm),
        counter=counter,
    )
