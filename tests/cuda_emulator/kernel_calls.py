"""Arguments of the operators in any type and memory layout, and what a call of one is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import cycle
from typing import Any

import torch
from devices import device
from op_cases import Case, Norm
from torch import Tensor

Pixels = tuple[int, ...]  # images, then their one to three sizes


@dataclass(frozen=True)
class Kind:
    """How a kernel computes: the type it stores, and whether products are tf32."""

    name: str
    dtype: torch.dtype
    tf32: bool = False

    @property
    def eps(self) -> float:
        """The coarsest rounding of a stored value or a factor of a product."""
        return 2.0**-10 if self.tf32 else torch.finfo(self.dtype).eps

    def __str__(self) -> str:
        return self.name


KINDS = (
    Kind("float16", torch.float16),
    Kind("bfloat16", torch.bfloat16),
    Kind("float32", torch.float32),
    Kind("tf32", torch.float32, tf32=True),
    Kind("float64", torch.float64),
)
HALVES = KINDS[:2]
STORED = tuple(kind for kind in KINDS if not kind.tf32)  # for operators without products

# Where a slice of channels starts and how far apart its rows are, in bytes: `before` it, and a
# pitch that is a multiple of `unit` but of no larger power of two. None: dense.
LAYOUTS: dict[str, tuple[int, int] | None] = {
    "dense": None,
    "pieces": (48, 16),
    "words": (20, 4),
    "elements": (2, 2),
}
LAYOUTS_MIXED = (*LAYOUTS, "mixed")


class Maker(Case):
    """Arguments in a layout; what an operator writes starts as NaN, between guards."""

    def __init__(self, kind: Kind, seed: int = 0, layout: str = "mixed") -> None:
        """Everything follows from the seed."""
        super().__init__(kind.dtype, seed)
        self.channels_last = layout != "dense"  # gradients of weights
        mixed = [name for name in LAYOUTS if name != "dense"]
        self.layouts = cycle(mixed if layout == "mixed" else [layout])

    def rows(self, pixels: tuple[int, ...], channels: int, values: Tensor | None = None) -> Tensor:
        size = torch.empty((), dtype=self.dtype).element_size()
        layout = LAYOUTS[next(self.layouts)]
        self.dense = layout is None
        before, pitch = 0, channels
        if layout is not None:
            unit = max(layout[1] // size, 1)
            before = max(layout[0] // size, 1)
            units = -(-(before + channels + 1) // unit)
            pitch = (units + 1 - units % 2) * unit
        return self.slice_of(pixels, channels, before, pitch, values)

    def slice_of(
        self,
        pixels: tuple[int, ...],
        channels: int,
        before: int,
        pitch: int,
        values: Tensor | None,
    ) -> Tensor:
        """Channels `before` and on of a buffer `pitch` wide; all the rest is guarded."""
        buffer = torch.full((*pixels, pitch), 777.0, dtype=self.dtype, device=device())
        rows = buffer[..., before : before + channels]
        rows.copy_(self.randn(*pixels, channels) if values is None else values)
        self._guarded.append((buffer, before, before + channels))
        return rows

    def result(self, pixels: tuple[int, ...], channels: int) -> Tensor:
        return self.rows(pixels, channels, torch.tensor(torch.nan))

    def results(self, channels: int, *names: str) -> dict[str, Tensor]:
        return {n: self.gradient(channels, dtype=self.statistics) for n in names}

    def gradient(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, torch.nan, dtype=dtype or self.dtype, device=device())

    def vectors(self, channels: int, *names: str) -> dict[str, Tensor]:
        return {name: self.vector(channels) for name in names}


def named(norm: Norm) -> dict[str, Tensor]:
    return dict(zip(("scale", "shift", "mean", "rstd"), norm, strict=True))


def act(norm: Norm) -> dict[str, Tensor]:
    return {"scale": norm.scale, "shift": norm.shift}


@dataclass
class Call:
    """An operator, its arguments by name, and the results it writes with their sums' lengths."""

    op: str
    maker: Maker
    arguments: dict[str, Any]
    lengths: dict[str, int]
    stored: dict[str, str] = field(default_factory=dict)  # statistics → the result they are of

    def results(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name in self.lengths:
            value = self.arguments[name]
            if isinstance(value, list):
                found |= {f"{name} {index}": tensor for index, tensor in enumerate(value)}
            elif value is not None:
                found[name] = value
        return found

    def run(self, ops: Any) -> dict[str, Tensor]:
        """Run it with `ops`; the results by name."""
        getattr(ops, self.op)(*self.arguments.values())
        return self.results()


Calls = Callable[[Maker], Call]


def taps(pixels: Pixels) -> tuple[int, ...]:
    """The kernel of a convolution with three taps in each dimension."""
    return (3,) * len(pixels[1:])


def averaged(pixels: Pixels) -> Pixels:
    """Pixels behind a transition."""
    return (pixels[0], *(size // 2 for size in pixels[1:]))


def maxima(pixels: Pixels) -> Pixels:
    """Pixels behind the stem's pooling."""
    return (pixels[0], *((size + 1) // 2 for size in pixels[1:]))
