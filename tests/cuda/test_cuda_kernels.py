"""The emulator's calls of every kernel on a GPU: the same shapes, layouts and bounds.

float64 has its own comparison in `test_ops_*`: here the reference would be its own yardstick.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from devices import device, on, tf32
from kernel_calls import HALVES, KINDS, LAYOUTS_MIXED, STORED, Calls, Kind, Maker, Pixels
from kernel_cases import WANTED, conv1x1_backward, conv3x3_backward, forward, transition_backward
from kernel_checks import check
from ops_arguments import ARGUMENTS, arguments
from test_kernels_conv import (
    SHAPES_1X1,
    SHAPES_3X3,
    SHAPES_TRANSITION,
    SMALL,
    check_where_not_finite,
    seed_of,
)
from test_kernels_orders import OTHERS, PRODUCTS
from test_kernels_pointwise import test_maxima_that_are_equal_or_nan as check_maxima
from test_ops_checks import CHECKED
from torch import Tensor

from densenet_fast import operators

pytestmark = pytest.mark.cuda
INEXACT = [kind for kind in KINDS if kind.dtype != torch.float64]
kinds = pytest.mark.parametrize("kind", INEXACT, ids=str)


class Operators:
    """The operators as the emulator offers them, with tf32 as an attribute."""

    allow_tf32 = False

    def __getattr__(self, name: str) -> Any:
        def operator(*arguments: Any) -> None:
            with tf32(self.allow_tf32):
                getattr(operators, name)(*arguments)

        return operator


class OnDevice:
    """What tests of the emulator use of it."""

    def __init__(self) -> None:
        self.ops = Operators()


@pytest.fixture
def gpu() -> Iterator[Any]:
    with on("cuda"):
        yield OnDevice()


def run(gpu: OnDevice, kind: Kind, make: Calls, shape: tuple[Pixels, int, int]) -> None:
    seed = seed_of(shape)
    check(gpu.ops, kind, make, seed, LAYOUTS_MIXED[seed % len(LAYOUTS_MIXED)])


@kinds
@pytest.mark.parametrize("shape", SHAPES_1X1, ids=str)
def test_conv1x1(gpu: OnDevice, kind: Kind, shape: tuple[Pixels, int, int]) -> None:
    run(gpu, kind, forward("conv1x1_forward", *shape), shape)
    run(gpu, kind, conv1x1_backward(*shape), shape)


@kinds
@pytest.mark.parametrize("shape", SHAPES_3X3, ids=str)
def test_conv3x3(gpu: OnDevice, kind: Kind, shape: tuple[Pixels, int, int]) -> None:
    run(gpu, kind, forward("conv3x3_forward", *shape), shape)
    run(gpu, kind, conv3x3_backward(*shape), shape)


@kinds
@pytest.mark.parametrize("shape", SHAPES_TRANSITION, ids=str)
def test_transition(gpu: OnDevice, kind: Kind, shape: tuple[Pixels, int, int]) -> None:
    for linear in (False, True):
        run(gpu, kind, forward("transition_forward", *shape, linear=linear), shape)
        run(gpu, kind, transition_backward(*shape, linear=linear), shape)


@kinds
@pytest.mark.parametrize("layout", LAYOUTS_MIXED)
@pytest.mark.parametrize("name", PRODUCTS)
def test_several_tiles_in_every_layout(gpu: OnDevice, kind: Kind, layout: str, name: str) -> None:
    check(gpu.ops, kind, PRODUCTS[name], layout=layout)


@pytest.mark.parametrize("kind", [kind for kind in STORED if kind in INEXACT], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS_MIXED)
@pytest.mark.parametrize("name", [name for name in OTHERS if name != "dropout_"])
def test_operators_without_products(gpu: OnDevice, kind: Kind, layout: str, name: str) -> None:
    check(gpu.ops, kind, OTHERS[name], layout=layout)


@pytest.mark.parametrize("kind", HALVES, ids=str)
def test_float32_weights_with_half_images(gpu: OnDevice, kind: Kind) -> None:
    for op in ("conv1x1_forward", "conv3x3_forward", "transition_forward"):
        check(gpu.ops, kind, forward(op, *SMALL, wide_weight=True))
    for backward in (conv1x1_backward, conv3x3_backward, transition_backward):
        check(gpu.ops, kind, backward(*SMALL, wide_weight=True))


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_not_wanted_changes_nothing_else(gpu: OnDevice, kind: Kind) -> None:
    gpu.ops.allow_tf32 = kind.tf32
    for backward in (conv1x1_backward, conv3x3_backward):
        everything = backward(*SMALL)(Maker(kind)).run(gpu.ops)
        for wanted in WANTED:
            some = backward(*SMALL, wanted=wanted)(Maker(kind)).run(gpu.ops)
            assert some
            for name, result in some.items():
                assert torch.equal(result, everything[name]), (wanted, name)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("name", [*PRODUCTS, *OTHERS])
def test_same_bits_from_run_to_run(gpu: OnDevice, kind: Kind, name: str) -> None:
    """While other work keeps the GPU busy, so that blocks start in other orders."""
    make = {**PRODUCTS, **OTHERS}[name]
    gpu.ops.allow_tf32 = kind.tf32
    expected = make(Maker(kind)).run(gpu.ops)
    for _ in range(5):
        again = make(Maker(kind))
        load = busy()
        for key, result in again.run(gpu.ops).items():
            assert torch.equal(result, expected[key]), key
        del load


def busy() -> list[Tensor]:
    """Products on another stream, under way when this returns."""
    if device().type != "cuda":
        return []
    with torch.cuda.stream(torch.cuda.Stream()):
        factor = torch.rand(512, 512, device=device())
        return [factor @ factor for _ in range(20)]


@kinds
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(gpu: Any, kind: Kind, value: float) -> None:
    check_where_not_finite(gpu, kind, value)


@pytest.mark.parametrize("kind", STORED, ids=str)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_maxima(gpu: Any, kind: Kind, dims: int) -> None:
    check_maxima(gpu, kind, dims)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", ARGUMENTS)
def test_opcheck_of_half_types(gpu: OnDevice, op: str, dtype: torch.dtype) -> None:
    operator = getattr(torch.ops.densenet_fast, op).default
    torch.library.opcheck(operator, tuple(arguments(op, dtype).values()))


@pytest.mark.parametrize("op", CHECKED)
def test_tensors_on_the_cpu_are_named_and_nothing_is_written(gpu: OnDevice, op: str) -> None:
    first = next(iter(arguments(op)))
    for name, value in arguments(op).items():
        if name == first or not isinstance(value, Tensor):
            continue
        given = arguments(op)
        given[name] = value.cpu()
        before = {k: v.clone() for k, v in given.items() if isinstance(v, Tensor)}
        with pytest.raises(ValueError, match=rf"{op}: `\w+` should be on"):
            getattr(operators, op)(**given)
        for key, kept in before.items():
            assert torch.equal(given[key], kept), key
