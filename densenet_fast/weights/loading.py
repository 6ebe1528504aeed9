"""State dicts are loaded entirely or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def unchanged_after_errors(module: nn.Module) -> Iterator[None]:
    """Puts all parameters and buffers back if the `with` block raises.

    `nn.Module.load_state_dict` copies what fits before it complains about the rest: a network
    would be left with half of another one's parameters.
    """
    registered = [(part, {**part._parameters}, {**part._buffers}) for part in module.modules()]
    values: dict[Tensor, Tensor] = {}
    for _, parameters, buffers in registered:
        for tensor in (*parameters.values(), *buffers.values()):
            if tensor is not None and not nn.parameter.is_lazy(tensor):
                values[tensor] = tensor.detach().clone()
    try:
        yield
    except BaseException:
        # Loading with assign=True replaces the tensors, otherwise their values change.
        for part, parameters, buffers in registered:
            part._parameters.update(parameters)
            part._buffers.update(buffers)
        with torch.no_grad():
            for tensor, value in values.items():
                tensor.copy_(value)
        raise
