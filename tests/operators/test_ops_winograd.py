"""Winograd convolutions of the CPU kernels: every kind of tile, accuracy, and the switch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_TYPES, Case, assert_close, nchw, nhwc
from test_ops_conv import CONVOLUTIONS, check_conv3x3_backward, check_forward, plain_conv
from torch import Tensor

from densenet_fast import enable_winograd, operators, winograd_enabled
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")

Pixels = tuple[int, ...]
# One tile cut at the border; more runs of 48 tiles than one, that begin within rows and images;
# more parts than one; outputs that are a fraction of a vector, and as many as there may be; volumes
# of runs of a part of their tiles, of several volumes, and of a part of their slices.
SHAPES: tuple[tuple[Pixels, int, int], ...] = (
    ((1, 2, 2), 16, 12),
    ((1, 3, 3), 5, 32),
    ((5, 7, 7), 128, 32),
    ((2, 20, 31), 48, 12),
    ((3, 17, 40), 33, 48),
    ((9, 32, 32), 20, 16),
    ((1, 8, 10), 300, 24),
    ((1, 6, 8), 130, 128),
    ((1, 5, 16, 20), 33, 12),
    ((2, 3, 7, 7), 130, 32),
    ((3, 1, 8, 8), 17, 16),
    ((2, 2, 8, 8), 64, 24),
    ((1, 35, 5, 9), 140, 12),
)


@pytest.fixture(autouse=True)
def cpu() -> Iterator[None]:
    with use_backend("cpu"):
        yield
    enable_winograd(True)


def uses_winograd(dims: int, height: int, width: int, outputs: int) -> bool:
    """The rule as documented."""
    size, products = (2, 16) if dims == 2 else (4, 36)
    tiles = -(-height // size) * -(-width // size)
    return (
        min(height, width) > 2
        and outputs <= 128
        and products * tiles * (outputs + 6) < 9 * height * width * outputs
    )


def amplification(points: Sequence[float], outputs: int) -> float:
    """Of rounding errors by F(outputs, 3) at these points and infinity, against direct sums.

    Errors of point i are those of a product of (B d)_i and (G g)_i, times A_i, of random values.
    """
    count = len(points) + 1

    def powers(columns: int) -> Tensor:
        rows = [[point**power for power in range(columns)] for point in points]
        return torch.tensor([*rows, [0.0] * (columns - 1) + [1.0]], dtype=torch.float64)

    inputs = torch.linalg.inv(powers(count)).T
    norms = [m.square().sum(1) for m in (powers(outputs), powers(3), inputs)]
    return math.sqrt(float(math.prod(norms).sum()) / (3 * outputs))


@pytest.mark.parametrize("enabled", [True, False])
@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize(("pixels", "channels", "outputs"), SHAPES, ids=str)
def test_against_plain_composition(
    pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, enabled: bool
) -> None:
    enable_winograd(enabled)
    check_forward(3, pixels, channels, outputs, dtype)
    check_conv3x3_backward(pixels, channels, outputs, dtype)


@given(
    pixels=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(2, 19), st.integers(2, 19)),
        st.tuples(st.integers(1, 2), *(st.integers(1, 9) for _ in range(3))),
    ),
    channels=st.integers(1, 140),
    outputs=st.integers(8, 64),
    seed=st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_any_shape(pixels: Pixels, channels: int, outputs: int, seed: int) -> None:
    with use_backend("cpu"):
        check_forward(3, pixels, channels, outputs, torch.float64, seed)
        check_conv3x3_backward(pixels, channels, outputs, torch.float64, seed)


def run(pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Forward and backward of one convolution."""
    case = Case(dtype)
    norm = case.norm(channels)
    rows, weight = (
        case.input(pixels, norm),
        case.weight(outputs, channels, *(3,) * (len(pixels) - 1)),
    )
    grad_growth = case.rows(pixels, outputs)
    out, mean, var = case.rows(pixels, outputs), case.vector(outputs), case.vector(outputs)
    operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, mean, var)
    grad_norm, grad_weight = case.rows(pixels, channels), torch.empty_like(weight)
    sums = case.vector(channels), case.vector(channels)
    operators.conv3x3_backward(grad_growth, rows, *norm, weight, grad_norm, *sums, grad_weight)
    return {"out": out, "mean": mean, "var": var, "grad_norm": grad_norm, "weight": grad_weight}


@pytest.mark.parametrize(("pixels", "channels", "outputs"), SHAPES, ids=str)
def test_same_bits_for_any_number_of_threads(pixels: Pixels, channels: int, outputs: int) -> None:
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(run(pixels, channels, outputs, torch.float32))
    torch.set_num_threads(before)
    for other in results[1:]:
        for name, value in results[0].items():
            assert torch.equal(other[name], value), name


def test_the_switch() -> None:
    assert winograd_enabled()
    shape = ((2, 12, 12), 48, 32)
    winograd = run(*shape, torch.float32)
    enable_winograd(False)
    assert not winograd_enabled()
    direct = run(*shape, torch.float32)
    for name in ("out", "grad_norm", "weight"):
        assert not torch.equal(winograd[name], direct[name]), name
    enable_winograd(True)
    for name, value in run(*shape, torch.float32).items():
        assert torch.equal(value, winograd[name]), name


@pytest.mark.parametrize("value", [1, None, "off"])
def test_the_switch_takes_a_bool(value: object) -> None:
    with pytest.raises(TypeError, match=f"should be True or False, got {value!r}"):
        enable_winograd(value)  # type: ignore[arg-type]
    assert winograd_enabled()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("size", range(1, 24))
@pytest.mark.parametrize("outputs", [4, 12, 32])
def test_the_rule(dims: int, size: int, outputs: int) -> None:
    """Both ways give the same bits just where the rule says that there is one way."""
    shape = ((1, *[2] * (dims - 2), size, size), 16, outputs)
    first = run(*shape, torch.float32)["out"]
    enable_winograd(False)
    assert torch.equal(first, run(*shape, torch.float32)["out"]) is not uses_winograd(
        dims, size, size, outputs
    )


@pytest.mark.parametrize(("pixels", "channels", "outputs"), SHAPES, ids=str)
def test_as_accurate_as_plain_float32(pixels: Pixels, channels: int, outputs: int) -> None:
    """Root mean square errors against float64, and PyTorch's, whose convolutions are direct.

    F(2, 3) and F(4, 3) amplify those of random values 1.3 and 2.2 times, and sums differ in order.
    Volumes' slices are summed directly.
    """
    two = amplification([0, -1, 1], 2)
    four = amplification([0, -0.625, 0.625, -1.5, 1.5], 4)
    filters = [two, two] if len(pixels) == 3 else [1, four, four]
    factor = math.prod(math.sqrt(2) / two * of_dimension for of_dimension in filters)
    case = Case(torch.float32)
    norm = case.norm(channels)
    rows, weight = (
        case.input(pixels, norm),
        case.weight(outputs, channels, *(3,) * (len(pixels) - 1)),
    )
    grad_growth = case.rows(pixels, outputs)

    def error(actual: Tensor, exact: Tensor) -> float:
        return float((actual.double() - exact).square().mean().sqrt())

    def plain(dtype: torch.dtype) -> list[Tensor]:
        scale, shift = norm.scale.to(dtype), norm.shift.to(dtype)
        activated = nchw(torch.relu(rows.to(dtype) * scale + shift)).requires_grad_()
        kernel = weight.to(dtype).requires_grad_()
        out = CONVOLUTIONS[len(pixels) - 2](activated, kernel, padding=1)
        grad, grad_weight = torch.autograd.grad(
            out, [activated, kernel], nchw(grad_growth.to(dtype))
        )
        return [nhwc(out.detach()), nhwc(torch.where(activated > 0, grad, 0)), grad_weight]

    exact = plain(torch.float64)
    found = run(pixels, channels, outputs, torch.float32)
    ours = [found["out"], found["grad_norm"], found["weight"]]
    for actual, theirs, truth in zip(ours, plain(torch.float32), exact, strict=True):
        assert error(actual, truth) <= factor * error(theirs, truth)


def test_nan_reaches_its_neighbours_alone() -> None:
    """The pixels of the direct convolution at least, the tiles that touch them at most."""
    case = Case(torch.float64)
    norm = case.norm(16)
    rows, weight = case.input((1, 12, 12), norm), case.weight(32, 16, 3, 3)
    rows[0, 5, 6, 3] = torch.nan
    out = case.rows((1, 12, 12), 32)
    operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, None, None)
    exact = nhwc(plain_conv(rows, norm, weight))
    bad = torch.isnan(out)
    assert bad[torch.isnan(exact)].all()
    assert not bad[:, :4].any() and not bad[:, 8:].any()
    assert not bad[:, :, :4].any() and not bad[:, :, 8:].any()
    assert_close("output", out[:, 8:], exact[:, 8:], torch.float64, 9 * 16)
