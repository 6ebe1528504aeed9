"""What fused modules do where a graph is recorded: torch.compile, torch.export, torch.jit, fx."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, fx, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from densenet_fast import synchronized


class Runnable(Protocol):
    """A module whose forward may leave a graph."""

    def run(self, input: Tensor, /) -> Tensor:
        """The forward, outside any graph."""

    def modules(self) -> Iterator[nn.Module]:
        """The module and all below it."""


def traced(input: Any) -> bool:
    """Whether a graph is being recorded, in which shapes may stand for any shape."""
    return torch.compiler.is_exporting() or isinstance(input, fx.Proxy) or is_tracing()


def leaves_graph(module: Runnable) -> bool:
    """Whether torch.compile must run the module between two graphs.

    A fused node is one operator of a graph, which has no room for exchanges between ranks.
    """
    return torch.compiler.is_compiling() and synchronized.exchanges(module.modules())


# torch.compiler.disable would import Dynamo with the package; this waits for the first call.
@torch._disable_dynamo  # type: ignore[attr-defined]
def outside_graph(module: Runnable, input: Tensor) -> Tensor:
    """The module's forward between two graphs of torch.compile."""
    return module.run(input)


def routed(module: Runnable, input: Tensor, plain: Callable[[Tensor], Tensor]) -> Tensor:
    """The forward of a fused module: `plain` into a graph that records it, else its `run`."""
    if traced(input):
        return plain(input)
    if leaves_graph(module):
        return outside_graph(module, input)
    return module.run(input)
