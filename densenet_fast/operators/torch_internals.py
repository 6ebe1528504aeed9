"""The private interfaces of PyTorch that this package relies on.

`tests/operators/test_torch_internals.py` says which of them a new PyTorch has no longer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._prims_common import suggest_memory_format as suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._utils import IMPORT_MAPPING as IMPORT_MAPPING
from torch._utils import NAME_MAPPING as NAME_MAPPING
from torch._weights_only_unpickler import _get_allowed_globals as allowed_globals
from torch.nn.modules import module as _module

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

__all__ = [
    "IMPORT_MAPPING",
    "NAME_MAPPING",
    "FakeTensor",
    "allowed_globals",
    "suggest_memory_format",
]
_functorch: Any = torch._C._functorch

# The attribute of a parameter with what is called when its gradient is there, and may free it.
GRADIENT_HOOKS = "_post_accumulate_grad_hooks"
BatchNorm: type[nn.Module] = nn.modules.batchnorm._BatchNorm
InstanceNorm: type[nn.Module] = nn.modules.instancenorm._InstanceNorm


def conv_forward(
    module: nn.Conv1d | nn.Conv2d | nn.Conv3d, input: Tensor, weight: Tensor, bias: Tensor | None
) -> Tensor:
    """The module's convolution with another weight and bias, padded as it pads."""
    return module._conv_forward(input, weight, bias)


def process_group(name: str) -> ProcessGroup:
    """The process group of this name; only where there are any."""
    from torch.distributed import distributed_c10d

    resolve: Any = distributed_c10d.__dict__["_resolve_process_group"]
    group: ProcessGroup = resolve(name)
    return group


def altered() -> str | None:
    """What makes the call of any module, or any tensor, more than it says; None if nothing does."""
    if (
        _module._global_forward_hooks
        or _module._global_forward_pre_hooks
        or _module._global_backward_hooks
        or _module._global_backward_pre_hooks
    ):
        return "hooks on all modules are registered"
    # Not `is not None`, to which torch.compile has no answer.
    if isinstance(_functorch.peek_interpreter_stack(), _functorch.CInterpreter):
        return "a torch.func transform is active"
    if torch.autograd.forward_ad._current_level >= 0:
        return "forward-mode differentiation is active"
    return None
