"""What follows a block (transition, final average) and the stem's max-pool, against autograd."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from devices import BACKENDS, HALF, HALF_TYPES, device, on
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import CPU_TYPES, WIDE, Case, Norm, assert_close, nchw, nhwc, norm_sums, pixel_sum
from torch import Tensor

from densenet_fast import operators

Pixels = tuple[int, ...]
PIXELS = (
    *((1, 2, 2), (2, 3, 2), (1, 2, 33), (2, 7, 13), (3, 8, 8)),
    *((1, 2), (3, 33), (1, 2, 2, 2), (2, 3, 2, 5), (2, 4, 5, 3)),
)
AVERAGES = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)
MAXIMA = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
CHANNELS = ((1, 1), (17, 9), (100, 50))


def leaf_and_activation(rows: Tensor, norm: Norm, *, linear: bool = False) -> tuple[Tensor, Tensor]:
    """The rows as a float64 leaf, and its activation as [N, C, H, W], without ReLU if `linear`."""
    exact = norm.exact()
    leaf = rows.double().clone().requires_grad_()
    normalised = exact.scale * leaf + exact.shift
    return leaf, nchw(normalised if linear else torch.relu(normalised))


def check_gradient(
    case: Case,
    actual: tuple[Tensor, Tensor, Tensor],
    exact_features: Tensor,
    rows: Tensor,
    norm: Norm,
    length: int,
) -> None:
    grad_features, grad_gamma, grad_beta = actual
    assert_close("grad_features", grad_features, exact_features, case.dtype, length)
    exact, grad_norm = norm.exact(), exact_features / norm.exact().scale
    exact_gamma, exact_beta = norm_sums(grad_norm, rows, norm)
    standardised = ((rows.double() - exact.mean) * exact.rstd).abs()
    size = pixel_sum(grad_norm.abs()).max()
    assert_close("grad_beta", grad_beta, exact_beta, case.dtype, length, magnitude=size)
    size = pixel_sum(grad_norm.abs() * standardised).max()
    assert_close("grad_gamma", grad_gamma, exact_gamma, case.dtype, length, magnitude=size)


def check_transition(
    pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, linear: bool, seed: int = 0
) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    rows, weight = case.input(pixels, norm), case.weight(outputs, channels)
    small = (pixels[0], *(size // 2 for size in pixels[1:]))
    out, grad_out = case.rows(small, outputs), case.rows(small, outputs)
    mean, var = case.vector(outputs), case.vector(outputs)
    operators.transition_forward(rows, norm.scale, norm.shift, weight, out, mean, var, linear)
    leaf, activation = leaf_and_activation(rows, norm, linear=linear)
    exact_weight = weight.double().clone().requires_grad_()
    multiplied = nchw(nhwc(activation) @ exact_weight.t())
    exact = AVERAGES[len(pixels) - 2](multiplied, 2)
    assert_close("out", out, nhwc(exact), dtype, channels)
    values = out.double().flatten(0, -2)
    size = values.abs().max()
    assert_close("mean", mean, values.mean(0), case.statistics, 4, magnitude=size)
    exact_var = values.var(0, correction=0)
    assert_close("var", var, exact_var, case.statistics, 4, magnitude=size**2)

    grad_features = case.rows(pixels, channels)
    sums = case.vector(channels), case.vector(channels)
    grad_weight = torch.empty_like(weight)
    arguments = (grad_out, rows, *norm, weight, grad_features, *sums)
    operators.transition_backward(*arguments, None, linear)
    operators.transition_backward(*arguments, grad_weight, linear)
    exact_features, exact_grad_weight = torch.autograd.grad(
        exact, [leaf, exact_weight], nchw(grad_out.double())
    )
    check_gradient(case, (grad_features, *sums), exact_features, rows, norm, outputs)
    count = out[..., 0].numel()
    size = grad_out.double().abs().amax() * activation.detach().abs().amax() * count**0.5
    assert_close("grad_weight", grad_weight, exact_grad_weight, dtype, count, magnitude=size)
    case.assert_guards()


def check_average(pixels: Pixels, channels: int, dtype: torch.dtype, seed: int = 0) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    rows = case.input(pixels, norm)
    out = torch.empty(pixels[0], channels, dtype=dtype, device=device())
    operators.norm_relu_avgpool_forward(rows, norm.scale, norm.shift, out)
    leaf, activation = leaf_and_activation(rows, norm)
    exact = activation.flatten(2).mean(2)
    size = activation.detach().amax()
    assert_close("out", out, exact, dtype, math.prod(pixels[1:]), magnitude=size)

    grad_out = case.randn(pixels[0], channels).to(dtype)
    grad_features = case.rows(pixels, channels)
    sums = case.vector(channels), case.vector(channels)
    operators.norm_relu_avgpool_backward(grad_out, rows, *norm, grad_features, *sums)
    (exact_features,) = torch.autograd.grad(exact, leaf, grad_out.double())
    check_gradient(case, (grad_features, *sums), exact_features, rows, norm, 1)
    case.assert_guards()


def check_maxpool(
    pixels: Pixels, channels: int, batch: bool, dtype: torch.dtype, seed: int = 0
) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    rows = case.input(pixels, norm)
    small = (pixels[0], *((size + 1) // 2 for size in pixels[1:]))
    out, grad_out = case.rows(small, channels), case.rows(small, channels)
    argmax = torch.empty(*small, channels, dtype=torch.uint8, device=device())
    operators.norm_relu_maxpool_forward(rows, norm.scale, norm.shift, out, argmax)
    leaf, activation = leaf_and_activation(rows, norm)
    exact, index = MAXIMA[len(pixels) - 2](activation, 3, 2, padding=1, return_indices=True)
    assert_close("out", out, nhwc(exact), dtype, 1)
    code = torch.zeros_like(index)
    for at, place in enumerate(torch.unravel_index(index, pixels[1:])):
        window = torch.arange(small[1 + at], device=device())
        window = window.view(-1, *(1,) * (len(small) - 2 - at))
        code = 3 * code + place - (2 * window - 1)
    if dtype in WIDE:  # rounding to half types makes ties of neighbours
        assert torch.equal(argmax, nhwc(code).to(torch.uint8))

    grad_input = case.rows(pixels, channels)
    sums = case.vector(channels), case.vector(channels)
    operators.norm_relu_maxpool_backward(grad_out, argmax, rows, *norm, batch, grad_input, *sums)
    if device().type != "cuda":  # there the features are read once more
        again = rows.clone()
        arguments = (grad_out, argmax, again, *norm, batch, again)
        operators.norm_relu_maxpool_backward(*arguments, *map(torch.empty_like, sums))
        assert torch.equal(again, grad_input)
    if dtype in HALF:
        return
    (plain,) = torch.autograd.grad(exact, leaf, nchw(grad_out.double()))
    precise = norm.exact()
    grad_norm = plain / precise.scale
    exact_gamma, exact_beta = norm_sums(grad_norm, rows, norm)
    standardised = (rows.double() - precise.mean) * precise.rstd
    count = rows[..., 0].numel()
    if batch:
        mean_part = (exact_beta + standardised * exact_gamma) / count
        plain = precise.scale * (grad_norm - mean_part)
    size = plain.abs().max() + grad_norm.abs().max()
    assert_close("grad_input", grad_input, plain, dtype, count, magnitude=size)
    size = pixel_sum(grad_norm.abs()).max()
    assert_close("grad_beta", sums[1], exact_beta, dtype, 4, magnitude=size)
    size = pixel_sum((grad_norm * standardised).abs()).max()
    assert_close("grad_gamma", sums[0], exact_gamma, dtype, 4, magnitude=size)
    case.assert_guards()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
@pytest.mark.parametrize("linear", [False, True], ids=["relu", "linear"])
def test_transition(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int, outputs: int, linear: bool
) -> None:
    check_transition(pixels, channels, outputs, dtype, linear)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", [(1, 1, 1), *PIXELS], ids=str)
@pytest.mark.parametrize("channels", [1, 17, 100])
def test_average(backend: str, dtype: torch.dtype, pixels: Pixels, channels: int) -> None:
    check_average(pixels, channels, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", [(1, 1, 1), (1, 1, 7), *PIXELS], ids=str)
@pytest.mark.parametrize("channels", [1, 17, 64])
@pytest.mark.parametrize("batch", [True, False], ids=["batch", "frozen"])
def test_maxpool(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int, batch: bool
) -> None:
    check_maxpool(pixels, channels, batch, dtype)


def test_maxpool_takes_the_first_of_equal_values_and_the_nan(backend: str) -> None:
    rows = torch.full((1, 4, 4, 1), -1.0, device=device())
    rows[0, 2, 2] = float("nan")
    one, zero = torch.ones(1, device=device()), torch.zeros(1, device=device())
    out = torch.empty(1, 2, 2, 1, device=device())
    argmax = torch.empty_like(out, dtype=torch.uint8)
    operators.norm_relu_maxpool_forward(rows, one, zero, out, argmax)
    assert argmax.flatten()[:3].tolist() == [4, 3, 1]
    assert argmax.flatten()[3] == 4
    assert out.isnan().flatten().tolist() == [False, False, False, True]


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES, indirect=["backend"], ids=str)
def test_half_types(backend: str, dtype: torch.dtype) -> None:
    check_transition((2, 5, 6), 17, 9, dtype, False)
    check_transition((2, 5, 6), 17, 9, dtype, True)
    check_average((2, 5, 6), 17, dtype)
    check_maxpool((2, 5, 6), 17, True, dtype)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pixels=st.one_of(
        st.tuples(st.integers(1, 3), *(st.integers(2, most) for _ in range(dimensions)))
        for dimensions, most in ((1, 40), (2, 11), (3, 5))
    ),
    channels=st.integers(1, 70),
    outputs=st.integers(1, 40),
    dtype=st.sampled_from(CPU_TYPES),
    batch=st.booleans(),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(
    name: str,
    pixels: Pixels,
    channels: int,
    outputs: int,
    dtype: torch.dtype,
    batch: bool,
    seed: int,
) -> None:
    with on(name):
        check_transition(pixels, channels, outputs, dtype, batch, seed)
        check_average(pixels, channels, dtype, seed)
        check_maxpool(pixels, channels, batch, dtype, seed)
