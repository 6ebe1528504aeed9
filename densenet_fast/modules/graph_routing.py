"""What fused modules do where a graph is recorded: torch.compile, torch.export, torch.jit, fx."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx
from torch.jit import is_tracing  # type: ignore[attr-defined]


class Runnable(Protocol):
    """A module with a fused forward."""

    def run(self, input: Tensor, /) -> Tensor:
        """The fused forward."""


def traced(input: Any) -> bool:
    """Whether a graph is being recorded, in which shapes may stand for any shape."""
    return torch.compiler.is_exporting() or isinstance(input, fx.Proxy) or is_tracing()


def routed(module: Runnable, input: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of a fused module: `plain` into a graph that records it, else its `run`."""
    return plain(input) if traced(input) else module.run(input)
