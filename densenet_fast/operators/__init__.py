"""The operators as the rest of the package calls them, on the backend of their first tensor.

Their definitions are in `densenet_fast.operators.reference` and `reference_block`. All operators
write into tensors of their caller, and are not differentiable by themselves. The compiled ones
check every argument before they write anything; nodes have checked what users have passed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Generic, ParamSpec

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from densenet_fast.operators import extension, reference, reference_block, reference_stem
from densenet_fast.operators.backends import select
from densenet_fast.operators.cuda_device import allow_tf32, run_on_cuda

Arguments = ParamSpec("Arguments")


def _fake(*arguments: Any) -> None:
    """Operators only write into their arguments: there are no outputs to describe."""
    devices = {leaf.device for leaf in tree_leaves(arguments) if isinstance(leaf, Tensor)}
    if len(devices) > 1:
        raise ValueError(f"all tensors should be on one device, got {devices}")


class Operator(Generic[Arguments]):
    """The operator that `twin` defines, on the backend of its first argument."""

    def __init__(self, twin: Callable[Arguments, None]) -> None:
        """Find the compiled operator, if there is one."""
        self._twin = twin
        self._multiplies = False
        if extension.LOADED:
            name = twin.__name__
            self._kernel = getattr(torch.ops.densenet_fast, name).default
            self._multiplies = self._kernel._schema.arguments[-1].name == "allow_tf32"
            torch.library.register_fake(f"densenet_fast::{name}", _fake)

    def __call__(self, *args: Arguments.args, **kwargs: Arguments.kwargs) -> None:
        """Run it."""
        first: Any = args[0]
        backend = select(first)
        if backend == "reference":
            self._twin(*args, **kwargs)
        elif backend == "cuda":
            if self._multiplies and first.dtype == torch.float32:
                kwargs["allow_tf32"] = allow_tf32()
            run_on_cuda(self._kernel, args, kwargs)
        else:
            self._kernel(*args, **kwargs)


dense_block_forward_ = Operator(reference_block.dense_block_forward_)
dense_block_backward_ = Operator(reference_block.dense_block_backward_)
_update_running_statistics_ = Operator(reference_block.update_running_statistics_)

channel_statistics = Operator(reference.channel_statistics)
norm_coefficients = Operator(reference.norm_coefficients)
conv1x1_forward = Operator(reference.conv1x1_forward)
conv1x1_backward = Operator(reference.conv1x1_backward)
conv3x3_forward = Operator(reference.conv3x3_forward)
conv3x3_backward = Operator(reference.conv3x3_backward)
dropout_ = Operator(reference.dropout_)
finish_gradient = Operator(reference.finish_gradient)
transition_forward = Operator(reference.transition_forward)
transition_backward = Operator(reference.transition_backward)
norm_relu_avgpool_forward = Operator(reference.norm_relu_avgpool_forward)
norm_relu_avgpool_backward = Operator(reference.norm_relu_avgpool_backward)
norm_relu_maxpool_forward = Operator(reference.norm_relu_maxpool_forward)
norm_relu_maxpool_backward = Operator(reference.norm_relu_maxpool_backward)
stem_convolution_forward = Operator(reference_stem.stem_convolution_forward)
stem_convolution_backward = Operator(reference_stem.stem_convolution_backward)


def update_running_statistics_(
    statistics: Tensor,
    running: Sequence[Tensor],
    counters: Sequence[Tensor],
    places: Sequence[int],
    momenta: Sequence[float],
    count: int,
) -> None:
    """Move the running statistics of norms towards those of a step, and count it."""
    dtype = statistics.dtype
    # Buffers of other types or layouts are written where they are.
    plain = all(buffer.dtype == dtype and buffer.is_contiguous() for buffer in running)
    update = _update_running_statistics_ if plain else reference_block.update_running_statistics_
    update(statistics, running, counters, places, momenta, count)
