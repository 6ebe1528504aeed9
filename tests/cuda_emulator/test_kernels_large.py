"""Rows so far apart that offsets do not fit 32 bits: sparse memory, of which little is touched."""

from __future__ import annotations

import math
import mmap

import pytest
import torch
from emulation import Emulator
from kernel_calls import KINDS, Calls, Kind, Maker
from kernel_cases import (
    avgpool_backward,
    avgpool_forward,
    channel_statistics,
    conv1x1_backward,
    conv3x3_backward,
    dropout,
    finish_gradient,
    forward,
    maxpool_backward,
    maxpool_forward,
    transition_backward,
)
from torch import Tensor

_MAP_NORESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # named since Python 3.13


class FarRows(Maker):
    """Every image spans more than 2**31 elements."""

    def rows(self, pixels: tuple[int, ...], channels: int, values: Tensor | None = None) -> Tensor:
        count = math.prod(pixels)
        size = torch.empty((), dtype=self.dtype).element_size()
        pitch = ((5 << 29) // max(count - 1, 1) + 8) // 8 * 8
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        try:
            memory = mmap.mmap(-1, (count - 1) * pitch * size + channels * size, flags=flags)
        except OSError:
            pytest.skip("needs address space for large sparse buffers")
        buffer = torch.frombuffer(memory, dtype=self.dtype)
        strides = [math.prod(pixels[axis:]) * pitch for axis in range(1, len(pixels) + 1)]
        rows = buffer.as_strided((*pixels, channels), (*strides, 1))
        return rows.copy_(self.randn(*pixels, channels) if values is None else values)


PIXELS = (2, 5, 4)
VOLUMES = (2, 3, 2, 4)
CALLS: dict[str, Calls] = {
    "conv1x1_forward": forward("conv1x1_forward", PIXELS, 9, 16),
    "conv1x1_backward": conv1x1_backward(PIXELS, 9, 16),
    "conv3x3_forward": forward("conv3x3_forward", PIXELS, 16, 4),
    "conv3x3_backward": conv3x3_backward(PIXELS, 16, 4),
    "transition_forward": forward("transition_forward", PIXELS, 9, 4),
    "transition_backward": transition_backward(PIXELS, 9, 4),
    "channel_statistics": channel_statistics(PIXELS, 9),
    "finish_gradient": finish_gradient(PIXELS, 9),
    "dropout_": dropout(PIXELS, 9, 0.5),
    "avgpool_forward": avgpool_forward(PIXELS, 9),
    "avgpool_backward": avgpool_backward(PIXELS, 9),
    "maxpool_forward": maxpool_forward(PIXELS, 9),
    "maxpool_backward": maxpool_backward(PIXELS, 9),
    "conv3x3_forward, volumes": forward("conv3x3_forward", VOLUMES, 16, 4),
    "conv3x3_backward, volumes": conv3x3_backward(VOLUMES, 16, 4),
    "transition_forward, volumes": forward("transition_forward", VOLUMES, 9, 4),
    "transition_backward, volumes": transition_backward(VOLUMES, 9, 4),
    "maxpool_forward, volumes": maxpool_forward(VOLUMES, 9),
    "maxpool_backward, volumes": maxpool_backward(VOLUMES, 9),
}


def check_far_rows(emulator: Emulator, kind: Kind, make: Calls) -> None:
    """The same results as of rows side by side, to the bit."""
    emulator.ops.allow_tf32 = kind.tf32
    expected = make(Maker(kind, layout="dense")).run(emulator.ops)
    for name, result in make(FarRows(kind)).run(emulator.ops).items():
        assert torch.equal(result, expected[name]), name


@pytest.mark.parametrize("name", CALLS)
def test_offsets_beyond_32_bits(emulator: Emulator, name: str) -> None:
    check_far_rows(emulator, KINDS[0], CALLS[name])
