"""The kernels with products, of every type and layout, against the reference."""

from __future__ import annotations

import pytest
import torch
from emulation import Emulator
from kernel_calls import HALVES, KINDS, LAYOUTS_MIXED, Calls, Kind, Maker, Pixels
from kernel_cases import WANTED, conv1x1_backward, conv3x3_backward, forward, transition_backward
from kernel_checks import check

from densenet_fast.operators import reference

SMALL = ((2, 5, 7), 24, 16)
SMALL_VOLUMES = ((2, 3, 4, 5), 24, 16)
SMALL_SEQUENCES = ((2, 33), 24, 16)
# Pixels, channels read and written. Together: single pixels, lines, batches of one, tails of every
# tile in every dimension, several tiles, columns and splits, and growth rates 1, 12, 32 and 48.
SHAPES_1X1: tuple[tuple[Pixels, int, int], ...] = (
    ((1, 1, 1), 1, 4),
    ((1, 1, 7), 17, 12),
    ((2, 13, 1), 33, 128),
    ((1, 33, 2), 100, 48),
    ((3, 7, 7), 72, 136),
    ((2, 8, 16), 64, 128),
    ((2, 13, 33), 136, 20),
    ((1, 9, 29), 257, 64),
    ((2, 70), 24, 36),
    ((1, 3, 5, 7), 40, 24),
)
SHAPES_3X3: tuple[tuple[Pixels, int, int], ...] = (
    ((1, 1, 1), 4, 1),
    ((1, 1, 7), 48, 12),
    ((2, 13, 1), 20, 48),
    ((1, 4, 40), 65, 32),
    ((3, 7, 7), 128, 32),
    ((5, 8, 8), 12, 3),
    ((1, 33, 3), 33, 130),
    ((2, 13, 33), 16, 33),
    # Sequences: in every shape of tiles, with wide tiles and narrow ones, one step and several.
    ((1, 1), 4, 1),
    ((1, 200), 33, 12),
    ((3, 57), 72, 66),
    ((9, 30), 12, 33),
    ((40, 3), 20, 12),
    # Volumes: flat ones, of one slice, two and several, whose first and last tile is of two images.
    ((1, 1, 1, 1), 12, 3),
    ((2, 1, 5, 7), 48, 12),
    ((1, 2, 9, 3), 33, 66),
    ((3, 4, 7, 8), 72, 12),
    ((1, 5, 64, 3), 8, 3),
    ((2, 3, 2, 2), 130, 33),
)
SHAPES_TRANSITION: tuple[tuple[Pixels, int, int], ...] = (
    ((1, 2, 2), 3, 1),
    ((2, 7, 5), 33, 20),
    ((1, 3, 41), 100, 50),
    ((3, 14, 14), 72, 36),
    ((1, 24, 26), 136, 130),
    ((3, 71), 33, 20),
    ((1, 2, 2, 2), 3, 1),
    ((2, 5, 4, 7), 33, 20),
    ((2, 3, 9, 2), 72, 130),
)
Shape = tuple[Pixels, int, int]

kinds = pytest.mark.parametrize("kind", KINDS, ids=str)


def seed_of(shape: Shape) -> int:
    return sum(shape[0]) + 7 * shape[1] + shape[2]


def run(emulator: Emulator, kind: Kind, make: Calls, shape: Shape) -> None:
    """One call in a layout and an order of threads that follow from the shape."""
    seed = seed_of(shape)
    emulator.schedule(("reverse", "random")[seed % 2], seed)
    check(emulator.ops, kind, make, seed, LAYOUTS_MIXED[seed % len(LAYOUTS_MIXED)])


@kinds
@pytest.mark.parametrize("shape", SHAPES_1X1, ids=str)
def test_conv1x1(emulator: Emulator, kind: Kind, shape: Shape) -> None:
    run(emulator, kind, forward("conv1x1_forward", *shape), shape)
    run(emulator, kind, conv1x1_backward(*shape), shape)


@kinds
@pytest.mark.parametrize("shape", SHAPES_3X3, ids=str)
def test_conv3x3(emulator: Emulator, kind: Kind, shape: Shape) -> None:
    run(emulator, kind, forward("conv3x3_forward", *shape), shape)
    run(emulator, kind, conv3x3_backward(*shape), shape)


@kinds
@pytest.mark.parametrize("shape", [SMALL, SMALL_VOLUMES, SMALL_SEQUENCES], ids=str)
def test_conv3x3_of_features(emulator: Emulator, kind: Kind, shape: Shape) -> None:
    run(emulator, kind, conv3x3_backward(*shape, accumulate=True), shape)


@kinds
@pytest.mark.parametrize("shape", SHAPES_TRANSITION, ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["relu", "linear"])
def test_transition(emulator: Emulator, kind: Kind, shape: Shape, linear: bool) -> None:
    run(emulator, kind, forward("transition_forward", *shape, linear=linear), shape)
    run(emulator, kind, transition_backward(*shape, linear=linear), shape)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS_MIXED)
def test_every_layout(emulator: Emulator, kind: Kind, layout: str) -> None:
    """Rows that allow 16-byte pieces, 4-byte words, or single elements only."""
    for shape in (SMALL, SMALL_VOLUMES, SMALL_SEQUENCES):
        for make in (
            forward("conv1x1_forward", *shape),
            conv1x1_backward(*shape),
            forward("conv3x3_forward", *shape),
            conv3x3_backward(*shape),
            forward("transition_forward", *shape),
            transition_backward(*shape),
        ):
            check(emulator.ops, kind, make, layout=layout)


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_float32_weights_with_half_images(emulator: Emulator, kind: Kind) -> None:
    for make in (
        forward("conv1x1_forward", *SMALL, wide_weight=True),
        conv1x1_backward(*SMALL, wide_weight=True),
        forward("conv3x3_forward", *SMALL, wide_weight=True),
        conv3x3_backward(*SMALL, wide_weight=True),
        forward("transition_forward", *SMALL, wide_weight=True),
        transition_backward(*SMALL, wide_weight=True),
    ):
        check(emulator.ops, kind, make)


@kinds
def test_what_is_not_wanted_changes_nothing_else(emulator: Emulator, kind: Kind) -> None:
    """Every result has the same bits whichever others are asked for."""
    emulator.ops.allow_tf32 = kind.tf32
    for backward, shape in (
        (conv1x1_backward, SMALL),
        (conv3x3_backward, SMALL),
        (conv3x3_backward, SMALL_VOLUMES),
    ):
        everything = backward(*shape)(Maker(kind)).run(emulator.ops)
        for wanted in WANTED:
            check(emulator.ops, kind, backward(*shape, wanted=wanted))
            some = backward(*shape, wanted=wanted)(Maker(kind)).run(emulator.ops)
            assert some
            for name, result in some.items():
                assert torch.equal(result, everything[name]), (wanted, name)
    for shape in (SMALL, SMALL_VOLUMES):
        check(emulator.ops, kind, transition_backward(*shape, wanted="data"))
    for op in ("conv1x1_forward", "conv3x3_forward", "transition_forward"):
        everything = forward(op, *SMALL)(Maker(kind)).run(emulator.ops)
        make = forward(op, *SMALL, statistics=False)
        check(emulator.ops, kind, make)
        some = make(Maker(kind)).run(emulator.ops)
        assert len(some) == 1
        assert all(torch.equal(value, everything[name]) for name, value in some.items())


@kinds
@pytest.mark.parametrize("format", ["channels_last", "transposed"])
def test_weights_of_any_memory_format(emulator: Emulator, kind: Kind, format: str) -> None:
    """The same bits from the same numbers, however the weight is laid out."""
    emulator.ops.allow_tf32 = kind.tf32
    for make in (
        forward("conv3x3_forward", *SMALL),
        conv3x3_backward(*SMALL),
        forward("conv3x3_forward", *SMALL_VOLUMES),
        conv3x3_backward(*SMALL_VOLUMES),
        forward("conv3x3_forward", *SMALL_SEQUENCES),
        conv3x3_backward(*SMALL_SEQUENCES),
        forward("conv1x1_forward", *SMALL),
        conv1x1_backward(*SMALL),
    ):
        expected = make(Maker(kind)).run(emulator.ops)
        call = make(Maker(kind))
        weight = call.arguments["weight"]
        if format == "transposed":
            weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
        elif weight.dim() > 2:
            weight = weight.movedim(1, -1).contiguous().movedim(-1, 1)
        call.arguments["weight"] = weight
        for name, result in call.run(emulator.ops).items():
            assert torch.equal(result, expected[name]), name


def check_where_not_finite(emulator: Emulator, kind: Kind, value: float) -> None:
    """One spoiled element spoils what it spoils in the reference, and nothing else."""
    emulator.ops.allow_tf32 = kind.tf32
    makes = (
        (forward("conv1x1_forward", *SMALL), "features"),
        (conv1x1_backward(*SMALL), "features"),
        (conv1x1_backward(*SMALL), "grad_norm"),
        *(
            of_shape
            for shape in (SMALL, SMALL_VOLUMES, SMALL_SEQUENCES)
            for of_shape in (
                (forward("conv3x3_forward", *shape), "bottleneck"),
                (forward("transition_forward", *shape), "features"),
                (conv3x3_backward(*shape), "bottleneck"),
                (transition_backward(*shape), "grad_out"),
            )
        ),
    )
    for make, spoiled in makes:
        results = []
        for ops in (emulator.ops, reference):
            call = make(Maker(kind))
            image = call.arguments[spoiled]
            middle = (0, *(size // 2 for size in image.shape[1:-1]), 3)
            image[middle] = value * float(call.arguments["scale"][3].sign())
            results.append(call.run(ops))
        for name, result in results[0].items():
            expected = results[1][name].isfinite()
            assert torch.equal(result.isfinite(), expected), (call.op, spoiled, name)


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_go_where_they_go_in_the_reference(
    emulator: Emulator, kind: Kind, value: float
) -> None:
    check_where_not_finite(emulator, kind, value)
