"""The convolutions with norm and ReLU in front, against autograd of their plain composition."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from devices import BACKENDS, HALF_TYPES, on
from hypothesis import given, settings
from hypothesis import strategies as st
from op_cases import (
    CPU_TYPES,
    PIXELS,
    WIDE,
    Case,
    Norm,
    activation,
    assert_close,
    assert_repeated,
    nchw,
    nhwc,
    norm_sums,
    pixel_sum,
)
from torch import Tensor

from densenet_fast import operators
from densenet_fast.operators import extension
from densenet_fast.operators.backends import use_backend
from densenet_fast.operators.rows import channels_last_format

CHANNELS = ((1, 4), (17, 12), (100, 33), (257, 48))  # read and written
Pixels = tuple[int, ...]
CONVOLUTIONS = (F.conv1d, F.conv2d, F.conv3d)


def moments(rows: Tensor) -> tuple[Tensor, Tensor]:
    values = rows.double().flatten(0, -2)
    return values.mean(0), values.var(0, correction=0)


def check_statistics(mean: Tensor, var: Tensor, rows: Tensor, dtype: torch.dtype) -> None:
    """Statistics are those of the values as stored, in the statistics' own type."""
    exact_mean, exact_var = moments(rows)
    count = rows[..., 0].numel()
    size = rows.double().abs().max()
    assert_close("mean", mean, exact_mean, dtype, count, magnitude=size)
    assert_close("var", var, exact_var, dtype, count, magnitude=size * size)


def plain_conv(rows: Tensor, norm: Norm, weight: Tensor) -> Tensor:
    exact = norm.exact()
    values = nchw(torch.relu(rows * exact.scale + exact.shift))
    return CONVOLUTIONS[rows.dim() - 3](values, weight, padding=weight.shape[2] // 2)


def check_forward(
    kernel: int, pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    rows = case.input(pixels, norm)
    taps = (kernel,) * (len(pixels) - 1)
    weight = case.weight(outputs, channels, *taps)
    out = case.rows(pixels, outputs)
    mean, var = case.vector(outputs), case.vector(outputs)
    if kernel == 1:
        operators.conv1x1_forward(rows, norm.scale, norm.shift, weight.flatten(1), out, mean, var)
    else:
        operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, mean, var)
    exact = nhwc(plain_conv(rows.double(), norm, weight.double()))
    assert_close("output", out, exact, dtype, channels * kernel ** len(taps))
    check_statistics(mean, var, out, case.statistics)
    before = out.clone()
    if kernel == 1:
        operators.conv1x1_forward(rows, norm.scale, norm.shift, weight.flatten(1), out, None, None)
    else:
        operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, None, None)
    assert_repeated(out, before)
    case.assert_guards()


def check_conv1x1_backward(
    pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    features = case.input(pixels, norm)
    bottleneck, grad_norm = case.rows(pixels, outputs), case.rows(pixels, outputs)
    coefficients = torch.stack([case.vector(outputs) for _ in range(3)])
    weight = case.weight(outputs, channels)
    grad_features = case.rows(pixels, channels)
    before = grad_features.double().clone()
    grad_gamma, grad_beta = case.vector(channels), case.vector(channels)
    grad_weight = torch.empty_like(weight)
    arguments = (grad_norm, bottleneck, coefficients, features, *norm, weight)
    operators.conv1x1_backward(*arguments, grad_features, grad_gamma, grad_beta, grad_weight)

    p, q, s = coefficients.double()
    grad_bottleneck = p * grad_norm.double() + q * bottleneck.double() + s
    value = features.double().clone().requires_grad_()
    exact_weight = weight.double().view(*weight.shape, *(1,) * (len(pixels) - 1)).clone()
    exact_weight.requires_grad_()
    output = plain_conv(value, norm, exact_weight)
    exact_features, exact_grad_weight = torch.autograd.grad(
        output, [value, exact_weight], nchw(grad_bottleneck)
    )
    count = features[..., 0].numel()
    assert_close("grad_features", grad_features, before + exact_features, dtype, outputs)
    exact_grad_weight = exact_grad_weight.flatten(1)
    size = grad_bottleneck.abs().amax() * activation(features, norm).amax() * count**0.5
    assert_close("grad_weight", grad_weight, exact_grad_weight, dtype, count, magnitude=size)
    check_sums(grad_gamma, grad_beta, exact_features, features, norm, dtype, outputs)

    again = torch.empty_like(weight)
    operators.conv1x1_backward(*arguments, None, None, None, again)
    assert_repeated(again, grad_weight)
    sums = torch.empty_like(grad_gamma), torch.empty_like(grad_beta)
    operators.conv1x1_backward(*arguments, None, *sums, None)
    assert_repeated(torch.stack(sums), torch.stack((grad_gamma, grad_beta)))
    case.assert_guards()


def check_sums(
    grad_gamma: Tensor,
    grad_beta: Tensor,
    exact_grad: Tensor,
    rows: Tensor,
    norm: Norm,
    dtype: torch.dtype,
    length: int,
) -> None:
    """Sums of the gradient before the norm's scale, of which autograd gave that behind it."""
    grad_norm = exact_grad / norm.exact().scale
    exact_gamma, exact_beta = norm_sums(grad_norm, rows, norm)
    exact = norm.exact()
    standardised = ((rows.double() - exact.mean) * exact.rstd).abs()
    beta_size = pixel_sum(grad_norm.abs()).max()
    gamma_size = pixel_sum(grad_norm.abs() * standardised).max()
    assert_close("grad_beta", grad_beta, exact_beta, dtype, length, magnitude=beta_size)
    assert_close("grad_gamma", grad_gamma, exact_gamma, dtype, length, magnitude=gamma_size)


def check_conv3x3_backward(
    pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int = 0
) -> None:
    case = Case(dtype, seed)
    norm = case.norm(channels)
    bottleneck = case.input(pixels, norm)
    grad_growth = case.rows(pixels, outputs)
    taps = 3 ** (len(pixels) - 1)
    weight = case.weight(outputs, channels, *(3,) * (len(pixels) - 1))
    grad_norm = case.rows(pixels, channels)
    grad_gamma, grad_beta = case.vector(channels), case.vector(channels)
    grad_weight = torch.empty_like(weight)
    arguments = (grad_growth, bottleneck, *norm, weight)
    operators.conv3x3_backward(*arguments, grad_norm, grad_gamma, grad_beta, grad_weight)

    value = bottleneck.double().clone().requires_grad_()
    exact_weight = weight.double().clone().requires_grad_()
    output = plain_conv(value, norm, exact_weight)
    exact_grad, exact_grad_weight = torch.autograd.grad(
        output, [value, exact_weight], nchw(grad_growth.double())
    )
    count = bottleneck[..., 0].numel()
    exact_norm = exact_grad / norm.exact().scale
    assert_close("grad_norm", grad_norm, exact_norm, dtype, taps * outputs)
    size = grad_growth.double().abs().amax() * activation(bottleneck, norm).amax() * count**0.5
    assert_close("grad_weight", grad_weight, exact_grad_weight, dtype, count, magnitude=size)
    check_sums(grad_gamma, grad_beta, exact_grad, bottleneck, norm, dtype, taps * outputs)

    again = torch.empty_like(weight, memory_format=channels_last_format(weight.dim()))
    operators.conv3x3_backward(*arguments, None, None, None, again)
    assert_repeated(again, grad_weight)
    sums = torch.empty_like(grad_gamma), torch.empty_like(grad_beta)
    other = torch.empty_like(grad_norm)
    operators.conv3x3_backward(*arguments, other, *sums, None)
    assert_repeated(other, grad_norm)
    assert_repeated(torch.stack(sums), torch.stack((grad_gamma, grad_beta)))

    # Of a layer without a bottleneck: added to what is there, the norm's scale included.
    added = case.rows(pixels, channels)
    before = added.double().clone()
    operators.conv3x3_backward(*arguments, added, *sums, again, accumulate=True)
    assert_close("grad_features", added, before + exact_grad, dtype, taps * outputs)
    check_sums(*sums, exact_grad, bottleneck, norm, dtype, taps * outputs)
    assert_repeated(again, grad_weight)
    case.assert_guards()


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), CHANNELS)
def test_convolutions(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int, outputs: int
) -> None:
    check_forward(1, pixels, channels, outputs, dtype)
    check_conv1x1_backward(pixels, channels, outputs, dtype)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("pixels", PIXELS, ids=str)
@pytest.mark.parametrize(("channels", "outputs"), [(4, 1), (12, 3), (33, 12), (48, 32), (20, 48)])
def test_convolutions_3x3(
    backend: str, dtype: torch.dtype, pixels: Pixels, channels: int, outputs: int
) -> None:
    check_forward(3, pixels, channels, outputs, dtype)
    check_conv3x3_backward(pixels, channels, outputs, dtype)


# Few rows: tasks are cut by columns, pack the weights that they read and store what they make. The
# channels fit no vector and make several panels; 63 to 66 rows lie around the limits.
SMALL = (
    *((1, 1, 1), (1, 2, 2), (1, 4, 4), (1, 7, 9), (1, 8, 8), (1, 5, 13), (1, 6, 11), (2, 8, 8)),
    *((1, 9), (2, 33), (1, 2, 4, 4), (1, 3, 9, 11)),
)


@pytest.mark.parametrize("dtype", CPU_TYPES, ids=str)
@pytest.mark.parametrize("pixels", SMALL, ids=str)
def test_small_images(backend: str, dtype: torch.dtype, pixels: Pixels) -> None:
    for channels, outputs in ((130, 70), (275, 5)):
        check_forward(1, pixels, channels, outputs, dtype)
        check_conv1x1_backward(pixels, channels, outputs, dtype)
    for outputs in (1, 2, 3, 4, 5, 32):
        check_forward(3, pixels, 131, outputs, dtype)
        check_conv3x3_backward(pixels, 131, outputs, dtype)


@pytest.mark.parametrize(("backend", "dtype"), HALF_TYPES, indirect=["backend"], ids=str)
@pytest.mark.parametrize("pixels", [(2, 5, 7), (1, 1, 3)], ids=str)
def test_half_types(backend: str, dtype: torch.dtype, pixels: Pixels) -> None:
    check_forward(1, pixels, 17, 12, dtype)
    check_forward(3, pixels, 12, 3, dtype)
    check_conv3x3_backward(pixels, 12, 3, dtype)
    check_conv1x1_backward(pixels, 17, 12, dtype)


sizes = st.one_of(
    st.tuples(st.integers(1, 3), *(st.integers(1, most) for _ in range(dimensions)))
    for dimensions, most in ((1, 90), (2, 9), (3, 5))
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    pixels=sizes,
    channels=st.integers(1, 70),
    outputs=st.integers(1, 40),
    dtype=st.sampled_from(CPU_TYPES),
    seed=st.integers(0, 99),
)
@pytest.mark.parametrize("name", BACKENDS)
def test_any_shape(
    name: str, pixels: Pixels, channels: int, outputs: int, dtype: torch.dtype, seed: int
) -> None:
    with on(name):
        check_forward(1, pixels, channels, outputs, dtype, seed)
        check_conv1x1_backward(pixels, channels, outputs, dtype, seed)
        check_forward(3, pixels, channels, outputs, dtype, seed)
        check_conv3x3_backward(pixels, channels, outputs, dtype, seed)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_reach_the_outputs_they_reach_in_pytorch(
    backend: str, value: float
) -> None:
    case = Case(torch.float32)
    norm = case.norm(5)
    rows = case.input((1, 6, 6), norm)
    rows[0, 2, 3, 1] = value * float(norm.scale[1].sign())
    weight = case.weight(20, 5, 3, 3)
    out = case.rows((1, 6, 6), 20)
    operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, None, None)
    exact = nhwc(plain_conv(rows.double(), norm, weight.double()))
    assert torch.equal(out.isfinite(), exact.isfinite())
    operators.conv1x1_forward(rows, norm.scale, norm.shift, weight[:, :, 1, 1], out, None, None)
    exact = nhwc(plain_conv(rows.double(), norm, weight[:, :, 1:2, 1:2].double()))
    assert torch.equal(out.isfinite(), exact.isfinite())


@pytest.mark.parametrize("transposed", [False, True], ids=["channels_last", "transposed"])
def test_weights_of_any_dense_layout(backend: str, transposed: bool) -> None:
    case = Case(torch.float32)
    norm = case.norm(12)
    rows, out = case.input((1, 5, 4), norm), case.rows((1, 5, 4), 6)
    weight = case.weight(6, 12, 3, 3)
    other = weight.contiguous(memory_format=torch.channels_last)
    if transposed:
        other = weight.transpose(0, 1).contiguous().transpose(0, 1)
    again = torch.empty_like(out)
    operators.conv3x3_forward(rows, norm.scale, norm.shift, weight, out, None, None)
    operators.conv3x3_forward(rows, norm.scale, norm.shift, other, again, None, None)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)
    small = case.rows((1, 5, 4), 6)
    operators.conv1x1_forward(rows, norm.scale, norm.shift, weight[:, :, 0, 0], small, None, None)
    operators.conv1x1_forward(rows, norm.scale, norm.shift, other[:, :, 0, 0], again, None, None)
    torch.testing.assert_close(again, small, rtol=1e-6, atol=1e-6)


@pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")
def test_kernels_are_the_same_bits_for_any_number_of_threads_and_from_run_to_run() -> None:
    def run(threads: int) -> list[Tensor]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            case = Case(torch.float32)
            norm1, norm2 = case.norm(60), case.norm(48)
            features = case.input((3, 17, 19), norm1)
            bottleneck = case.rows((3, 17, 19), 48)
            growth, grad_norm = case.rows((3, 17, 19), 12), case.rows((3, 17, 19), 48)
            vectors = [case.vector(n) for n in (48, 48, 12, 12, 48, 48, 60, 60)]
            weight1, weight2 = case.weight(48, 60), case.weight(12, 48, 3, 3)
            grads = torch.empty_like(weight1), torch.empty_like(weight2)
            rows = torch.stack([norm2.scale, norm2.shift, norm2.mean])
            grad_features = case.rows((3, 17, 19), 60)
            operators.conv1x1_forward(
                features, norm1.scale, norm1.shift, weight1, bottleneck, *vectors[:2]
            )
            operators.conv3x3_forward(
                bottleneck, norm2.scale, norm2.shift, weight2, growth, *vectors[2:4]
            )
            operators.conv3x3_backward(
                growth, bottleneck, *norm2, weight2, grad_norm, *vectors[4:6], grads[1]
            )
            operators.conv1x1_backward(
                grad_norm,
                bottleneck,
                rows,
                features,
                *norm1,
                weight1,
                grad_features,
                *vectors[6:],
                grads[0],
            )
            return [bottleneck, growth, grad_norm, grad_features, *vectors, *grads]
        finally:
            torch.set_num_threads(before)

    with use_backend("cpu"):
        first, *others = run(1), run(1), run(2), run(2)
    for other in others:
        for expected, actual in zip(first, other, strict=True):
            assert torch.equal(expected, actual)


@pytest.mark.parametrize("outputs", [48, 80, 112])  # 3, 5 and 7 vectors of 16
@pytest.mark.parametrize("pixels", [(1, 8, 8), (1, 14, 14)], ids=str)
@pytest.mark.skipif(not extension.LOADED, reason="no compiled kernels")
def test_tasks_share_columns_and_make_none_twice(
    outputs: int, pixels: tuple[int, int, int]
) -> None:
    """Two threads at one column would add to each other's sums, now and then."""
    features, weight = torch.randn(*pixels, 600), torch.randn(outputs, 600)
    norm = torch.rand(600), torch.randn(600)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, *(2, 8) * 40):
            torch.set_num_threads(threads)
            results.append(torch.empty(*pixels, outputs))
            operators.conv1x1_forward(features, *norm, weight, results[-1], None, None)
        assert all(torch.equal(result, results[0]) for result in results)
    finally:
        torch.set_num_threads(before)
