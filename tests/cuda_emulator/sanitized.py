"""All kernels on small, odd shapes, for libraries built with sanitizers.

A process of its own, as the sanitizers' runtime must be there before Python's memory. Without a
report the last line says how many operators passed; the one before a report names what ran.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from emulation import DEVICES, Emulator
from kernel_calls import HALVES, KINDS, STORED, Calls, Kind, Maker, Pixels
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
from vector_cases import (
    norm_coefficients,
    norm_grad_coefficients,
    statistics_and_norm,
    sums_and_backward,
    update_running_statistics,
)

# Dense rows end where their memory ends; the others have an odd pitch.
LAYOUTS = ("dense", "elements", "words", "pieces")
ORDERS = (("forward", 0), ("reverse", 0), ("random", 1))
# Pixels, channels, bottleneck, growth: tails of every tile in every dimension.
SHAPES: tuple[tuple[Pixels, int, int, int], ...] = (
    ((1, 1, 1), 1, 4, 1),
    ((1, 1, 7), 17, 48, 20),
    ((2, 5, 3), 40, 33, 12),
    ((1, 9, 15), 67, 66, 33),
    ((1, 2, 3), 5, 12, 66),
    ((2, 13), 17, 48, 20),
    ((1, 150), 9, 12, 66),
    ((1, 1, 1, 1), 1, 4, 1),
    ((3, 2, 5, 3), 40, 33, 12),
    ((1, 3, 9, 15), 12, 20, 40),
)
OTHERS: tuple[tuple[Pixels, int], ...] = (
    ((1, 1, 1), 1),
    ((2, 5, 3), 33),
    ((1, 17, 16), 7),
    ((2, 9), 33),
    ((2, 3, 2, 5), 9),
)


def products(pixels: Pixels, channels: int, width: int, growth: int) -> Iterator[Calls]:
    """Every operator with a product on one shape."""
    yield forward("conv1x1_forward", pixels, channels, width)
    yield conv1x1_backward(pixels, channels, width)
    yield forward("conv3x3_forward", pixels, width, growth)
    yield conv3x3_backward(pixels, width, growth)
    even = (pixels[0], *(max(size, 2) for size in pixels[1:]))
    yield forward("transition_forward", even, channels, growth)
    yield transition_backward(even, channels, growth)


def others(pixels: Pixels, channels: int) -> Iterator[Calls]:
    """Every operator without one."""
    yield channel_statistics(pixels, channels)
    yield finish_gradient(pixels, channels)
    yield dropout(pixels, channels, 0.5)
    yield avgpool_forward(pixels, channels)
    yield avgpool_backward(pixels, channels)
    yield maxpool_forward(pixels, channels)
    yield maxpool_backward(pixels, channels)
    yield maxpool_backward(pixels, channels, batch_statistics=False)
    yield norm_coefficients(channels)
    yield norm_coefficients(channels, affine=False)
    yield norm_grad_coefficients(channels)
    yield statistics_and_norm(pixels, 3, channels)
    yield sums_and_backward(pixels, channels)
    yield update_running_statistics(channels, 1, channels)


def run(emulator: Emulator) -> set[str]:
    """Everything; schedules and layouts follow each other. Returns the operators that ran."""
    ran: set[str] = set()

    def one(kind: Kind, make: Calls, number: int, what: object) -> None:
        order, layout = ORDERS[number % len(ORDERS)], LAYOUTS[number % len(LAYOUTS)]
        emulator.schedule(*order)
        emulator.ops.allow_tf32 = kind.tf32
        call = make(Maker(kind, number, layout))
        print(call.op, kind, what, layout, *order, flush=True)
        ran.add(call.op)
        for name, result in call.run(emulator.ops).items():
            assert result.isfinite().all(), f"{call.op}: {name} is not written"
        call.maker.assert_guards()

    for kind in STORED:
        for pixels, channels in OTHERS:
            for number in range(2):
                for make in others(pixels, channels):
                    one(kind, make, number, (pixels, channels))
    for kind in KINDS:
        # Layouts and orders differ from shape to shape and from kind to kind.
        for number, shape in enumerate(SHAPES, KINDS.index(kind)):
            for make in products(*shape):
                one(kind, make, number, shape)
        with emulator.on(DEVICES["64 KB"]):  # one stage where there are two otherwise
            for shape in (SHAPES[2], SHAPES[8]):
                for make in products(*shape):
                    one(kind, make, 1, "64 KB")
    for kind in HALVES:
        for make in (
            forward("conv1x1_forward", (1, 3, 5), 13, 20, wide_weight=True, statistics=False),
            conv1x1_backward((1, 3, 5), 13, 20, wide_weight=True),
            conv3x3_backward((1, 3, 5), 13, 5, wide_weight=True),
        ):
            one(kind, make, 0, "float32 weights")
    return ran


def main(library: str) -> None:
    """Run everything with one library."""
    torch.set_num_threads(1)
    ran = run(Emulator(Path(library)))
    print(f"{len(ran)} operators passed")
