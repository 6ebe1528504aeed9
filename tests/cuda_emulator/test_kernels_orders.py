"""Results do not depend on the order of threads and blocks, nor on the device but for splits."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from emulation import DEVICES, SM_75, TURING, Device, Emulator, emulate
from kernel_calls import KINDS, STORED, Calls, Kind, Maker
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
from kernel_checks import check
from torch import Tensor
from vector_cases import (
    norm_coefficients,
    norm_grad_coefficients,
    statistics_and_norm,
    sums_and_backward,
    update_running_statistics,
)

# Several tiles, steps, columns of blocks and splits of the rows, with tails.
PRODUCTS: dict[str, Calls] = {
    "conv1x1_forward": forward("conv1x1_forward", (2, 9, 17), 100, 136),
    "conv1x1_forward, again": forward("conv1x1_forward", (2, 9, 17), 100, 136, statistics=False),
    "conv1x1_forward, split": forward("conv1x1_forward", (1, 9, 17), 264, 24),
    "conv1x1_backward": conv1x1_backward((2, 16, 17), 136, 72),
    "conv3x3_forward": forward("conv3x3_forward", (2, 9, 17), 72, 33),
    "conv3x3_forward, narrow": forward("conv3x3_forward", (2, 9, 17), 40, 12),
    "conv3x3_backward": conv3x3_backward((2, 9, 17), 40, 72),
    "transition_forward": forward("transition_forward", (3, 16, 14), 72, 70),
    "transition_backward": transition_backward((3, 16, 14), 72, 36),
    # Volumes have tiles of two images, of which the last is one; sequences tiles of all columns.
    "conv3x3_forward, volumes": forward("conv3x3_forward", (3, 3, 5, 6), 40, 12),
    "conv3x3_backward, volumes": conv3x3_backward((3, 3, 5, 6), 24, 40),
    "conv3x3_forward, sequences": forward("conv3x3_forward", (3, 150), 72, 12),
    "conv3x3_forward, wide sequences": forward("conv3x3_forward", (3, 150), 40, 72),
    "conv3x3_backward, sequences": conv3x3_backward((3, 150), 24, 40),
    "transition_forward, volumes": forward("transition_forward", (2, 5, 6, 7), 40, 36),
    "transition_backward, volumes": transition_backward((2, 5, 6, 7), 72, 36),
    "transition_backward, sequences": transition_backward((3, 75), 72, 36),
    "transition_forward, linear": forward("transition_forward", (2, 5, 6, 7), 40, 36, linear=True),
    "transition_backward, linear": transition_backward((3, 16, 14), 72, 36, linear=True),
}
OTHERS: dict[str, Calls] = {
    "channel_statistics": channel_statistics((2, 17, 16), 40),
    "finish_gradient": finish_gradient((2, 9, 5), 17),
    "dropout_": dropout((2, 9, 5), 17, 0.5),
    "avgpool_forward": avgpool_forward((3, 9, 5), 90),
    "avgpool_backward": avgpool_backward((3, 9, 5), 90),
    "maxpool_forward": maxpool_forward((2, 9, 6), 17),
    "maxpool_backward": maxpool_backward((2, 17, 9), 40),
    "maxpool_forward, volumes": maxpool_forward((2, 3, 5, 6), 17),
    "maxpool_backward, volumes": maxpool_backward((2, 5, 6, 7), 40),
    "norm_coefficients": norm_coefficients(300),
    "update_running_statistics_": update_running_statistics(300, 17, 300),
}
# Steps of the block operators that are no operators themselves.
STEPS: dict[str, Calls] = {
    "norm_grad_coefficients": norm_grad_coefficients(300),
    "statistics_and_norm": statistics_and_norm((2, 17, 16), 70, 40),
    "sums_and_backward": sums_and_backward((3, 9, 5), 90),
}
CASES = [(name, kind) for name in PRODUCTS for kind in KINDS]
CASES += [(name, kind) for name in (*OTHERS, *STEPS) for kind in STORED]
SCHEDULES = (("reverse", 0), ("random", 1), ("random", 2), ("random", 3))


def results(emulator: Emulator, kind: Kind, make: Calls) -> dict[str, Tensor]:
    emulator.ops.allow_tf32 = kind.tf32
    return make(Maker(kind)).run(emulator.ops)


@cache
def usual_results(emulator: Emulator, kind: Kind, make: Calls) -> dict[str, Tensor]:
    """Under the usual schedule, on the usual device."""
    emulator.schedule()
    return results(emulator, kind, make)


def assert_same_bits(actual: dict[str, Tensor], expected: dict[str, Tensor], what: str) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), f"{name} differs: {what}"


@pytest.mark.parametrize(("name", "kind"), CASES, ids=str)
def test_same_bits_in_every_order(emulator: Emulator, name: str, kind: Kind) -> None:
    make = {**PRODUCTS, **OTHERS, **STEPS}[name]
    expected = usual_results(emulator, kind, make)
    for order, seed in SCHEDULES:
        emulator.schedule(order, seed)
        assert_same_bits(results(emulator, kind, make), expected, f"{order}, seed {seed}")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_every_device(emulator: Emulator, device: str, kind: Kind) -> None:
    """Tiles and stages fit the device's shared memory; splits follow its multiprocessors.

    Only weight gradients may depend on them: they are split over the whole device.
    """
    for make in PRODUCTS.values():
        expected = usual_results(emulator, kind, make)
        with emulator.on(DEVICES[device]):
            actual = check(emulator.ops, kind, make)
        expected = {name: value for name, value in expected.items() if name != "grad_weight"}
        assert_same_bits(actual, expected, device)


def test_launches_of_every_operator(emulator: Emulator) -> None:
    """How many kernels each operator starts."""
    pixels, channels, width, growth = (2, 5, 7), 24, 16, 4
    maker = Maker(KINDS[0])
    expected = {
        # packed weights, product, statistics
        forward("conv1x1_forward", pixels, channels, width): 3,
        forward("conv3x3_forward", pixels, width, growth): 3,
        forward("conv1x1_forward", pixels, channels, width, statistics=False): 2,
        forward("conv3x3_forward", pixels, width, growth, statistics=False): 2,
        forward("transition_forward", (2, 6, 8), channels, width, statistics=False): 2,
        # packed weights, product, sums; product, splits
        conv3x3_backward(pixels, width, growth): 5,
        conv1x1_backward(pixels, channels, width): 5,
        transition_backward((2, 6, 8), channels, width): 5,
        transition_backward(pixels, channels, width): 6,  # rows that pooling cuts off
        norm_coefficients(channels): 1,
        norm_grad_coefficients(channels): 1,
        statistics_and_norm(pixels, channels, growth): 2,
        sums_and_backward(pixels, channels): 2,
        update_running_statistics(channels, width, channels): 2,  # norms; counters
        update_running_statistics(*[channels] * 49, counters=48): 4,
        finish_gradient(pixels, growth): 1,
        channel_statistics(pixels, channels): 2,
        avgpool_forward(pixels, channels): 1,
        avgpool_backward(pixels, channels): 2,
        maxpool_forward(pixels, channels): 1,
        maxpool_backward(pixels, channels): 3,
        # Sequences and volumes the same, but for volumes that are pooled first.
        forward("conv3x3_forward", (2, 33), width, growth): 3,
        forward("conv3x3_forward", (2, 3, 4, 5), width, growth): 4,  # and splits
        conv3x3_backward((2, 33), width, growth): 5,
        conv3x3_backward((2, 3, 4, 5), width, growth): 5,
        forward("transition_forward", (2, 34), channels, width): 3,
        forward("transition_forward", (2, 4, 4, 6), channels, width): 4,
        transition_backward((2, 34), channels, width): 5,
        transition_backward((2, 4, 4, 6), channels, width): 6,
        maxpool_forward((2, 3, 4, 5), channels): 1,
    }
    for make, launches in expected.items():
        call = make(maker)
        assert emulator.launches(lambda call=call: call.run(emulator.ops)) == launches, call.op


def test_shared_memory_that_no_device_has(emulator: Emulator) -> None:
    call = PRODUCTS["conv3x3_backward"](Maker(KINDS[0]))
    tiny = Device(7, 5, 16 << 10, 16 << 10, 4)
    with (
        emulator.on(tiny),
        pytest.raises(RuntimeError, match=r"kernel conv3x3_.*bytes of shared memory"),
    ):
        call.run(emulator.ops)


@pytest.mark.slow
def test_sm_75() -> None:
    """Tensor cores of half the depth for float16; plain arithmetic for bfloat16 and tf32."""
    turing = emulate(defines=[TURING])
    turing.use(SM_75)
    for kind in KINDS:
        for make in PRODUCTS.values():
            check(turing.ops, kind, make)
    # Sources of two raw pieces, of which two stages do not fit.
    with turing.on(Device(7, 5, 40 << 10, 40 << 10, 4)):
        check(turing.ops, KINDS[0], conv1x1_backward((2, 16, 17), 136, 72, wanted="data"))
