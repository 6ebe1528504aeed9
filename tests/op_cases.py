"""What the operator tests share: arguments of any shape, pitch and type, and fair tolerances."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from devices import device
from torch import Tensor

from densenet_fast.operators.backends import get_backend
from densenet_fast.operators.rows import statistics_dtype

WIDE = (torch.float32, torch.float64)
CPU_TYPES = (torch.bfloat16, *WIDE)  # those of the CPU kernels

# Images [N, H, W], [N, W] and [N, D, H, W]: single pixels, lines, and sizes that fit no tile.
PIXELS = (
    *((1, 1, 1), (1, 1, 7), (2, 13, 1), (1, 33, 2), (3, 7, 7), (2, 13, 33)),
    *((1, 1), (3, 70), (1, 1, 1, 1), (2, 1, 6, 5), (1, 4, 3, 9), (2, 3, 5, 1), (1, 3, 8, 6)),
)

_GUARD = 777.0  # around every slice: nobody may write there


@dataclass
class Norm:
    """A norm as the operators read it."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    rstd: Tensor

    def exact(self) -> Norm:
        return Norm(*(t.double() for t in (self.scale, self.shift, self.mean, self.rstd)))

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.scale, self.shift, self.mean, self.rstd))


class Case:
    """Makes arguments of one type from one seed; slices of wider buffers unless `dense`."""

    def __init__(self, dtype: torch.dtype, seed: int = 0, *, dense: bool = False) -> None:
        self.dtype = dtype
        self.statistics = statistics_dtype(dtype)
        self.dense = dense
        self.generator = torch.Generator().manual_seed(seed)
        self._guarded: list[tuple[Tensor, int, int]] = []

    def randn(self, *shape: int) -> Tensor:
        """The same numbers on every device."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(device())

    def rows(self, pixels: tuple[int, ...], channels: int, values: Tensor | None = None) -> Tensor:
        """[*pixels, channels]: a slice, between guards, of a wider buffer."""
        before, after = (0, 0) if self.dense else (3, 2)
        shape = (*pixels, before + channels + after)
        buffer = torch.full(shape, _GUARD, dtype=self.dtype, device=device())
        rows = buffer[..., before : before + channels]
        rows.copy_(self.randn(*pixels, channels) if values is None else values)
        self._guarded.append((buffer, before, before + channels))
        return rows

    def vector(self, channels: int) -> Tensor:
        return self.randn(channels).to(self.statistics)

    def norm(self, channels: int) -> Norm:
        scale = (self.randn(channels).abs() + 0.5) * torch.sign(self.randn(channels))
        rstd = self.randn(channels).abs() + 0.5
        vectors = (scale, self.randn(channels), self.randn(channels), rstd)
        return Norm(*(vector.to(self.statistics) for vector in vectors))

    def input(self, pixels: tuple[int, ...], norm: Norm) -> Tensor:
        """Rows whose normalised values keep away from 0, so that rounding flips no ReLU."""
        exact = norm.exact()
        values = self.randn(*pixels, len(norm.scale))
        values += 0.02 * torch.sign(values)
        return self.rows(pixels, len(norm.scale), (values - exact.shift) / exact.scale)

    def weight(self, *shape: int) -> Tensor:
        fan_in = 1
        for size in shape[1:]:
            fan_in *= size
        return (self.randn(*shape) / fan_in**0.5).to(self.dtype)

    def assert_guards(self) -> None:
        """Nobody has written outside the slices."""
        for buffer, start, end in self._guarded:
            assert (buffer[..., :start] == _GUARD).all()
            assert (buffer[..., end:] == _GUARD).all()


def nchw(rows: Tensor) -> Tensor:
    return rows.movedim(-1, 1)


def nhwc(images: Tensor) -> Tensor:
    return images.movedim(1, -1)


def activation(rows: Tensor, norm: Norm) -> Tensor:
    """relu(scale * x + shift) in float64."""
    exact = norm.exact()
    return torch.relu(exact.scale * rows.double() + exact.shift)


def norm_sums(grad_norm: Tensor, rows: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """grad_gamma and grad_beta in float64."""
    exact = norm.exact()
    standardised = (rows.double() - exact.mean) * exact.rstd
    return pixel_sum(grad_norm * standardised), pixel_sum(grad_norm)


def pixel_sum(rows: Tensor) -> Tensor:
    """Sums over all pixels of all images."""
    return rows.flatten(0, -2).sum(0)


def assert_close(
    name: str,
    actual: Tensor,
    exact: Tensor,
    dtype: torch.dtype,
    length: int,
    *,
    magnitude: Any = None,
) -> None:
    """`actual` is a sum of `length` random products, computed in `dtype`.

    Rounding errors of such a sum, added one after the other, walk to about eps * sqrt(length) times
    its typical size; `magnitude` is that size where the exact result may cancel.
    """
    assert actual.shape == exact.shape
    size = exact.detach().abs().max() if magnitude is None else magnitude
    bound = 8 * torch.finfo(dtype).eps * (length**0.5 + 2) * float(size) + 1e-30
    error = (actual.double() - exact.detach()).abs()
    worst = float(error.max())
    if not worst <= bound:
        where = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
        pytest.fail(
            f"{name} is off by {worst:.3g} at {where}, more than {bound:.3g}: expected "
            f"{float(exact[where]):.9g}, got {float(actual[where]):.9g}"
        )


def assert_repeated(actual: Tensor, before: Tensor) -> None:
    """The same numbers again: to the bit, but for plain PyTorch, where alignment counts."""
    if get_backend() == "reference":
        size = float(before.abs().max())
        torch.testing.assert_close(actual, before, rtol=0, atol=2e-2 * size * _coarse(actual))
    else:
        assert torch.equal(actual, before)


def _coarse(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps ** 0.5
