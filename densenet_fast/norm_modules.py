"""BatchNorm2d modules as the specs of one step, and the counting of that step."""

from __future__ import annotations

from torch import Tensor, nn

from densenet_fast.specs import NormSpec


class StepCounts:
    """The norms' `num_batches_tracked`, counted after the step has succeeded.

    A step that is refused for its input must leave every counter as it was.
    """

    def __init__(self) -> None:
        self._counters: list[Tensor] = []

    def add(self, counter: Tensor) -> None:
        """Count this step when it is committed. A norm used twice counts twice."""
        self._counters.append(counter)

    def including_this_step(self, counter: Tensor) -> int:
        """Steps so far, with those still to be committed."""
        return int(counter) + sum(pending is counter for pending in self._counters)

    def commit(self) -> None:
        """Count now."""
        for counter in self._counters:
            counter.add_(1)
        self._counters.clear()


def norm_spec(norm: nn.BatchNorm2d, counts: StepCounts) -> NormSpec:
    """What `norm` would do if it were called now, as in `nn.BatchNorm2d.forward`."""
    mean, var = norm.running_mean, norm.running_var
    momentum = None
    if norm.training and norm.track_running_stats:
        momentum = 0.0 if norm.momentum is None else norm.momentum
        if norm.num_batches_tracked is not None:
            counts.add(norm.num_batches_tracked)
            if norm.momentum is None:
                momentum = 1.0 / counts.including_this_step(norm.num_batches_tracked)
        if mean is None:
            momentum = None
    return NormSpec(
        weight=norm.weight,
        bias=norm.bias,
        running_mean=mean,
        running_var=var,
        eps=norm.eps,
        batch_statistics=norm.training or mean is None,
        momentum=momentum,
    )
