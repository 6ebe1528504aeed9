"""The kernels without products: statistics, coefficients, corrections, dropout and pooling."""

from __future__ import annotations

import pytest
import torch
from devices import device
from emulation import Emulator
from kernel_calls import LAYOUTS_MIXED, STORED, Kind, Maker, Pixels
from kernel_cases import (
    avgpool_backward,
    avgpool_forward,
    channel_statistics,
    dropout,
    finish_gradient,
    maxpool_backward,
    maxpool_forward,
)
from kernel_checks import check
from vector_cases import (
    norm_coefficients,
    norm_grad_coefficients,
    statistics_and_norm,
    sums_and_backward,
    update_running_statistics,
)

from densenet_fast.operators import reference

kinds = pytest.mark.parametrize("kind", STORED, ids=str)
SHAPES: tuple[tuple[Pixels, int], ...] = (
    ((1, 1, 1), 1),
    ((1, 1, 7), 12),
    ((2, 13, 1), 33),
    ((1, 4, 5), 64),
    ((2, 13, 33), 31),
    ((3, 11, 8), 70),
    ((1, 1), 3),
    ((3, 70), 33),
    ((2, 1, 5, 7), 12),
    ((1, 5, 12, 3), 31),
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)
Shape = tuple[Pixels, int]


def layout_of(shape: Shape) -> str:
    return LAYOUTS_MIXED[sum(shape[0]) % len(LAYOUTS_MIXED)]


@kinds
@shapes
def test_images(emulator: Emulator, kind: Kind, shape: Shape) -> None:
    emulator.schedule("random", sum(shape[0]))
    for make in (
        channel_statistics(*shape),
        finish_gradient(*shape),
        avgpool_forward(*shape),
        avgpool_backward(*shape),
        maxpool_forward(*shape),
        maxpool_backward(*shape),
        maxpool_backward(*shape, batch_statistics=False),
    ):
        check(emulator.ops, kind, make, layout=layout_of(shape))


@kinds
@pytest.mark.parametrize("channels", [1, 31, 256, 300])
def test_vectors(emulator: Emulator, kind: Kind, channels: int) -> None:
    for make in (
        norm_coefficients(channels),
        norm_coefficients(channels, affine=False),
        norm_grad_coefficients(channels),
        norm_grad_coefficients(channels, frozen=True),
        update_running_statistics(channels),
    ):
        check(emulator.ops, kind, make)


@kinds
@shapes
def test_what_follows_statistics_and_sums(emulator: Emulator, kind: Kind, shape: Shape) -> None:
    for make in (
        statistics_and_norm(shape[0], 0, shape[1]),
        statistics_and_norm(shape[0], 45, shape[1]),
        sums_and_backward(*shape),
        sums_and_backward(*shape, frozen=True),
    ):
        check(emulator.ops, kind, make, layout=layout_of(shape))


@kinds
def test_running_statistics_of_many_norms(emulator: Emulator, kind: Kind) -> None:
    """Of several channels, more than one launch's, with buffers that norms share, or none."""
    for order in ("forward", "reverse", "random"):
        emulator.schedule(order, 1)
        for make in (
            update_running_statistics(3, 300, 31, counters=0),
            update_running_statistics(*(1 + 6 * i for i in range(60)), counters=97),
            update_running_statistics(5, 5, 5, 5, shared=True),
            update_running_statistics(counters=3),
        ):
            check(emulator.ops, kind, make)


@kinds
@pytest.mark.parametrize("p", [0.0, 0.3, 0.999, 1.0])
def test_dropout_drops_what_the_reference_drops(emulator: Emulator, kind: Kind, p: float) -> None:
    for seed in (0, 1 << 40, (1 << 64) - 1):
        make = dropout((2, 5, 7), 13, p, seed if seed < 1 << 63 else seed - (1 << 64))
        ours, expected = make(Maker(kind)), make(Maker(kind))
        actual = ours.run(emulator.ops)["growth"]
        wanted = expected.run(reference)["growth"]
        assert torch.equal(actual == 0, wanted == 0)
        torch.testing.assert_close(actual, wanted, rtol=2 * kind.eps, atol=0)
        ours.maker.assert_guards()


@kinds
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maxima_that_are_equal_or_nan(emulator: Emulator, kind: Kind, dims: int) -> None:
    """The place of a maximum is PyTorch's: the first of equal ones, the last NaN."""
    maker, size, pooled = Maker(kind), (2, *(7, 9, 5)[:dims]), (2, *(4, 5, 3)[:dims])
    values = torch.randint(-2, 3, (*size, 5)).to(device(), kind.dtype)
    rows = maker.rows(size, 5, values)
    rows[(0, *[slice(2, 4)] * dims, 1)] = torch.nan
    scale, shift = (torch.full_like(maker.vector(5), value) for value in (1.0, 0.0))
    results = []
    for ops in (emulator.ops, reference):
        out = maker.result(pooled, 5)
        argmax = torch.zeros(*pooled, 5, dtype=torch.uint8, device=device())
        ops.norm_relu_maxpool_forward(rows, scale, shift, out, argmax)
        results.append((out, argmax))
    assert torch.equal(results[0][1], results[1][1])
    torch.testing.assert_close(*(r[0] for r in results), rtol=0, atol=0, equal_nan=True)
